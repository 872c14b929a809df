// The order of tasks, exhaustively for small shapes: the stream has every task once, each after those it depends on, with the rows that
// belong to it; rows are found in their tiles, and dealt to the blocks once each; so are the entries that the rows come from.
#include <map>
#include <set>
#include <tuple>

#include <megamoe/schedule/entry_chunks.cuh>

#include "tables.hpp"

namespace protocol {

struct Task {
  uint32 tile, linear, row_tile;
  bool operator<(const Task& other) const {
    return std::tie(tile, linear, row_tile) < std::tie(other.tile, other.linear, other.row_tile);
  }
};

constexpr uint32 kRowTiles[2] = {2, 3};

// The tiles by themselves, as the counts of rows say.
struct PlainTile {
  uint32 group, tokens, size_idx;
};

template <class AnyConfig>
std::vector<PlainTile> list_tiles(const std::vector<uint32>& counts) {
  using Tiles = typename AnyConfig::TokenTiles;
  std::vector<PlainTile> tiles;
  for (uint32 g = 0; g < counts.size(); ++g) {
    const uint32 number = (counts[g] + Tiles::largest() - 1) / Tiles::largest();
    uint32 idx = 0;
    while (number > 0 && Tiles::at(idx) * number < counts[g]) ++idx;
    for (uint32 left = counts[g]; left > 0; left -= tiles.back().tokens) tiles.push_back({g, std::min(left, Tiles::at(idx)), idx});
  }
  return tiles;
}

template <class AnyConfig>
void check_rows(const GroupTable<AnyConfig>& table, const std::vector<PlainTile>& tiles, uint32 step) {
  std::vector<RowPlace> places;
  for (uint32 t = 0; t < tiles.size(); ++t)
    for (uint32 i = 0; i < tiles[t].tokens; ++i) places.push_back({t, i, tiles[t].tokens});
  for (uint32 first = 0; first < step; ++first) {
    for (uint32 row = first; row < places.size(); row += step) {
      const RowPlace found = place_of(row, table), right = places[row];
      expect(found.tile == right.tile && found.idx == right.idx && found.num_rows == right.num_rows,
             "row %u is in tile %u, found in %u", row, right.tile, found.tile);
    }
  }
}

// Every row is in one run of one block, a run in one tile, and a block's come in order. Runs are as long as rows and tiles allow.
template <uint32 kRun, class AnyConfig>
void check_runs(const GroupTable<AnyConfig>& table, uint32 num_rows, uint32 num_blocks) {
  std::vector<bool> is_dealt(num_rows);
  for (uint32 block = 0; block < num_blocks; ++block) {
    uint32 next_tile = 0;
    for_each_run<kRun>(table, num_rows, block, num_blocks, [&](RowPlace place, uint32 count) {
      expect(count > 0 && count <= kRun && place.idx + count <= place.num_rows, "a run of %u rows from row %u of tile %u on", count,
             place.idx, place.tile);
      expect(place.tile >= next_tile, "tile %u after %u", place.tile, next_tile);
      const bool ends_tile = place.idx + count == place.num_rows;
      next_tile = place.tile;
      const GroupEntry& group = table.entries[table.group_of_tile(place.tile)];
      const uint32 tokens = AnyConfig::TokenTiles::at(group.token_tile_idx);
      const uint32 first = group.begin + (place.tile - group.first_tile) * tokens + place.idx;
      for (uint32 row = first; row < first + count; ++row) {
        expect(row < num_rows && row / kRun % num_blocks == block && !is_dealt[row], "block %u has row %u", block, row);
        is_dealt[row] = true;
      }
      expect(ends_tile || (first + count) % kRun == 0, "the run from row %u of tile %u on ends early", place.idx, place.tile);
    });
  }
  for (uint32 row = 0; row < num_rows; ++row) expect(is_dealt[row], "no block has row %u", row);
}

void check_task(const Tile& task, const std::vector<PlainTile>& tiles, const MoeStreamShape& shape) {
  expect(task.number < tiles.size(), "tile %u of %zu", task.number, tiles.size());
  const PlainTile& tile = tiles[task.number];
  expect(task.group == tile.group && task.num_tokens == tile.tokens && task.token_tile_idx == tile.size_idx,
         "tile %u: %u tokens instead of %u", task.number, task.num_tokens, tile.tokens);
  expect(task.first_row == task.number % shape.ring.num_slots * shape.ring.slot_rows, "tile %u begins at %u", task.number, task.first_row);
  expect(task.first_k == 0 && task.num_k == shape.k_blocks[task.linear] && task.num_contributors == 0, "tile %u: K",
         task.number);
}

// A task comes after those whose results it reads or overwrites. Every task once; `done` is those that came.
void check_order(const Task& task, const std::map<Task, uint32>& done, const MoeStreamShape& shape) {
  expect(!done.count(task), "tile %u linear %u row tile %u comes twice", task.tile, task.linear, task.row_tile);
  const bool is_first = task.linear == 0, reuses = task.tile >= shape.ring.num_slots;
  if (is_first && !reuses) return;
  const uint32 needed = is_first ? 1 : 0, tile = is_first ? task.tile - shape.ring.num_slots : task.tile;
  for (uint32 r = 0; r < shape.row_tiles[needed]; ++r)
    expect(done.count({tile, needed, r}), "linear %u of tile %u comes before linear %u of tile %u", task.linear, task.tile, needed, tile);
}

template <class AnyConfig>
void check_stream(const std::vector<uint32>& counts, uint32 band, uint32 lag, uint32 extra) {
  GroupTable<AnyConfig> table;
  build_table(table, offsets_of(counts));
  const std::vector<PlainTile> tiles = list_tiles<AnyConfig>(counts);
  expect(table.num_tiles == tiles.size(), "%u tiles instead of %zu", table.num_tiles, tiles.size());
  const MoeStreamShape shape{{kRowTiles[0], kRowTiles[1]}, {5, 7}, band, lag,
                             {lag + 2 * band - 1 + extra, AnyConfig::TokenTiles::largest()}};
  std::map<Task, uint32> done;
  std::vector<Task> tasks;
  MoeTaskStream<AnyConfig> stream(table, shape);
  Tile found;
  while (stream.find(static_cast<uint32>(tasks.size()), found)) {
    check_task(found, tiles, shape);
    const Task task{found.number, found.linear, found.row_tile};
    check_order(task, done, shape);
    done[task] = static_cast<uint32>(tasks.size());
    tasks.push_back(task);
  }
  expect(tasks.size() == tiles.size() * (kRowTiles[0] + kRowTiles[1]), "%zu tasks of %zu tiles", tasks.size(), tiles.size());
  // Blocks skip the tickets of others.
  for (uint32 step = 2; step <= 5; step += 3)
    for (uint32 first = 0; first < step; ++first) {
      MoeTaskStream<AnyConfig> skipping(table, shape);
      uint32 ticket = first;
      for (; skipping.find(ticket, found); ticket += step)
        expect(ticket < tasks.size() && tasks[ticket].tile == found.number && tasks[ticket].linear == found.linear &&
                   tasks[ticket].row_tile == found.row_tile,
               "ticket %u means another task after skipped ones", ticket);
      expect(ticket >= tasks.size(), "ticket %u of %zu is no task", ticket, tasks.size());
    }
  check_rows(table, tiles, 1 + extra);
  const uint32 num_rows = offsets_of(counts).back();
  check_runs<1>(table, num_rows, 1 + extra);
  check_runs<2>(table, num_rows, 1 + extra);
  check_runs<4>(table, num_rows, 1 + extra);
}

template <uint32 kRanks, uint32 kChunks>
struct ChunkConfig {
  static constexpr uint32 kNumRanks = kRanks, kNumChunks = kChunks, kChunkEntries = 5;
};

// Every rank looks at every chunk of all ranks once, its own first; at no place in the order do two ranks look at the same one.
template <uint32 kRanks, uint32 kChunks>
void check_entry_chunks() {
  using Chunks = ChunkConfig<kRanks, kChunks>;
  for (uint32 rank = 0; rank < kRanks; ++rank) {
    std::set<std::pair<uint32, uint32>> seen;
    for (uint32 block = 0; block < kRanks * kChunks; ++block) {
      const EntryChunk chunk = entry_chunk<Chunks>(block, rank);
      expect(chunk.src < kRanks && chunk.first % 5 == 0 && chunk.first < 5 * kChunks, "rank %u, entry %u", chunk.src, chunk.first);
      expect(block >= kChunks || chunk.src == rank, "rank %u begins with rank %u", rank, chunk.src);
      expect(seen.insert({chunk.src, chunk.first}).second, "entry %u of rank %u comes twice", chunk.first, chunk.src);
      for (uint32 other = 0; other < rank; ++other)
        expect(entry_chunk<Chunks>(block, other).src != chunk.src, "ranks %u and %u look at rank %u together", other, rank, chunk.src);
    }
  }
}

template <uint32... kSizes>
uint64 check_all() {
  uint64 number = 0;
  for_all_counts(3, 9, [&](const std::vector<uint32>& counts) {
    for (uint32 band = 1; band <= 3; ++band)
      for (uint32 lag = 0; lag <= 4; ++lag, ++number) check_stream<TileConfig<kSizes...>>(counts, band, lag, number % 3);
  });
  return number;
}

}  // namespace protocol

void megamoe::machine::observe(const void*, Scope) {}

int main() {
  protocol::check_entry_chunks<1, 3>();
  protocol::check_entry_chunks<4, 1>();
  protocol::check_entry_chunks<3, 2>();
  const unsigned long long number = protocol::check_all<1>() + protocol::check_all<2>() + protocol::check_all<1, 2>();
  std::printf("ok: %llu shapes\n", number);
}
