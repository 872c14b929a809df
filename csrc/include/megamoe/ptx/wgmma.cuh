// wgmma with A in registers and B in shared memory: ordering, descriptors, and the instruction itself per token count.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

MEGAMOE_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
MEGAMOE_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the committed groups are still running.
template <uint32 kPending>
MEGAMOE_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that an asynchronous instruction may read or write these registers here. No machine code.
template <uint32 kCount>
MEGAMOE_DEVICE void pin_registers(float (&values)[kCount]) {
#pragma unroll
  for (uint32 i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Matrix descriptor of a K-major operand with 128-byte rows and 128-byte swizzle: 8-row atoms of 1024 bytes follow each other. A k32 step
// inside the row adds 32 bytes, i.e. 2 to the descriptor.
MEGAMOE_DEVICE uint64 descriptor_128b_swizzle(uint32 address) {
  constexpr uint64 kSwizzle128B = 1ull << 62, kAtomStride = uint64(1024 >> 4) << 32, kUnusedLeadingOffset = 1ull << 16;
  return kSwizzle128B | kAtomStride | kUnusedLeadingOffset | ((address >> 4) & 0x3fff);
}

// D[64 rows, kTokens] (+)= A[64 rows, 32] E5M2 * B[kTokens, 32]^T E4M3. Specialisations are generated per kernel, for the token counts it
// uses.
template <uint32 kTokens>
struct WgmmaE5m2E4m3;

}  // namespace megamoe::ptx
