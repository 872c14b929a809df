// Signals between ranks: posting an epoch to a peer, and waiting with a deadline and an eye on abort words.
//
//   rank r: writes of all blocks -> arrive_last, or the end of their kernel -> post_to_peers: st.release.sys
//   rank p: wait_for_peer(r): ld.acquire.sys -> __syncthreads -> reads
#pragma once

#include <megamoe/comm/call_state.cuh>
#include <megamoe/comm/symm.cuh>

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

// Publishes `value`, and with it all that this thread has written or seen: behind a block barrier, what the block has.
template <auto Signal>
MEGAMOE_DEVICE void post_to_peer(const Symm& symm, uint32 peer, int64 value) {
  machine::st_release_sys(symm.at<Signal>(peer, symm.rank, 0), value);
}

#ifdef __CUDACC__
// Thread r posts to rank r.
template <auto Signal>
MEGAMOE_DEVICE void post_to_peers(const Symm& symm, int64 value) {
  if (threadIdx.x < symm.num_ranks) post_to_peer<Signal>(symm, threadIdx.x, value);
}
#endif

constexpr uint32 kPollPauseNs = 32;

// A rank's part in one call: what every wait of it needs.
template <class Layout>
struct CallWatch {
  const Symm& symm;
  const CallStateParams& calls;
  int64 epoch;
  CallPhase phase;

  // Whether `sender` has told this rank to leave the call, which is then marked and reported.
  MEGAMOE_DEVICE bool has_aborted(uint32 sender) const {
    const AbortWord abort{machine::ld_acquire_sys(symm.at<&Layout::abort>(symm.rank, sender, 0))};
    if (!abort.ends(epoch)) return false;
    calls.fail(abort.is_refusal() ? epoch : calls.kUntilReset, epoch, phase, WaitFailure::kAborted, sender, abort.word);
    return true;
  }

  // Waits until `poll(got)` is true; false if the call fails instead. `peer` is the rank to blame at the deadline, `got` what it last gave.
  template <class Poll>
  MEGAMOE_DEVICE bool wait(uint32 peer, Poll poll) const {
    constexpr uint32 kPollsPerLook = 16;
    int64 got = 0;
    if (poll(got)) return true;
    for (const uint64 begin = machine::global_timer_ns();;) {
      if (calls.is_failed(epoch)) return false;
      const bool is_late = machine::global_timer_ns() - begin > calls.timeout_ns;
#ifdef __CUDACC__
#pragma unroll 1
#endif
      for (uint32 i = 0; i < kPollsPerLook; ++i) {
        if (poll(got)) return true;
        machine::nanosleep(kPollPauseNs);
      }
      if (must_give_up(peer, got, is_late)) return false;
    }
  }

  // Waits until `peer` has posted at least this call's epoch here. One thread; acquires for itself.
  template <auto Signal>
  MEGAMOE_DEVICE bool wait_for_peer(uint32 peer) const {
    const int64* word = symm.at<Signal>(symm.rank, peer, 0);
    return wait(peer, [&](int64& got) {
      got = machine::ld_acquire_sys(word);
      return got >= epoch;
    });
  }

 private:
  // The last look at the abort words and the clock: true if the wait must end, which is then reported.
  MEGAMOE_DEVICE bool must_give_up(uint32 peer, int64 got, bool is_late) const {
    for (uint32 sender = 0; sender < symm.num_ranks; ++sender)
      if (has_aborted(sender)) return true;
    if (!is_late) return false;
    // Before the mark: once it is up the rank's other threads run to the end and say combine_ready, which must not arrive before these.
    for (uint32 r = 0; r < symm.num_ranks; ++r)
      if (r != symm.rank) post_to_peer<&Layout::abort>(symm, r, AbortWord::peer_timeout(epoch, peer).word);
    calls.fail(calls.kUntilReset, epoch, phase, WaitFailure::kTimeout, peer, got);
    return true;
  }
};

}  // namespace megamoe
