// Signals between ranks on the device: posting an epoch to every peer, and waiting for one with a deadline and an eye on abort words.
//
//   rank r: writes of all blocks -> arrive_last, or the end of their kernel -> post_to_peers: st.release.sys
//   rank p: wait_for_peer(r): ld.acquire.sys -> __syncthreads -> reads
#pragma once

#include <megamoe/comm/call_state.cuh>
#include <megamoe/comm/symm.cuh>
#include <megamoe/ptx/timer.cuh>

namespace megamoe {

// An abort word, as comm/abort.py writes it: epoch << 16 | reason << 8 | rank at fault.
struct AbortWord {
  static constexpr uint32 kRefused = 1, kPeerTimeout = 3;
  int64 word;

  MEGAMOE_DEVICE bool is_refusal() const { return (word >> 8 & 0xff) == kRefused; }
  // Whether a call in `epoch` must stop. A refusal concerns its own call only.
  MEGAMOE_DEVICE bool ends(int64 epoch) const { return word != 0 && (!is_refusal() || word >> 16 == epoch); }
  static MEGAMOE_DEVICE AbortWord peer_timeout(int64 epoch, uint32 culprit) { return {epoch << 16 | kPeerTimeout << 8 | culprit}; }
};

// Publishes `value`, and with it all that the posting threads have written or seen: behind a __syncthreads, what the block has. Thread r
// posts to rank r.
template <auto Signal>
MEGAMOE_DEVICE void post_to_peers(const Symm& symm, int64 value) {
  if (threadIdx.x < symm.num_ranks) ptx::st_release_sys(symm.at<Signal>(threadIdx.x, symm.rank, 0), value);
}

// Whether `sender` has told this rank to leave the call, which is then marked and reported.
template <class Layout>
MEGAMOE_DEVICE bool has_aborted(const Symm& symm, const CallStateParams& calls, int64 epoch, CallPhase phase, uint32 sender) {
  const AbortWord abort{ptx::ld_acquire_sys(symm.at<&Layout::abort>(symm.rank, sender, 0))};
  if (!abort.ends(epoch)) return false;
  calls.fail(abort.is_refusal() ? epoch : calls.kUntilReset, epoch, phase, WaitFailure::kAborted, sender, abort.word);
  return true;
}

// The last look at the abort words and the clock of a wait for `peer`: true if the wait must end, which is then reported.
template <class Layout>
MEGAMOE_DEVICE bool must_give_up(const Symm& symm, const CallStateParams& calls, int64 epoch, CallPhase phase, uint32 peer, int64 got,
                                 bool is_late) {
  if (calls.is_failed(epoch)) return true;
  for (uint32 sender = 0; sender < symm.num_ranks; ++sender)
    if (has_aborted<Layout>(symm, calls, epoch, phase, sender)) return true;
  if (!is_late) return false;
  if (calls.fail(calls.kUntilReset, epoch, phase, WaitFailure::kTimeout, peer, got)) {
    for (uint32 r = 0; r < symm.num_ranks; ++r)
      if (r != symm.rank) ptx::st_release_sys(symm.at<&Layout::abort>(r, symm.rank, 0), AbortWord::peer_timeout(epoch, peer).word);
  }
  return true;
}

// Waits until `peer` has posted at least `epoch` here; false if the call fails instead. One thread; acquires for itself.
template <class Layout, auto Signal>
MEGAMOE_DEVICE bool wait_for_peer(const Symm& symm, const CallStateParams& calls, int64 epoch, CallPhase phase, uint32 peer) {
  constexpr uint32 kPollsPerLook = 16, kPauseNs = 32;
  const int64* word = symm.at<Signal>(symm.rank, peer, 0);
  int64 got = ptx::ld_acquire_sys(word);
  if (got >= epoch) return true;
  for (const uint64 begin = ptx::global_timer_ns();;) {
    const bool is_late = ptx::global_timer_ns() - begin > calls.timeout_ns;
#pragma unroll 1
    for (uint32 poll = 0; poll < kPollsPerLook; ++poll) {
      got = ptx::ld_acquire_sys(word);
      if (got >= epoch) return true;
      ptx::nanosleep(kPauseNs);
    }
    if (must_give_up<Layout>(symm, calls, epoch, phase, peer, got, is_late)) return false;
  }
}

}  // namespace megamoe
