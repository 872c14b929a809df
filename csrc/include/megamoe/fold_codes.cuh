// fold_codes: E4M3 codes moved to a larger power-of-two scale.
#pragma once

#include <megamoe/ptx/fp8.cuh>

namespace megamoe {

// 2^-d as a pair of FP16. From 2^-25 on it is zero, when no code is left above half of the smallest one anyway.
MEGAMOE_DEVICE uint32 shift_factors(uint32 d) {
  const uint32 half = d < 15 ? (15 - d) << 10 : d < 25 ? 1u << (24 - d) : 0;
  return half << 16 | half;
}

MEGAMOE_DEVICE uint32 shift_word(uint32 codes, uint32 factors) {
  return ptx::scale_e4m3x2(codes & 0xffff, factors) | ptx::scale_e4m3x2(codes >> 16, factors) << 16;
}

// 16 codes of one group shifted down by d binary places, rounded to nearest even, denormals included; NaN stays NaN.
MEGAMOE_DEVICE uint4 fold_codes(uint4 v, uint32 d) {
  if (d == 0) return v;
  const uint32 factors = shift_factors(d);
  return make_uint4(shift_word(v.x, factors), shift_word(v.y, factors), shift_word(v.z, factors), shift_word(v.w, factors));
}

}  // namespace megamoe
