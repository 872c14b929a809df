// Loader: one thread streams the weight units and token tiles of its block's tiles into the ring. It runs ahead across tiles.
#pragma once

#include <megamoe/roles/gemm_schedule.cuh>

namespace megamoe {

// The weight units of a tile. One copy brings those of all its row blocks for a block of K; row blocks beyond the group's last arrive as
// zeros, and count as bytes. A copy per row block is 14 instructions for each, of a thread to which four math warpgroups leave few issue
// slots: mega_moe was 1 to 3 % slower with them at 64 and 128 tokens (H200, abaeee4).
template <class Config>
struct WeightTile {
  const ptx::TensorMap* map;
  uint32 row_block, group;

  MEGAMOE_DEVICE WeightTile(const Fp4GemmParams& p, const Tile& tile)
      : map(&p.w_map), row_block(tile.row_tile * Config::kMathWarpgroups), group(tile.group) {}

  MEGAMOE_DEVICE void load(uint32 k, uint32 stage, uint32 full, uint64 policy) const {
    ptx::tensor_load_4d(stage, map, 0, k * Config::kUnitMapLines, row_block, group, full, policy);
  }
};

// By one elected thread (ptx::elect_one), for which a copy is an instruction and not a loop over lanes.
template <class Config>
MEGAMOE_DEVICE void gemm_load(const Fp4GemmParams& p, TileReader tiles, uint32 base) {
  using Plan = SmemPlan<Config>;
  StagePipeline<Config> pipe(base + Plan::kBarriers);
  const uint64 streaming = ptx::policy_evict_first(), reused = ptx::policy_evict_normal();
  for (Tile tile = tiles.next(); tile.num_tokens > 0; tile = tiles.next()) {
    const WeightTile<Config> weights(p, tile);
    const uint64 policy = tile.is_only_reader ? streaming : reused;
    const uint32 num_bytes = Plan::kWeightBytes + Config::TokenTiles::at(tile.token_tile_idx) * sm90::WeightUnit::kK;
    const ptx::TensorMap* x_map = &p.x_maps[tile.token_tile_idx];
    for (uint32 k = tile.first_k; k < tile.first_k + tile.num_k; ++k, pipe.advance()) {
      pipe.acquire(num_bytes);
      const uint32 stage = base + pipe.stage * Plan::kStageBytes;
      weights.load(k, stage, pipe.full(), policy);
      ptx::tensor_load_2d(stage + Plan::kTokensOffset, x_map, k * sm90::WeightUnit::kK, tile.first_row, pipe.full());
    }
  }
}

}  // namespace megamoe
