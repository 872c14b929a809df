// moe_combine: tells every rank that its inputs are read and its partials pushed, waits for the same from all, and sums the slots.
//
// y[t] = partials[t, 0] + partials[t, 1] + ... in FP32, in slot order; slots that name no expert are skipped. A call that has failed still
// tells, so that no rank waits for it at the end of the call, and gives NaN.
#pragma once

#include <megamoe/roles/sum_slots.cuh>
#include <megamoe/sync/peer_wait.cuh>

namespace megamoe {

struct MoeCombineParams {
  Symm symm;
  CallStateParams calls;
  Bf16* y;  // [T, H]
  uint32 num_tokens;
};

// Whether the call succeeds, for all threads. Block 0 posts before it waits, so it does not depend on other blocks having a place to run.
// Ranks that gave up post combine_ready too, after the abort word of the one that saw the reason first: a rank that comes late finds every
// signal of the call there and must not take their partials for results.
template <class Layout>
MEGAMOE_DEVICE bool meet_peers(const MoeCombineParams& p) {
  const CallWatch<Layout> watch{p.symm, p.calls, p.calls.epoch(), CallPhase::kCombine};
  bool is_good = !p.calls.is_failed(watch.epoch);
  if (blockIdx.x == 0) post_to_peers<&Layout::combine_ready>(p.symm, watch.epoch);
  if (is_good && threadIdx.x < p.symm.num_ranks)
    is_good = watch.template wait_for_peer<&Layout::combine_ready>(threadIdx.x) && !watch.has_aborted(threadIdx.x);
  return __syncthreads_and(is_good);
}

// Grid: any number of blocks of at least Symm::kMaxRanks threads. One thread makes 32 bytes of y at once.
template <class Layout, class Config>
MEGAMOE_DEVICE void moe_combine(const MoeCombineParams& p) {
  const bool is_good = meet_peers<Layout>(p);
  sum_tokens<Layout, Config, 8>(p.symm, p.y, p.num_tokens, is_good, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

}  // namespace megamoe
