// The gate of a SwiGLU expert, as reference/swiglu.py defines it: silu(gate) * up, with an optional clamp and the variant of gpt-oss.
#pragma once

#include <megamoe/ptx/numeric.cuh>

namespace megamoe {

struct SwigluGate {
  float limit;            // infinite: no clamp
  float exponent_factor;  // -alpha * log2(e)
  float up_bias;

  MEGAMOE_DEVICE SwigluGate(float limit, float alpha, float up_bias)
      : limit(limit), exponent_factor(-1.4426950408889634f * alpha), up_bias(up_bias) {}

  // NaN if one of them is NaN. An exact division has a slow path that is a call, and a call anywhere in a math role costs spills.
  MEGAMOE_DEVICE float operator()(float gate, float up) const {
    gate = ptx::min_propagating_nan(gate, limit);
    up = ptx::max_propagating_nan(ptx::min_propagating_nan(up, limit), -limit);
    return gate * ptx::reciprocal_approx(1.0f + ptx::exp2_approx(exponent_factor * gate)) * (up + up_bias);
  }
};

}  // namespace megamoe
