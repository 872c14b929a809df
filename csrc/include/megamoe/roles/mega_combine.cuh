// Combine: math warps without a task left wait until every rank has said that its partials are out (roles/mega_publish.cuh), then sum the
// slots of the rank's own tokens. A call that has failed still says so, so that no rank waits for it, and gives NaN.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>
#include <megamoe/roles/sum_slots.cuh>

namespace megamoe {

// Whether every rank's partials are here, for all math threads. Ranks that gave up tell too, after the abort word of the one that saw the
// reason first: a rank that comes late finds every signal of the call there and must not take their partials for results.
template <class Layout, class Config>
MEGAMOE_DEVICE bool meet_peers(const MegaBlock<Layout, Config>& block, const CallWatch<Layout>& watch) {
  const MegaMoeParams& p = block.p;
  bool is_good = true;
  if (threadIdx.x < p.symm.num_ranks) {
    is_good = !p.calls.is_failed(watch.epoch) && watch.template wait_for_peer<&Layout::combine_ready>(threadIdx.x) &&
              !watch.has_aborted(threadIdx.x);
    is_good = is_good && !p.calls.is_failed(watch.epoch);  // perhaps since the look above: no abort word tells a rank of its own failure
  }
  return ptx::barrier_all<Config::kMathWarpgroups * 128>(kMathBarrier, is_good);
}

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_combine(const MegaBlock<Layout, Config>& block, Timeline<Config::kTimeline>& timeline) {
  constexpr uint32 kThreads = Config::kMathWarpgroups * 128;
  constexpr uint32 kMostHeld = Config::kMathRegisters < 128 ? 6 : 8;  // more would spill
  static_assert(kThreads >= Symm::kMaxRanks);
  const MegaMoeParams& p = block.p;
  const bool is_good = meet_peers(block, block.watch(CallPhase::kCombine));
  timeline.mark(SpanKind::kMeetPeers);
  sum_tokens<Layout, Config, kMostHeld>(p.symm, p.y, p.num_tokens, is_good, block.idx * kThreads + threadIdx.x, p.num_blocks * kThreads);
  timeline.mark(SpanKind::kSumSlots);
}

}  // namespace megamoe
