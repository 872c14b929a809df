// Accesses to global memory, named by order and scope (PTX ISA, "ld", "st").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

MEGAMOE_DEVICE uint32 ld_acquire_gpu(const uint32* address) {
  uint32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

MEGAMOE_DEVICE void st_release_gpu(uint32* address, uint32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

// A byte that no one writes while the kernel runs. Stays where it is written in the program, so that it can be fetched long before it is
// used.
MEGAMOE_DEVICE uint32 ld_early_byte(const uint8* address) {
  uint32 v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

}  // namespace megamoe::ptx
