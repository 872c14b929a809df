// Byte permutation, logic and conversions (PTX ISA, "Integer", "Logic and Shift", "cvt").
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

MEGAMOE_DEVICE uint32 permute_bytes(uint32 low, uint32 high, uint32 selector) {
  uint32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(selector));
  return r;
}

// (a & b) | c in one instruction.
MEGAMOE_DEVICE uint32 and_or(uint32 a, uint32 b, uint32 c) {
  uint32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// Two floats to BF16, round to nearest even; `low` lands in the low half.
MEGAMOE_DEVICE uint32 pack_bf16(float low, float high) {
  uint32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

MEGAMOE_DEVICE float bf16_low(uint32 pair) { return __uint_as_float(pair << 16); }
MEGAMOE_DEVICE float bf16_high(uint32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Two floats to E4M3, round to nearest even, saturating at 448; NaN stays NaN. `low` lands in bits 0-7 of the 16.
MEGAMOE_DEVICE uint32 pack_e4m3(float low, float high) {
  uint16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}

}  // namespace megamoe::ptx
