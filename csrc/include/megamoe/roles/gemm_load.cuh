// Loader: one thread streams the weight units and token tiles of its block's tiles into the ring. It runs ahead across tiles.
#pragma once

#include <megamoe/roles/gemm_schedule.cuh>

namespace megamoe {

// The weight units of a tile: one run along K per row block.
template <class Config>
struct WeightUnits {
  static constexpr uint32 kBytes = sm90::WeightUnit::kBytes;
  const uint8* first;      // of the tile's first row block, at the beginning of K
  uint32 row_block_bytes;  // 64 rows over all of K
  uint32 num_row_blocks;   // of the tile

  MEGAMOE_DEVICE WeightUnits(const Fp4GemmParams& p, uint32 group, uint32 row_block, uint32 num_k_blocks)
      : row_block_bytes(num_k_blocks * kBytes), num_row_blocks(min_of(Config::kMathWarpgroups, p.num_row_blocks - row_block)) {
    first = p.w_blocks + (uint64(group) * p.num_row_blocks + row_block) * row_block_bytes;
  }

  // Those of one block of K, of which `from` is the first, to a stage.
  MEGAMOE_DEVICE void load(const uint8* from, uint32 stage, uint32 full, uint64 policy) const {
#pragma unroll
    for (uint32 i = 0; i < Config::kMathWarpgroups; ++i)
      if (i < num_row_blocks) ptx::bulk_load(stage + i * kBytes, from + i * row_block_bytes, kBytes, full, policy);
  }
};

// By one elected thread (ptx::elect_one), for which a copy is an instruction and not a loop over lanes.
template <class Config>
MEGAMOE_DEVICE void gemm_load(const Fp4GemmParams& p, TileReader tiles, uint32 base) {
  using Plan = SmemPlan<Config>;
  Pipeline<Config::kStages> pipe(base + Plan::kBarriers);
  const uint64 streaming = ptx::policy_evict_first(), reused = ptx::policy_evict_normal();
  for (Tile tile = tiles.next_alone(); tile.num_tokens > 0; tile = tiles.next_alone()) {
    const WeightUnits<Config> units(p, tile.group, tile.row_tile * Config::kMathWarpgroups, p.num_k_blocks);
    const uint64 policy = tile.is_only_reader ? streaming : reused;
    const uint32 num_bytes = units.num_row_blocks * units.kBytes + Config::TokenTiles::at(tile.token_tile_idx) * sm90::WeightUnit::kK;
    const ptx::TensorMap* x_map = &p.x_maps[tile.token_tile_idx];
    const uint8* weights = units.first + tile.first_k * units.kBytes;
    for (uint32 k = tile.first_k; k < tile.first_k + tile.num_k; ++k, pipe.advance(), weights += units.kBytes) {
      pipe.acquire(num_bytes);
      const uint32 stage = base + pipe.stage * Plan::kStageBytes;
      units.load(weights, stage, pipe.full(), policy);
      ptx::tensor_load_2d(stage + Plan::kTokensOffset, x_map, k * sm90::WeightUnit::kK, tile.first_row, pipe.full());
    }
  }
}

}  // namespace megamoe
