// Byte permutation, logic, FP32 functions and conversions (PTX ISA, "Integer", "Logic and Shift", "Floating Point", "cvt").
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

// Where fmaxf and fminf return the other operand of a NaN, these return NaN.
MEGAMOE_DEVICE float max_propagating_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

MEGAMOE_DEVICE float min_propagating_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// Without ftz both take a branch around the instruction to treat denormals.
MEGAMOE_DEVICE float exp2_approx(float a) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}

MEGAMOE_DEVICE float reciprocal_approx(float a) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
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
