// mega_moe: one layer of experts on one rank, from the rows of all ranks to the sums of its own tokens, in one persistent kernel.
//
// Runs behind moe_stage, moe_route and moe_assign: every rank's tokens are in its arena with one exponent each, and this rank's rows are
// ordered by expert. One block per SM, all of them resident (cooperative launch):
//
//     pull (1 warp)             rows of all ranks -> pool                        roles/mega_pull.cuh
//     schedule, load weights    tasks in stream order -> ring of tiles, stages   roles/mega_load.cuh
//     load tokens               pool -> stages                                   roles/mega_load.cuh
//     math warpgroups           linear 1 + SwiGLU -> pool, linear 2 -> the source rank's partials   roles/mega_math.cuh
//     fold (1 warp)             activated rows of the pool to one exponent       roles/mega_fold.cuh
//     publish (fold warp)       what math has finished, to the other blocks      roles/mega_publish.cuh
//     combine (math warps)      meet all ranks, sum the slots                    roles/mega_combine.cuh
//
// schedule/moe_tasks.cuh has the order of the tasks, sync/tile_flow.cuh the counters between the roles:
//
//     pull --pulled--> load tokens ==full==> math (linear 1) ==done==> publish --activated--> fold
//       ^                                                                                       |
//       |              load tokens <------------------------------------folded------------------+
//       |                   +======full==> math (linear 2) ==done==> publish --finished--+
//       +--------------------------------------------------------------------------------+
//     --x-->  counter in global memory, any block to any block          ==x==>  mbarrier inside a block
//
// With kClusterBlocks > 1 the blocks of a cluster take a task together, a row tile each, and share the copies of its tokens; the arrows into
// and out of math then go to and come from every block of the cluster (roles/mega_load.cuh).
//
// Ranks meet twice in a call: at inputs_ready (moe_stage -> moe_route) and at combine_ready (the last block of a rank -> combine).
#pragma once

#include <megamoe/comm/call_state.cuh>
#include <megamoe/comm/symm.cuh>
#include <megamoe/kernels/fp4_gemm_facts.cuh>
#include <megamoe/sync/tile_flow.cuh>
#include <megamoe/timeline.cuh>

namespace megamoe {

struct MegaMoeParams {
  Fp4GemmParams linear[2];   // over the rows of the pool; grouping: the experts' offsets in the rows of the call
  Symm symm;
  CallStateParams calls;
  MoeStreamShape stream;
  TileFlow flow;
  CallEnd end;
  const int32* row_entry;    // [R] entry of each row: src * T * K + token * K + slot, with T = max_tokens
  uint8* pool_codes;         // [P, H] E4M3, read as linear[0]'s x
  uint8* pool_sf;            // [P] UE8M0, linear[0].x_sf
  float* row_weight;         // [P], linear[0].row_weight
  int64* row_dst;            // [P], linear[1].row_dst: where each row's partial goes
  uint8* act_row_sf;         // [P] UE8M0, linear[1].x_sf; linear[0].a_codes is linear[1]'s x
  Bf16* y;                   // [num_tokens, H]
  uint32 num_tokens;         // of this rank
  uint32 num_blocks;         // of this rank
  TimelineBuffer timeline;   // unused unless Config::kTimeline
};

// One barrier per slot of the ring of tasks: all math warpgroups are done with the task. A slot is free when the task is published, so a
// barrier never has arrivals of two tasks.
struct DoneBarriers {
  static constexpr uint32 kBytes = kTileSlots * 8;
  static MEGAMOE_DEVICE uint32 of(uint32 done, uint32 slot) { return done + slot * 8; }
  static MEGAMOE_DEVICE void init(uint32 done, uint32 num_warpgroups) {
    for (uint32 slot = 0; slot < kTileSlots; ++slot) ptx::mbarrier_init(of(done, slot), num_warpgroups);
  }
};

// Shared memory: that of the GEMM, then the rows in flight between ranks, and in a cluster the ticket that its first block leaves.
template <class Config>
struct MegaSmemPlan {
  using Gemm = SmemPlan<Config>;
  using PullPipeline = Pipeline<Config::kPullBuffers>;
  using TicketPipeline = Pipeline<1>;
  static constexpr uint32 kPullBuffers = round_up(Gemm::kBytes, 128);
  static constexpr uint32 kPullBarriers = kPullBuffers + Config::kPullBuffers * Config::kHidden;
  static constexpr uint32 kDone = kPullBarriers + PullPipeline::kBarrierBytes;
  static constexpr uint32 kTicketBarriers = kDone + DoneBarriers::kBytes;  // of a cluster
  static constexpr uint32 kTicket = kTicketBarriers + TicketPipeline::kBarrierBytes;
  static constexpr uint32 kBytes = Config::kClusterBlocks > 1 ? kTicket + 8 : kTicketBarriers;
};

// What the roles of a block share.
template <class Layout, class Config>
struct MegaBlock {
  const MegaMoeParams& p;
  const GroupTable<Config>& table;
  uint32 base;         // shared address of the block's memory
  uint32 idx;          // of the block in its rank
  uint32 num_rows;     // received by the rank in this call

