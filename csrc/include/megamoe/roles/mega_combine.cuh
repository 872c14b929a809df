// Combine: the end of a rank's call. The last math warpgroup to finish its tasks tells every rank; all of them wait for every rank, then
// sum the slots of the rank's own tokens. A call that has failed still tells, so that no rank waits for it, and gives NaN.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>
#include <megamoe/roles/sum_slots.cuh>

namespace megamoe {

template <class Layout, class Config>
MEGAMOE_DEVICE void tell_peers(const MegaBlock<Layout, Config>& block, int64 epoch, uint32 warpgroup) {
  const MegaMoeParams& p = block.p;
  const uint32 thread = threadIdx.x % 128, barrier = kEpilogueBarrier + warpgroup;
  ptx::barrier_sync<128>(barrier);
  if (!ptx::barrier_any<128>(barrier, thread == 0 && p.end.finish())) return;
  if (thread < p.symm.num_ranks) post_to_peer<&Layout::combine_ready>(p.symm, thread, epoch);
  p.flow.clear(thread, 128);
  if (thread == 0) p.end.clear();
}

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
MEGAMOE_DEVICE void mega_combine(const MegaBlock<Layout, Config>& block, uint32 warpgroup, Timeline<Config::kTimeline>& timeline) {
  constexpr uint32 kVectors = Config::kHidden / 8, kThreads = Config::kMathWarpgroups * 128, kNan = 0x7fc07fc0;
  static_assert(kThreads >= Symm::kMaxRanks && 128 >= Symm::kMaxRanks);
  const MegaMoeParams& p = block.p;
  const CallWatch<Layout> watch = block.watch(CallPhase::kCombine);
  tell_peers(block, watch.epoch, warpgroup);
  const bool is_good = meet_peers(block, watch);
  timeline.mark(SpanKind::kMeetPeers);
  const uint64 num_vectors = uint64(p.num_tokens) * kVectors;
  for (uint64 i = uint64(block.idx) * kThreads + threadIdx.x; i < num_vectors; i += uint64(p.num_blocks) * kThreads) {
    const uint32 token = i / kVectors, vector = i % kVectors;
    reinterpret_cast<uint4*>(p.y)[i] = is_good ? sum_of_slots<Layout, Config>(p.symm, token, vector) : make_uint4(kNan, kNan, kNan, kNan);
  }
  timeline.mark(SpanKind::kSumSlots);
}

}  // namespace megamoe
