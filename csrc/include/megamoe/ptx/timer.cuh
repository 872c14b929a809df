// Time and pauses (PTX ISA, "Special Registers", "nanosleep").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

// Nanoseconds since some moment that all SMs share.
MEGAMOE_DEVICE uint64 global_timer_ns() {
  uint64 ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}

// Lets other warps run for up to twice this time.
MEGAMOE_DEVICE void nanosleep(uint32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }

}  // namespace megamoe::ptx
