// The order of work in mega_moe: which token tile lives where in the pool, and the stream of tasks that the blocks of a rank claim.
//
// Token tiles are numbered in row order (GroupTable with one row tile per group). Tile t lives in slot t % S of the pool, a ring; its
// generation is t / S. A band is a run of at most B tiles of one expert: its tasks follow each other, token tiles fastest, so that blocks
// that work at the same time share a weight tile through L2. Linear 2 of a band comes once linear 1 is at least `lag` tiles ahead of its
// end, so that it seldom has to wait for the rows of linear 1:
//
//     L1(band 0)  L1(1)  L1(2)  L2(0)  L1(3)  L2(1)  ...  L1(last)  L2(last - 2)  L2(last - 1)  L2(last)
//
// No task waits for a later one: linear 2 of a tile comes after its linear 1, and with S >= lag + 2 B - 1 linear 1 of tile t comes after
// linear 2 of tile t - S, whose slot it takes. Blocks claim tasks in this order and each finishes its own in this order, so the oldest
// unfinished task can always run.
#pragma once

#include <megamoe/schedule/group_table.cuh>
#include <megamoe/schedule/tile.cuh>

namespace megamoe {

// The pool as a ring of slots of one tile each.
struct TileRing {
  uint32 num_slots, slot_rows;

  MEGAMOE_HOST_DEVICE uint32 slot(uint32 tile) const { return tile % num_slots; }
  MEGAMOE_HOST_DEVICE uint32 generation(uint32 tile) const { return tile / num_slots; }
  MEGAMOE_HOST_DEVICE uint32 first_row(uint32 tile) const { return slot(tile) * slot_rows; }
};

// What the order depends on beside the counts of rows.
struct MoeStreamShape {
  uint32 row_tiles[2];  // of linear 1 and 2; one for all blocks of a cluster
  uint32 k_blocks[2];
  uint32 band_tiles, lag_tiles;
  TileRing ring;
};

// Where a received row is.
struct RowPlace {
  uint32 tile, idx;     // row idx of the tile
  uint32 num_rows;      // of the tile
};

template <class Config>
MEGAMOE_HOST_DEVICE RowPlace place_of(uint32 row, const GroupTable<Config>& table) {
  const uint32 group = table.group_of_row(row), tokens = table.tokens_per_tile(group);
  const GroupEntry entry = table.entries[group];
  const uint32 in_group = row - entry.begin, tile = in_group / tokens;
  return {entry.first_tile + tile, in_group - tile * tokens, min_of(tokens, entry.count - tile * tokens)};
}

// Deals rows to the blocks of a rank in turn, `kRun` neighbours each, and visits those of `block`: visit(place of the first, how many), all
// in one tile.
template <uint32 kRun, class Config, class Visit>
MEGAMOE_HOST_DEVICE void for_each_run(const GroupTable<Config>& table, uint32 num_rows, uint32 block, uint32 num_blocks, Visit visit) {
  for (uint32 row = block * kRun; row < num_rows;) {
    const RowPlace place = place_of(row, table);
    const uint32 count = min_of(kRun - row % kRun, min_of(num_rows - row, place.num_rows - place.idx));
    visit(place, count);
    row += count;
    if (row % kRun == 0) row += (num_blocks - 1) * kRun;
  }
}

// A walk over the bands. Starts before the first one.
template <class Config>
struct BandWalk {
  const GroupTable<Config>& table;
  const MoeStreamShape& shape;
  uint32 group = ~0u;           // of the band
  uint32 end_of_group = 0;      // its last tile and one
  uint32 first = 0, count = 0;  // tiles of the band; none before the first band and after the last

  MEGAMOE_HOST_DEVICE uint32 end() const { return first + count; }
  MEGAMOE_HOST_DEVICE bool next() {
    first = end();
    count = 0;
    if (first == end_of_group && !enter_group()) return false;
    count = min_of(shape.band_tiles, end_of_group - first);
    return true;
  }

 private:
  // Most often the next group has tiles. A search each time, for 8 bands from one task of a block to its next, kept the weight loader until
  // every stage that it was to fill next was free (v4-flash at 128 tokens 281 us, 252 without; H200, 959a0a6).
  MEGAMOE_HOST_DEVICE bool enter_group() {
    if (first == table.num_tiles) return false;
    end_of_group = table.end_tile(++group);
    if (end_of_group == first) end_of_group = table.end_tile(group = table.group_of_tile(first));
    return true;
  }
};

template <class Config>
struct MoeTaskStream {
  const GroupTable<Config>& table;
  const MoeStreamShape& shape;
  BandWalk<Config> lead;                             // the last band whose linear 1 has come
  BandWalk<Config> trail;                            // the first one whose linear 2 has not
  uint32 linear = 0, group = 0, first = 0, count = 0;  // the band at the current position
  uint32 begin = 0;                                  // its first task
  bool has_lead = true;

  MEGAMOE_HOST_DEVICE MoeTaskStream(const GroupTable<Config>& table, const MoeStreamShape& shape)
      : table(table), shape(shape), lead{table, shape}, trail{table, shape} {
    trail.next();
  }

  // Task number `ticket`; false after the last. Tickets must ascend.
  MEGAMOE_HOST_DEVICE bool find(uint32 ticket, Tile& task) {
    while (ticket >= begin + num_tasks())
      if (!next_band()) return false;
    const uint32 in_band = ticket - begin, row_tile = count == 1 ? in_band : in_band / count;  // a division is 40 instructions
    const uint32 number = first + in_band - row_tile * count;
    const GroupEntry entry = table.entries[group];
    const uint32 tokens = table.tokens_per_tile(group);
    task.group = group;
    task.row_tile = row_tile;
    task.first_row = shape.ring.first_row(number);
    task.num_tokens = min_of(tokens, entry.count - (number - entry.first_tile) * tokens);
    task.token_tile_idx = entry.token_tile_idx;
    task.first_k = 0;
    task.num_k = shape.k_blocks[linear];
    task.num_contributors = 0;
    task.is_only_reader = count == 1;
    task.linear = linear;
    task.number = number;
    return true;
  }

 private:
  MEGAMOE_HOST_DEVICE uint32 num_tasks() const { return count * shape.row_tiles[linear]; }

  MEGAMOE_HOST_DEVICE bool next_band() {
    begin += num_tasks();
    const bool is_due = trail.end() + shape.lag_tiles <= lead.end();
    if (has_lead && !is_due) {
      has_lead = lead.next();
      if (has_lead) return enter(lead, 0);
    }
    const bool has_trail = enter(trail, 1);
    trail.next();
    return has_trail;
  }

  MEGAMOE_HOST_DEVICE bool enter(const BandWalk<Config>& band, uint32 of_linear) {
    linear = of_linear, group = band.group, first = band.first, count = band.count;
    return count > 0;
  }
};

}  // namespace megamoe
