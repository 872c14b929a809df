// GroupTable: the groups of a grouped GEMM, their rows, and the token tiles that these are cut into.
//
// Group g has count[g] token rows from begin[g] on, cut into token tiles of equal size: the smallest of the config's sizes that needs no
// more tiles than the largest would.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

// How the rows of x are divided. One of the pointers is set, or none for one group of all rows.
struct Grouping {
  const int32* offsets;    // [G + 1]: group g owns rows offsets[g] .. offsets[g + 1]
  const int32* bounds;     // [G, 2]: first and one past the last row of group g
  const int32* counts;     // [G]: group g owns the first counts[g] rows from g * group_stride on
  uint32 num_groups;
  uint32 num_rows;         // all rows of x; no group reaches past it
  uint32 group_stride;     // rows between groups, with counts
};

struct alignas(16) GroupEntry {
  uint32 begin, count;     // rows
  uint32 first_tile;       // number of tiles in the groups before
  uint32 token_tile_idx;   // which of the config's token tile sizes
};

template <class Config>
struct GroupTable {
  GroupEntry entries[Config::kMaxGroups];
  uint32 num_groups, num_tiles;

  MEGAMOE_HOST_DEVICE uint32 tokens_per_tile(uint32 g) const { return Config::TokenTiles::at(entries[g].token_tile_idx); }
  MEGAMOE_HOST_DEVICE uint32 num_token_tiles(uint32 g) const { return ceil_div(entries[g].count, tokens_per_tile(g)); }
  MEGAMOE_HOST_DEVICE uint32 end_tile(uint32 g) const { return g + 1 < num_groups ? entries[g + 1].first_tile : num_tiles; }

  // The group of a tile, or of a row if rows are grouped by offsets. A scan from one group to the next made math wait 23 to 35 us for each
  // of its first tasks where 6 of 384 groups have rows (H200, 14421e3).
  MEGAMOE_HOST_DEVICE uint32 group_of_tile(uint32 tile) const { return last_not_beyond<&GroupEntry::first_tile>(tile); }
  MEGAMOE_HOST_DEVICE uint32 group_of_row(uint32 row) const { return last_not_beyond<&GroupEntry::begin>(row); }

  // All of entry g but its first tile.
  MEGAMOE_HOST_DEVICE void describe(const Grouping& grouping, uint32 g) {
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
    const uint32 num_tiles = ceil_div(count, Config::TokenTiles::largest());
    entries[g] = {begin, count, 0, num_tiles == 0 ? 0 : Config::TokenTiles::index_of(ceil_div(count, num_tiles))};
  }

#ifdef __CUDACC__
  // Fills the table; called by all threads of the block, followed by a block barrier. `num_row_tiles` per group.
  MEGAMOE_DEVICE void build(const Grouping& grouping, uint32 num_row_tiles, uint32 thread, uint32 num_threads) {
    for (uint32 g = thread; g < grouping.num_groups; g += num_threads) describe(grouping, g);
    __syncthreads();
    if (thread < 32) scan(grouping.num_groups, num_row_tiles, thread);
  }
#endif

 private:
  // The last group whose `kFirst` is at most `value`. Groups without rows begin where the next one does, so it is never one of those.
  template <uint32 GroupEntry::*kFirst>
  MEGAMOE_HOST_DEVICE uint32 last_not_beyond(uint32 value) const {
    uint32 found = 0, beyond = num_groups;
    while (found + 1 < beyond) {
      const uint32 middle = (found + beyond) / 2;
      if (entries[middle].*kFirst <= value)
        found = middle;
      else
        beyond = middle;
    }
    return found;
  }

#ifdef __CUDACC__
  // Prefix sum over the groups' tiles, by one warp.
  MEGAMOE_DEVICE void scan(uint32 count, uint32 num_row_tiles, uint32 lane) {
    uint32 total = 0;
    for (uint32 first = 0; first < count; first += 32) {
      const uint32 g = first + lane;
      const uint32 mine = g < count ? num_row_tiles * num_token_tiles(g) : 0;
      uint32 sum = mine;
#pragma unroll
      for (uint32 step = 1; step < 32; step *= 2) {
        const uint32 below = __shfl_up_sync(~0u, sum, step);
        sum += lane >= step ? below : 0;
      }
      if (g < count) entries[g].first_tile = total + sum - mine;
      total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) num_groups = count, num_tiles = total;
  }
#endif
};

}  // namespace megamoe
