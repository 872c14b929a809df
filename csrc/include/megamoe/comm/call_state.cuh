// CallStateParams: the call that a rank's kernels are in, whether it has failed, and what they tell the host about it
// (megamoe/comm/device_calls.py owns the memory and reads the reports).
#pragma once

#include <megamoe/sync/machine.cuh>

namespace megamoe {

// What a rank waits for, and how a wait can end without it. Numbered as device_calls.py has it.
enum class CallPhase : uint32 { kDispatch, kCombine, kExperts };
enum class WaitFailure : uint32 { kTimeout = 1, kAborted };

struct CallStateParams {
  // Failed calls are those up to this epoch: one that a peer refused is the current one, after any other failure it is every later one too.
  static constexpr int64 kUntilReset = 0x7fffffffffffffffll;

  int64* words;       // device memory: epoch, failed, first bad topk_idx entry (token << 32 | slot; all ones for none), number of them
  int64* reports;     // host memory: [2] refused call, [2] failure until reset, [5] bad topk_idx
  uint64 timeout_ns;  // of every wait

  MEGAMOE_DEVICE int64 epoch() const { return words[0]; }
  MEGAMOE_DEVICE void set_epoch(int64 epoch) const { words[0] = epoch; }
  MEGAMOE_DEVICE bool is_failed(int64 epoch) const { return machine::ld_acquire_gpu(words + 1) >= epoch; }

  // Marks the calls up to `until` as failed. Only the thread that raises the mark reports, so each failure has one report. Releases: what a
  // thread has told the peers before it marks the call arrives before what those say that see the mark.
  MEGAMOE_DEVICE void fail(int64 until, int64 epoch, CallPhase phase, WaitFailure kind, uint32 peer, int64 got) const {
    if (machine::max_release_gpu(words + 1, until) >= until) return;
    int64* report = reports + (until == kUntilReset ? 2 : 0);
    report[1] = got;
    machine::st_release_sys(report, epoch << 16 | static_cast<uint32>(phase) << 12 | static_cast<uint32>(kind) << 8 | peer);
  }

#ifdef __CUDACC__
  MEGAMOE_DEVICE void note_bad_index(uint32 token, uint32 slot) const {
    atomicMin(reinterpret_cast<uint64*>(words + 2), static_cast<uint64>(token) << 32 | slot);
    atomicAdd(reinterpret_cast<uint64*>(words + 3), 1ull);
  }

  // Tells the host what note_bad_index has gathered in this call. One thread, after all of them. `value_of(token, slot)` is the bad value.
  template <class ValueOf>
  MEGAMOE_DEVICE void report_bad_indices(int64 epoch, ValueOf value_of) const {
    const int64 first = machine::ld_relaxed_gpu(words + 2), number = machine::ld_relaxed_gpu(words + 3);
    if (number == 0) return;
    words[2] = -1;
    words[3] = 0;
    // The epoch in front and behind: a host that reads in between finds two different ones. Each store is a release, so that they appear
    // in this order.
    int64* report = reports + 4;
    machine::st_release_sys(report, epoch);
    machine::st_release_sys(report + 1, first);
    machine::st_release_sys(report + 2, value_of(static_cast<uint32>(first >> 32), static_cast<uint32>(first)));
    machine::st_release_sys(report + 3, number);
    machine::st_release_sys(report + 4, epoch);
  }
#endif
};

}  // namespace megamoe
