// Accesses to global memory, named by order and scope (PTX ISA, "ld", "st", "fence").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

MEGAMOE_DEVICE uint32 ld_acquire_gpu(const uint32* address) {
  uint32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
  return v;
}

MEGAMOE_DEVICE int64 ld_acquire_gpu(const int64* address) {
  int64 v;
  asm volatile("ld.acquire.gpu.global.s64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
  return v;
}

MEGAMOE_DEVICE void st_release_gpu(uint32* address, uint32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

// Between GPUs and with the host: who sees the value sees what was written before its release.
MEGAMOE_DEVICE int64 ld_acquire_sys(const int64* address) {
  int64 v;
  asm volatile("ld.acquire.sys.global.s64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
  return v;
}

MEGAMOE_DEVICE void st_release_sys(int64* address, int64 v) {
  asm volatile("st.release.sys.global.s64 [%0], %1;" ::"l"(address), "l"(v) : "memory");
}

// A word that other threads of this GPU may change at any time; orders nothing.
MEGAMOE_DEVICE int64 ld_relaxed_gpu(const int64* address) {
  int64 v;
  asm volatile("ld.relaxed.gpu.global.s64 %0, [%1];" : "=l"(v) : "l"(address) : "memory");
  return v;
}

// Adds to a counter; who acquires the sum sees what was written before.
MEGAMOE_DEVICE void add_release_gpu(uint32* address, uint32 v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(v) : "memory");
}

// These return the value before.
MEGAMOE_DEVICE uint32 add_acq_rel_gpu(uint32* address, uint32 v) {
  uint32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(v) : "memory");
  return old;
}

MEGAMOE_DEVICE uint32 add_relaxed_gpu(uint32* address, uint32 v) {
  uint32 old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(v) : "memory");
  return old;
}

MEGAMOE_DEVICE int64 max_release_gpu(int64* address, int64 v) {
  int64 old;
  asm volatile("atom.release.gpu.global.max.s64 %0, [%1], %2;" : "=l"(old) : "l"(address), "l"(v) : "memory");
  return old;
}

MEGAMOE_DEVICE void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// 16 bytes that are read once. Stays where it is written in the program, so that many of them can be in flight before the first is used.
MEGAMOE_DEVICE uint4 ld_stream_128(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

// A byte that this thread has acquired. Stays where it is written in the program, so that it can be fetched long before it is used.
MEGAMOE_DEVICE uint32 ld_early_shared_byte(const uint8* address) {
  uint32 v;
  asm volatile("ld.relaxed.gpu.global.u8 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

// A byte that no one writes while the kernel runs. Stays where it is written in the program, so that it can be fetched long before it is
// used.
MEGAMOE_DEVICE uint32 ld_early_byte(const uint8* address) {
  uint32 v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

}  // namespace megamoe::ptx
