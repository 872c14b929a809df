// Math warpgroup of mega_moe: 64 weight rows of every task of either linear, from the sums over K to the end of the epilogue, which the
// publisher hears of.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>
#include <megamoe/roles/gemm_accumulate.cuh>
#include <megamoe/roles/gemm_schedule.cuh>
#include <megamoe/roles/store_epilogue.cuh>
#include <megamoe/roles/swiglu_epilogue.cuh>

namespace megamoe {

// A warpgroup's walk over its tasks.
template <class Config>
struct TaskWalk {
  const MegaMoeParams& p;
  StageReader<Config> reader;
  TileReader tiles;
  Timeline<Config::kTimeline>& timeline;
  uint32 done;    // shared address of DoneBarriers
  Tile task;      // the current one

  MEGAMOE_DEVICE void next() { task = tiles.next(); }
  // With the task so many before the one that next() would read. Behind a barrier of the warpgroup, by one thread.
  MEGAMOE_DEVICE void say_done(uint32 num_before) const {
    ptx::mbarrier_arrive(DoneBarriers::of(done, (tiles.pipe.stage + kTileSlots - num_before) % kTileSlots));
  }
  MEGAMOE_DEVICE bool is_valid() const { return task.num_tokens > 0; }
  MEGAMOE_DEVICE const Fp4GemmParams& linear() const { return p.linear[task.linear]; }
  MEGAMOE_DEVICE uint32 row_block() const { return task.row_tile * Config::kMathWarpgroups + reader.warpgroup; }
  MEGAMOE_DEVICE bool has_rows() const { return row_block() < linear().num_row_blocks; }
  MEGAMOE_DEVICE bool takes(uint32 token_tile_idx) const { return is_valid() && task.token_tile_idx == token_tile_idx && has_rows(); }
};

// What a task computed goes to the pool or to the source ranks.
template <class Config, uint32 kTokens>
MEGAMOE_DEVICE void finish_task(float (&totals)[kTokens / 2], const MegaMoeParams& p, const EpilogueTile& where, uint32 linear, uint32 base,
                                uint32 warpgroup) {
  if (linear == 0)
    swiglu_epilogue<Config, kTokens>(totals, p.linear[0], where, base, warpgroup);
  else
    store_epilogue<Config, kTokens>(totals, p.linear[1], where, base, warpgroup);
  ptx::barrier_sync<128>(kEpilogueBarrier + warpgroup);
}

// Computes tasks as long as their tiles have this size. The first block of the next task is expanded before the epilogue if it is there by
// then. It must not be waited for: it may depend on what this epilogue leaves to be published, or on another block that waits in the same
// way.
template <class Config, uint32 kIdx>
MEGAMOE_DEVICE void compute_tasks(TaskWalk<Config>& walk) {
  constexpr uint32 kTokens = Config::TokenTiles::at(kIdx);
  Accumulator<Config, kTokens> accumulator;
  accumulator.begin(walk.reader);
  walk.timeline.mark(SpanKind::kStageWait, walk.task);
  bool has_next = true;
#pragma unroll 1
  while (has_next) {
    const EpilogueTile where(walk.linear(), walk.task, walk.row_block());
    const TokenValues<Config> values(walk.reader.base, walk.reader.warpgroup);
    if (walk.task.linear == 0)
      where.template fetch_weights<kTokens>(walk.p.linear[0], values.weights());
    else
      fetch_store_inputs<Config, kTokens>(walk.p.linear[1], where, values);
    accumulator.run(walk.reader, walk.task.num_k);
    walk.timeline.mark(SpanKind::kMainLoop, walk.task);
    const uint32 linear = walk.task.linear, number = walk.task.number;
    walk.next();
    has_next = walk.takes(kIdx);
    const bool begins_now = has_next && walk.reader.is_ready();
    if (begins_now) accumulator.begin(walk.reader);
    finish_task<Config, kTokens>(accumulator.totals, walk.p, where, linear, walk.reader.base, walk.reader.warpgroup);
    if (where.thread() == 0) walk.say_done(2);
    walk.timeline.mark(SpanKind::kEpilogue, number, where.row_block / Config::kMathWarpgroups, linear);
    if (has_next && !begins_now) {
      accumulator.begin(walk.reader);
      walk.timeline.mark(SpanKind::kStageWait, walk.task);
    }
  }
}

// Each token tile size is a function of its own: an accumulator array shared between sizes would live in local memory.
template <class Config, uint32 kIdx = 0>
MEGAMOE_DEVICE void dispatch_tasks(TaskWalk<Config>& walk) {
  if constexpr (kIdx + 1 == Config::TokenTiles::kCount) {
    compute_tasks<Config, kIdx>(walk);
  } else {
    if (walk.task.token_tile_idx == kIdx)
      compute_tasks<Config, kIdx>(walk);
    else
      dispatch_tasks<Config, kIdx + 1>(walk);
  }
}

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_math(const MegaBlock<Layout, Config>& block, TileReader tiles, uint32 warpgroup,
                              Timeline<Config::kTimeline>& timeline) {
  const StagePipeline<Config> ring(block.base + SmemPlan<Config>::kBarriers);
  const StageReader<Config> reader(ring, block.base, warpgroup);
  TaskWalk<Config> walk{block.p, reader, tiles, timeline, block.base + MegaSmemPlan<Config>::kDone};
  walk.next();
#pragma unroll 1
  while (walk.is_valid()) {
    if (walk.has_rows()) {
      dispatch_tasks<Config>(walk);
    } else {
      skip_tile<Config>(walk.reader, walk.task.num_k);
      timeline.mark(SpanKind::kSkippedTask, walk.task);
      if (threadIdx.x % 128 == 0) walk.say_done(1);
      walk.next();
    }
  }
}

}  // namespace megamoe
