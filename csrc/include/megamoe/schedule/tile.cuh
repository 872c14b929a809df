// Tile: one piece of work of a GEMM's blocks, as the scheduler role hands it to the others.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe {

struct alignas(16) Tile {
  static constexpr uint32 kNotOwner = ~0u;  // this block leaves its sums in the workspace

  uint32 group;
  uint32 row_tile;          // weight rows, in units of the config's tile rows
  uint32 first_row;         // of x
  uint32 num_tokens;        // rows of x that are this tile's; 0 after the last tile
  uint32 token_tile_idx;
  uint32 first_k, num_k;    // blocks of K this block computes
  uint32 num_contributors;  // the owner writes the result: blocks just before it whose sums belong to the tile, or kNotOwner
  uint32 is_only_reader;    // of its weight tile, which need not stay in L2
  uint32 linear;            // 0 or 1; always 0 in a single GEMM
  uint32 number;            // of the token tile in mega_moe
};

}  // namespace megamoe
