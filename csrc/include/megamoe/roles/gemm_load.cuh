// Loader: one thread streams the weight units and token tiles of its block's tiles into the ring. It runs ahead across tiles.
#pragma once

#include <megamoe/roles/gemm_schedule.cuh>

namespace megamoe {

template <class Config>
MEGAMOE_DEVICE void gemm_load(const Fp4GemmParams& p, TileReader tiles, uint32 base) {
  using Plan = SmemPlan<Config>;
  constexpr uint32 kUnitBytes = sm90::WeightUnit::kBytes;
  Pipeline<Config::kStages> pipe(base + Plan::kBarriers);
  const uint64 streaming = ptx::policy_evict_first(), reused = ptx::policy_evict_normal();
  for (Tile tile = tiles.next_alone(); tile.num_tokens > 0; tile = tiles.next_alone()) {
    const uint32 first_block = tile.row_tile * Config::kMathWarpgroups;
    const uint32 num_blocks = min_of(Config::kMathWarpgroups, p.num_row_blocks - first_block);
    const uint64 row_block_bytes = uint64(p.num_k_blocks) * kUnitBytes;
    const uint8* weights = p.w_blocks + (uint64(tile.group) * p.num_row_blocks + first_block) * row_block_bytes + tile.first_k * kUnitBytes;
    const uint64 policy = tile.is_only_reader ? streaming : reused;
    const uint32 num_bytes = num_blocks * kUnitBytes + Config::TokenTiles::at(tile.token_tile_idx) * sm90::WeightUnit::kK;
    const ptx::TensorMap* x_map = &p.x_maps[tile.token_tile_idx];
    for (uint32 k = tile.first_k; k < tile.first_k + tile.num_k; ++k, pipe.advance(), weights += kUnitBytes) {
      pipe.acquire(num_bytes);
      const uint32 stage = base + pipe.stage * Plan::kStageBytes;
#pragma unroll
      for (uint32 i = 0; i < Config::kMathWarpgroups; ++i)
        if (i < num_blocks) ptx::bulk_load(stage + i * kUnitBytes, weights + i * row_block_bytes, kUnitBytes, pipe.full(), policy);
      ptx::tensor_load_2d(stage + Plan::kTokensOffset, x_map, k * sm90::WeightUnit::kK, tile.first_row, pipe.full());
    }
  }
}

}  // namespace megamoe
