// Values -> E4M3 codes with a UE8M0 scale, bit for bit as formats/tokens.py and formats/ue8m0.py define it.
#pragma once

#include <megamoe/ptx/numeric.cuh>

namespace megamoe {

constexpr float kE4m3Max = 448.0f;
constexpr float kMinAmax = 1e-4f;
constexpr float kFloatMax = 3.4028235e38f;

MEGAMOE_DEVICE bool is_finite(float v) { return fabsf(v) <= kFloatMax; }

// E4M3 has no Inf, and saturation would turn one into 448. One instruction: Inf * 0 is NaN.
MEGAMOE_DEVICE float inf_to_nan(float v) { return fmaf(v, 0.0f, v); }

// Biased exponent of the smallest power of two s with max(amax, 1e-4) <= 448 s, for finite amax.
MEGAMOE_DEVICE uint32 ceil_exponent(float amax) {
  // Positive floats are ordered like their bits, so this is a division by 2^23 rounded up: the mantissa's excess carries once.
  return 127 + ((__float_as_int(fmaxf(amax, kMinAmax)) - __float_as_int(kE4m3Max) + 0x7fffff) >> 23);
}

// 2^(127 - e) for the exponents that ceil_exponent gives: neither it nor a product of it with the values it is for leaves FP32.
MEGAMOE_DEVICE float inverse_scale(uint32 e) { return __uint_as_float((254 - e) << 23); }

// Eight neighbouring channels of a token in FP32.
struct Channels {
  float v[8];

  // NaN if one of them is NaN.
  MEGAMOE_DEVICE float largest() const {
    float m = 0.0f;
#pragma unroll
    for (uint32 i = 0; i < 8; ++i) m = ptx::max_propagating_nan(m, fabsf(v[i]));
    return m;
  }

  MEGAMOE_DEVICE float largest_finite() const {
    float m = 0.0f;
#pragma unroll
    for (uint32 i = 0; i < 8; ++i) m = fmaxf(m, is_finite(v[i]) ? fabsf(v[i]) : 0.0f);
    return m;
  }

  MEGAMOE_DEVICE void turn_inf_into_nan() {
#pragma unroll
    for (uint32 i = 0; i < 8; ++i) v[i] = inf_to_nan(v[i]);
  }

  MEGAMOE_DEVICE uint2 codes(float inverse) const {
    uint32 pair[4];
#pragma unroll
    for (uint32 i = 0; i < 4; ++i) pair[i] = ptx::pack_e4m3(v[2 * i] * inverse, v[2 * i + 1] * inverse);
    return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
  }
};

// Eight channels as they lie in memory.
template <class T>
struct Packed;

template <>
struct alignas(16) Packed<Bf16> {
  uint4 words;

  MEGAMOE_DEVICE Channels unpack() const {
    return {{ptx::bf16_low(words.x), ptx::bf16_high(words.x), ptx::bf16_low(words.y), ptx::bf16_high(words.y),
             ptx::bf16_low(words.z), ptx::bf16_high(words.z), ptx::bf16_low(words.w), ptx::bf16_high(words.w)}};
  }
};

template <>
struct alignas(16) Packed<float> {
  float4 low, high;

  MEGAMOE_DEVICE Channels unpack() const { return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}}; }
};

}  // namespace megamoe
