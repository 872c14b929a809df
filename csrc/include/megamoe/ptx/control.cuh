// Registers per warpgroup, named barriers, lane election, dependent launches (PTX ISA, "setmaxnreg", "barrier", "elect",
// "griddepcontrol").
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

// Lets the next kernel of the stream start, if it was launched to depend on this one.
MEGAMOE_DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;"); }

// Waits until the kernel before this one in the stream has ended and its writes are visible; returns at once in a kernel that was not
// launched to depend on it.
MEGAMOE_DEVICE void wait_for_launcher() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// True for one lane of a converged warp. Unlike a comparison with the lane's number it tells the assembler that no other lane is there:
// without it every bulk copy sits in a loop over the active lanes.
MEGAMOE_DEVICE bool elect_one() {
  uint32 r;
  asm volatile(
      "{.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(r));
  return r != 0;
}

// Meets kThreads threads at named barrier `id` (0 is __syncthreads).
template <uint32 kThreads>
MEGAMOE_DEVICE void barrier_sync(uint32 id) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// The same, and tells all of them whether `predicate` is true for every one.
template <uint32 kThreads>
MEGAMOE_DEVICE bool barrier_all(uint32 id, bool predicate) {
  uint32 r;
  asm volatile(
      "{.reg .pred p, q;\n"
      "setp.ne.u32 p, %1, 0;\n"
      "barrier.red.and.pred q, %2, %3, p;\n"
      "selp.u32 %0, 1, 0, q;}"
      : "=r"(r)
      : "r"(static_cast<uint32>(predicate)), "r"(id), "n"(kThreads)
      : "memory");
  return r != 0;
}

}  // namespace megamoe::ptx
