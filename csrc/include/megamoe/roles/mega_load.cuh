// Loaders of mega_moe. One thread claims the block's tasks, hands them to the other roles and streams their weights; another one streams
// their tokens once the rows are there. So weights are on their way while tokens are still awaited.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>
#include <megamoe/roles/gemm_load.cuh>

namespace megamoe {

// The next task is claimed and handed over when so many blocks of K of the current one are left to load: early enough that neither the
// atomic's way to L2 nor the search is between two tasks, where math waited 1 to 4 us for them (H200, 2026-11-21); late enough not to keep
// a task from a block that is idle.
constexpr uint32 kClaimAhead = 10, kHandOverAhead = 4;

// Hands the block's tasks over to its roles.
template <class Config>
struct TaskFeed {
  const CallEnd& end;
  MoeTaskStream<Config> stream;
  Tile* slots;
  TilePipeline pipe;
  uint32 ticket;

  MEGAMOE_DEVICE void claim() { ticket = end.claim(); }
  // Returns the task; without tokens it is the end. It stays in its slot until kTileSlots - 1 more have been handed over.
  MEGAMOE_DEVICE const Tile* hand_over() {
    Tile tile;
    if (!stream.find(ticket, tile)) tile.num_tokens = 0;
    pipe.acquire();
    Tile* slot = slots + pipe.stage;
    *slot = tile;
    pipe.publish();
    pipe.advance();
    return slot;
  }
};

// Streams the weights of a task for blocks [begin, end) of its K.
template <class Config>
MEGAMOE_DEVICE void stream_weights(const Fp4GemmParams& linear, const Tile& tile, uint32 begin, uint32 end, uint32 base,
                                   Pipeline<Config::kStages>& pipe) {
  using Plan = SmemPlan<Config>;
  const WeightTile<Config> weights(linear, tile);
  const uint64 policy = tile.is_only_reader ? ptx::policy_evict_first() : ptx::policy_evict_normal();
#pragma unroll 1
  for (uint32 k = begin; k < end; ++k, pipe.advance()) {
    pipe.acquire(Plan::kWeightBytes);
    weights.load(k, base + pipe.stage * Plan::kStageBytes, pipe.full(), policy);
  }
}

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_load_weights(const MegaBlock<Layout, Config>& block, Tile* slots, TilePipeline tiles) {
  Pipeline<Config::kStages> pipe(block.base + SmemPlan<Config>::kBarriers);
  TaskFeed<Config> feed{block.p.end, MoeTaskStream<Config>(block.table, block.p.stream), slots, tiles};
  auto timeline = block.timeline(kWeightsLane, true);
  feed.claim();
  const Tile* task = feed.hand_over();
  while (task->num_tokens > 0) {
    const Tile* next = nullptr;
    timeline.begin();
    // One copy of the loop, and all it needs read from the slot again: a search among live loop variables would not fit the registers.
#pragma unroll 1
    for (uint32 part = 0, k = 0; part < 3; ++part) {
      const uint32 left = part == 0 ? kClaimAhead : part == 1 ? kHandOverAhead : 0, until = task->num_k > left ? task->num_k - left : 0;
      stream_weights<Config>(block.p.linear[task->linear], *task, k, until, block.base, pipe);
      k = until;
      if (part == 0) feed.claim();
      if (part == 1) next = feed.hand_over();
    }
    timeline.mark(SpanKind::kWeights, *task);
    task = next;
  }
}

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_load_tokens(const MegaBlock<Layout, Config>& block, TileReader tiles) {
  using Plan = SmemPlan<Config>;
  const MegaMoeParams& p = block.p;
  const CallWatch<Layout> watch = block.watch(CallPhase::kExperts);
  Pipeline<Config::kStages> pipe(block.base + Plan::kBarriers);
  auto timeline = block.timeline(kTokensLane, true);
  for (Tile tile = tiles.next(); tile.num_tokens > 0; tile = tiles.next()) {
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
