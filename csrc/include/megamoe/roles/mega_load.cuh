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

// The tickets of a cluster, whose first block claims them: it leaves each in a word of the others' shared memory.
template <class Config>
struct ClusterTickets {
  using Plan = MegaSmemPlan<Config>;
  uint32 base;
  typename Plan::TicketPipeline pipe;

  MEGAMOE_DEVICE explicit ClusterTickets(uint32 base) : base(base), pipe(base + Plan::kTicketBarriers) {}

  // Returns the ticket that the first block passes in.
  MEGAMOE_DEVICE uint32 share(uint32 ticket) {
    if (ptx::cluster_rank() == 0) {
      pipe.acquire();
      for (uint32 rank = 1; rank < Config::kClusterBlocks; ++rank)
        ptx::st_async_cluster(ptx::map_shared(base + Plan::kTicket, rank), ticket, ptx::map_shared(pipe.full(), rank));
    } else {
      ptx::mbarrier_arrive_expect_bytes(pipe.full(), sizeof(ticket));
      pipe.wait_full();
      ticket = ptx::ld_shared_32(base + Plan::kTicket);
      ptx::mbarrier_arrive_cluster(ptx::map_shared(pipe.empty(), 0));
    }
    pipe.advance();
    return ticket;
  }
};

// Hands the block's tasks over to its roles. A task of a cluster is a row tile for each of its blocks.
template <class Config>
struct TaskFeed {
  static constexpr bool kIsCluster = Config::kClusterBlocks > 1;
  const CallEnd& end;
  MoeTaskStream<Config> stream;
  Tile* slots;
  TilePipeline pipe;
  ClusterTickets<Config> tickets;
  uint32 ticket;

  MEGAMOE_DEVICE void claim() {
    if (!kIsCluster || ptx::cluster_rank() == 0) ticket = end.claim();
  }
  // Returns the task; without tokens it is the end. It stays in its slot until kTileSlots - 1 more have been handed over.
  MEGAMOE_DEVICE const Tile* hand_over() {
    Tile tile;
    if constexpr (kIsCluster) ticket = tickets.share(ticket);
    if (!stream.find(ticket, tile)) tile.num_tokens = 0;
    if constexpr (kIsCluster) tile.row_tile = tile.row_tile * Config::kClusterBlocks + ptx::cluster_rank();
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
                                   StagePipeline<Config>& pipe) {
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
  StagePipeline<Config> pipe(block.base + SmemPlan<Config>::kBarriers);
  TaskFeed<Config> feed{block.p.end, MoeTaskStream<Config>(block.table, block.p.stream), slots, tiles,
                        ClusterTickets<Config>(block.base)};
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

// Brings the tokens of a tile, or this block's part of them to all blocks of its cluster.
template <class Config>
struct TokenTile {
  const ptx::TensorMap* map;
  uint32 first_row, offset, num_bytes;  // of the whole tile

  MEGAMOE_DEVICE TokenTile(const Fp4GemmParams& p, const Tile& tile) {
    const uint32 num_tokens = Config::TokenTiles::at(tile.token_tile_idx);
    const uint32 rank = Config::kClusterBlocks > 1 ? ptx::cluster_rank() : 0, first = first_token_of<Config>(rank, num_tokens);
    map = &p.x_maps[tile.token_tile_idx * Config::kClusterBlocks + rank];
    first_row = tile.first_row + first;
    offset = SmemPlan<Config>::kTokensOffset + first * sm90::WeightUnit::kK;
    num_bytes = num_tokens * sm90::WeightUnit::kK;
  }

  MEGAMOE_DEVICE void load(uint32 k, uint32 stage, uint32 full) const {
    constexpr uint32 kK = sm90::WeightUnit::kK, kAllBlocks = (1 << Config::kClusterBlocks) - 1;
    if constexpr (Config::kClusterBlocks == 1)
      ptx::tensor_load_2d(stage + offset, map, k * kK, first_row, full);
    else
      ptx::tensor_load_2d_multicast(stage + offset, map, k * kK, first_row, full, kAllBlocks);
  }
};

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_load_tokens(const MegaBlock<Layout, Config>& block, TileReader tiles) {
  using Plan = SmemPlan<Config>;
  const MegaMoeParams& p = block.p;
  const CallWatch<Layout> watch = block.watch(CallPhase::kExperts);
  StagePipeline<Config> pipe(block.base + Plan::kBarriers);
  auto timeline = block.timeline(kTokensLane, true);
  for (Tile tile = tiles.next(); tile.num_tokens > 0; tile = tiles.next()) {
    timeline.begin();
    if (tile.linear == 0)
      p.flow.wait_pulled(tile.number, watch);
    else
      p.flow.wait_folded(tile.number, watch);
    timeline.mark(SpanKind::kTokensWait, tile);
    ptx::fence_proxy_async_global();
    const TokenTile<Config> tokens(p.linear[tile.linear], tile);
    for (uint32 k = 0; k < tile.num_k; ++k, pipe.advance()) {
      pipe.acquire(tokens.num_bytes);  // of the whole tile, whichever block brings them
      tokens.load(k, block.base + pipe.stage * Plan::kStageBytes, pipe.full());
    }
    timeline.mark(SpanKind::kTokens, tile);
  }
}

}  // namespace megamoe
