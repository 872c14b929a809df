// Pipeline: a ring of stages between one or more producers, each of a part of every stage, and several consumers of a block.
//
//     producers  --(full: all bytes landed)-->  consumer warps
//     producers  <--(empty: every consumer warp has finished reading)--  consumer warps
//
// In a cluster a producer of one block may fill part of a stage of all of them; then consumers of all blocks say to each that they have
// finished, kClusterBlocks times as many.
//
// Each role keeps its own Pipeline by value: position and phase are registers of the role, only the barriers are shared.
#pragma once

#include <megamoe/ptx/mbarrier.cuh>

namespace megamoe {

template <uint32 kStages, uint32 kClusterBlocks = 1>
struct Pipeline {
  static constexpr uint32 kBarrierBytes = kStages * 16;

  uint32 barriers;  // shared address: kStages x {full, empty}
  uint32 stage = 0, phase = 0;

  // By one thread, before any role starts.
  static MEGAMOE_DEVICE void init(uint32 barriers, uint32 num_consumers, uint32 num_producers = 1) {
    for (uint32 i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(barriers + offset_of(i), num_producers);
      ptx::mbarrier_init(barriers + offset_of(i) + 8, num_consumers * kClusterBlocks);
    }
  }

  MEGAMOE_DEVICE explicit Pipeline(uint32 barriers) : barriers(barriers) {}

  // Of a stage's barriers behind those of the first.
  static MEGAMOE_DEVICE uint32 offset_of(uint32 stage) { return stage * 16; }
  MEGAMOE_DEVICE uint32 first_empty() const { return barriers + 8; }
  MEGAMOE_DEVICE uint32 full() const { return barriers + offset_of(stage); }
  MEGAMOE_DEVICE uint32 empty() const { return first_empty() + offset_of(stage); }

  // Consumer: wait until the bytes of the current stage are there, which `is_full` says that this warp knows already.
  MEGAMOE_DEVICE void wait_full() const { ptx::mbarrier_wait(full(), phase); }
  MEGAMOE_DEVICE void wait_full_unless(bool is_full) const { ptx::mbarrier_wait_unless(is_full, full(), phase); }

  // Whether wait_full would return at once.
  MEGAMOE_DEVICE bool is_full() const { return ptx::mbarrier_test(full(), phase); }

  // Producer of ordinary stores: wait until the current stage is free; after the stores, publish them.
  MEGAMOE_DEVICE void acquire() const { ptx::mbarrier_wait(empty(), phase ^ 1); }
  MEGAMOE_DEVICE void publish() const { ptx::mbarrier_arrive(full()); }

  // Producer of copies: wait until the current stage is free, then announce the bytes that will land in it.
  MEGAMOE_DEVICE void acquire(uint32 num_bytes) const {
    acquire();
    ptx::mbarrier_arrive_expect_bytes(full(), num_bytes);
  }

  MEGAMOE_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace megamoe
