// Loaders of mega_moe. One thread claims the block's tasks, hands them to the other roles and streams their weights; another one streams
// their tokens once the rows are there. So weights are on their way while tokens are still awaited.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>
#include <megamoe/roles/gemm_schedule.cuh>

namespace megamoe {

// The next task is claimed when so many blocks of K of the current one are left to load: early enough to hide the atomic's way to L2 and
// back, late enough not to keep a task from a block that is idle.
constexpr uint32 kClaimAhead = 4;

// Streams the weights of one task; returns the number of the block's next task.
template <class Config>
MEGAMOE_DEVICE uint32 load_task_weights(const MegaMoeParams& p, const Tile& tile, uint32 base, Pipeline<Config::kStages>& pipe) {
  constexpr uint32 kUnitBytes = sm90::WeightUnit::kBytes;
  const Fp4GemmParams& linear = p.linear[tile.linear];
  const uint32 first_block = tile.row_tile * Config::kMathWarpgroups;
  const uint32 num_blocks = min_of(Config::kMathWarpgroups, linear.num_row_blocks - first_block);
  const uint64 row_block_bytes = uint64(tile.num_k) * kUnitBytes;
  const uint8* weights = linear.w_blocks + (uint64(tile.group) * linear.num_row_blocks + first_block) * row_block_bytes;
  const uint64 policy = tile.is_only_reader ? ptx::policy_evict_first() : ptx::policy_evict_normal();
  const uint32 claim_at = tile.num_k > kClaimAhead ? tile.num_k - kClaimAhead : 0;
  uint32 next = 0;
  for (uint32 k = 0; k < tile.num_k; ++k, pipe.advance(), weights += kUnitBytes) {
    if (k == claim_at) next = p.end.claim();
    pipe.acquire(num_blocks * kUnitBytes);
    const uint32 stage = base + pipe.stage * SmemPlan<Config>::kStageBytes;
#pragma unroll
    for (uint32 i = 0; i < Config::kMathWarpgroups; ++i)
      if (i < num_blocks) ptx::bulk_load(stage + i * kUnitBytes, weights + i * row_block_bytes, kUnitBytes, pipe.full(), policy);
  }
  return next;
}

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_load_weights(const MegaBlock<Layout, Config>& block, Tile* slots, TilePipeline tiles) {
  Pipeline<Config::kStages> pipe(block.base + SmemPlan<Config>::kBarriers);
  MoeTaskStream<Config> stream(block.table, block.p.stream);
  auto timeline = block.timeline(kWeightsLane, true);
  uint32 ticket = block.p.end.claim();
  for (bool is_valid = true; is_valid; tiles.advance()) {
    Tile tile;
    is_valid = stream.find(ticket, tile);
    if (!is_valid) tile.num_tokens = 0;  // the end
    tiles.acquire();
    slots[tiles.stage] = tile;
    tiles.publish();
    if (is_valid) {
      timeline.begin();
      ticket = load_task_weights<Config>(block.p, tile, block.base, pipe);
      timeline.mark(SpanKind::kWeights, tile);
    }
  }
}

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_load_tokens(const MegaBlock<Layout, Config>& block, TileReader tiles) {
  using Plan = SmemPlan<Config>;
  const MegaMoeParams& p = block.p;
  const CallWatch<Layout> watch = block.watch(CallPhase::kExperts);
  Pipeline<Config::kStages> pipe(block.base + Plan::kBarriers);
  auto timeline = block.timeline(kTokensLane, true);
  for (Tile tile = tiles.next_alone(); tile.num_tokens > 0; tile = tiles.next_alone()) {
    timeline.begin();
    if (tile.linear == 0)
      p.flow.wait_pulled(tile.number, watch);
    else
      p.flow.wait_folded(tile.number, watch);
    timeline.mark(SpanKind::kTokensWait, tile);
    ptx::fence_proxy_async_global();
    const ptx::TensorMap* x_map = &p.linear[tile.linear].x_maps[tile.token_tile_idx];
    const uint32 num_bytes = Config::TokenTiles::at(tile.token_tile_idx) * sm90::WeightUnit::kK;
    for (uint32 k = 0; k < tile.num_k; ++k, pipe.advance()) {
      pipe.acquire(num_bytes);
      ptx::tensor_load_2d(block.base + pipe.stage * Plan::kStageBytes + Plan::kTokensOffset, x_map, k * sm90::WeightUnit::kK,
                          tile.first_row, pipe.full());
    }
    timeline.mark(SpanKind::kTokens, tile);
  }
}

}  // namespace megamoe
