// E4M3 <-> FP16 in pairs (PTX ISA, "cvt", "mul"). FP16 holds every E4M3 value exactly.
#pragma once

#include <megamoe/base.cuh>

namespace megamoe::ptx {

// The E4M3 codes in bits 0-7 and 8-15 of `codes`, times the FP16 pair `factors`, rounded to nearest even; NaN stays NaN.
MEGAMOE_DEVICE uint32 scale_e4m3x2(uint32 codes, uint32 factors) {
  uint32 r;
  asm("{.reg .b16 c; .reg .b32 h, p;\n"
      "cvt.u16.u32 c, %1;\n"
      "cvt.rn.f16x2.e4m3x2 h, c;\n"
      "mul.rn.f16x2 p, h, %2;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 c, p;\n"
      "cvt.u32.u16 %0, c;}"
      : "=r"(r)
      : "r"(codes), "r"(factors));
  return r;
}

}  // namespace megamoe::ptx
