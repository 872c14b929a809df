// The tiles of a grouped GEMM, in the order in which blocks take them. The only tile-index arithmetic: every role walks a TileStream.
//
// Group g has count[g] token rows from begin[g] on. Its rows are cut into token tiles of equal size, the smallest of the config's sizes that
// needs no more tiles than the largest would. Tiles are numbered group by group; inside a group token tiles run fastest, so that blocks that
// work at the same time share a weight tile through L2. Block b takes tiles b, b + gridDim, ...
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

// How the rows of x are divided. Exactly one of the pointers is set, or none for one group of all rows.
struct Grouping {
  const int32* offsets;    // [G + 1]: group g owns rows offsets[g] .. offsets[g + 1]
  const int32* bounds;     // [G, 2]: first and one past the last row of group g
  const int32* counts;     // [G]: group g owns the first counts[g] rows from g * group_stride on
  uint32 num_groups;
  uint32 num_rows;         // all rows of x; no group reaches past it
  uint32 group_stride;     // rows between groups, with counts
};

struct GroupEntry {
  uint32 begin, count;     // rows
  uint32 first_tile;       // number of tiles in the groups before
  uint32 token_tile_idx;   // which of the config's token tile sizes
};

struct Tile {
  uint32 group;
  uint32 row_tile;         // weight rows, in units of the config's tile rows
  uint32 first_row;        // of x
  uint32 num_tokens;       // rows of x that are this tile's, at least 1
  uint32 token_tile_idx;
  bool is_only_reader;     // of its weight tile, which need not stay in L2
};

template <class Config>
struct GroupTable {
  GroupEntry entries[Config::kMaxGroups];
  uint32 num_tiles;

  // Fills the table; called by all threads of the block, followed by a block barrier. `num_row_tiles` per group.
  MEGAMOE_DEVICE void build(const Grouping& grouping, uint32 num_row_tiles, uint32 thread, uint32 num_threads) {
    for (uint32 g = thread; g < grouping.num_groups; g += num_threads) entries[g] = describe(grouping, g);
    __syncthreads();
    if (thread < 32) scan(grouping.num_groups, num_row_tiles, thread);
  }

 private:
  static MEGAMOE_DEVICE GroupEntry describe(const Grouping& grouping, uint32 g) {
    uint32 begin = 0, end = grouping.num_rows;
    if (grouping.offsets != nullptr) {
      begin = grouping.offsets[g];
      end = grouping.offsets[g + 1];
    } else if (grouping.bounds != nullptr) {
      begin = grouping.bounds[2 * g];
      end = grouping.bounds[2 * g + 1];
    } else if (grouping.counts != nullptr) {
      begin = g * grouping.group_stride;
      end = begin + min_of(grouping.counts[g], grouping.group_stride);
    }
    // Values that the host could not check must not lead out of x.
    end = min_of(end, grouping.num_rows);
    const uint32 count = begin < end ? end - begin : 0;
    return {begin, count, 0, choose_token_tile(count)};
  }

  static MEGAMOE_DEVICE uint32 choose_token_tile(uint32 count) {
    const uint32 num_tiles = ceil_div(count, Config::TokenTiles::largest());
    return num_tiles == 0 ? 0 : Config::TokenTiles::index_of(ceil_div(count, num_tiles));
  }

  // Prefix sum over the groups' tiles, by one warp.
  MEGAMOE_DEVICE void scan(uint32 num_groups, uint32 num_row_tiles, uint32 lane) {
    uint32 total = 0;
    for (uint32 first = 0; first < num_groups; first += 32) {
      const uint32 g = first + lane;
      const uint32 mine = g < num_groups ? num_row_tiles * num_token_tiles(entries[g]) : 0;
      uint32 sum = mine;
#pragma unroll
      for (uint32 step = 1; step < 32; step *= 2) {
        const uint32 below = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? below : 0;
      }
      if (g < num_groups) entries[g].first_tile = total + sum - mine;
      total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) num_tiles = total;
  }

  static MEGAMOE_DEVICE uint32 num_token_tiles(const GroupEntry& entry) {
    return ceil_div(entry.count, Config::TokenTiles::at(entry.token_tile_idx));
  }
};

// One role's walk over the tiles of its block.
template <class Config>
struct TileStream {
  const GroupTable<Config>& table;
  uint32 num_groups;
  uint32 next_tile, group = 0;

  MEGAMOE_DEVICE TileStream(const GroupTable<Config>& table, uint32 num_groups)
      : table(table), num_groups(num_groups), next_tile(blockIdx.x) {}

  MEGAMOE_DEVICE bool next(Tile& tile) {
    if (next_tile >= table.num_tiles) return false;
    while (group + 1 < num_groups && next_tile >= table.entries[group + 1].first_tile) ++group;
    const GroupEntry entry = table.entries[group];
    const uint32 tokens = Config::TokenTiles::at(entry.token_tile_idx);
    const uint32 num_token_tiles = ceil_div(entry.count, tokens);
    const uint32 idx = next_tile - entry.first_tile;
    tile.group = group;
    tile.row_tile = idx / num_token_tiles;
    const uint32 first = (idx % num_token_tiles) * tokens;
    tile.first_row = entry.begin + first;
    tile.num_tokens = min_of(tokens, entry.count - first);
    tile.token_tile_idx = entry.token_tile_idx;
    tile.is_only_reader = num_token_tiles == 1;
    next_tile += gridDim.x;
    return true;
  }
};

}  // namespace megamoe