  MEGAMOE_DEVICE CallWatch<Layout> watch(CallPhase phase) const { return {p.symm, p.calls, p.calls.epoch(), phase}; }

  // The timeline of the calling thread.
  MEGAMOE_DEVICE Timeline<Config::kTimeline> timeline(uint32 lane, bool is_writer) const {
    return {p.timeline, idx * kNumTimelineLanes + lane, is_writer};
  }
};

}  // namespace megamoe

#include <megamoe/roles/mega_combine.cuh>
#include <megamoe/roles/mega_fold.cuh>
#include <megamoe/roles/mega_load.cuh>
#include <megamoe/roles/mega_math.cuh>
#include <megamoe/roles/mega_publish.cuh>
#include <megamoe/roles/mega_pull.cuh>

namespace megamoe {

// All threads of the cluster; of the block, where it stands alone.
template <class Config>
MEGAMOE_DEVICE void meet_cluster() {
  if constexpr (Config::kClusterBlocks > 1)
    ptx::cluster_sync();
  else
    __syncthreads();
}

// By block `idx` of the rank that `p` is for.
template <class Layout, class Config>
MEGAMOE_DEVICE void mega_moe(const MegaMoeParams& p, uint32 idx) {
  using Plan = MegaSmemPlan<Config>;
  using Gemm = SmemPlan<Config>;
  extern __shared__ __align__(1024) uint8 smem[];
  auto& table = *reinterpret_cast<GroupTable<Config>*>(smem + Gemm::kTable);
  auto* slots = reinterpret_cast<Tile*>(smem + Gemm::kTiles);
  const uint32 base = ptx::shared_address(smem);
  constexpr uint32 kMathWarps = Config::kMathWarpgroups * 4;
  const uint32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  if (threadIdx.x == kMathWarps * 32) {
    StagePipeline<Config>::init(base + Gemm::kBarriers, kMathWarps, 2);
    TilePipeline::init(base + Gemm::kTileBarriers, kMathWarps * 32 + 2);  // math, load tokens, publish
    Plan::PullPipeline::init(base + Plan::kPullBarriers, 1);
    DoneBarriers::init(base + Plan::kDone, Config::kMathWarpgroups);
    if constexpr (Config::kClusterBlocks > 1) Plan::TicketPipeline::init(base + Plan::kTicketBarriers, Config::kClusterBlocks - 1);
    ptx::fence_mbarrier_init();
  }
  table.build(p.linear[0].grouping, 1, threadIdx.x, Config::kThreads);
  meet_cluster<Config>();

  const GroupEntry last = table.entries[table.num_groups - 1];
  const MegaBlock<Layout, Config> block{p, table, base, idx, last.begin + last.count};
  const TileReader tiles{slots, TilePipeline(base + Gemm::kTileBarriers)};
  if (warp >= kMathWarps) {
    ptx::give_registers<Config::kAuxRegisters>();
    if (warp == kMathWarps && ptx::elect_one()) mega_load_weights(block, slots, tiles.pipe);
    if (warp == kMathWarps + 1 && ptx::elect_one()) mega_load_tokens(block, tiles);
    if (warp == kMathWarps + 2) mega_pull(block);
    if (warp == kMathWarps + 3) mega_fold(block, tiles);
  } else {
    ptx::take_registers<Config::kMathRegisters>();
    auto timeline = block.timeline(kMathLane + warp / 4, threadIdx.x % 128 == 0);
    mega_math(block, tiles, warp / 4, timeline);
    mega_combine(block, timeline);
  }
  if constexpr (Config::kClusterBlocks > 1) ptx::cluster_sync();  // nobody copies to or arrives in a block that has gone
}

}  // namespace megamoe
