// Registers per warpgroup, named barriers, lane election (PTX ISA, "setmaxnreg", "barrier", "elect").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

template <uint32 kRegisters>
MEGAMOE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <uint32 kRegisters>
MEGAMOE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Meets kThreads threads at named barrier `id` (0 is __syncthreads).
template <uint32 kThreads>
MEGAMOE_DEVICE void barrier_sync(uint32 id) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

}  // namespace megamoe::ptx
