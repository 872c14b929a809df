// fold_tokens: E4M3 tokens with one UE8M0 scale per group of channels -> one scale per token, the largest of its groups.
//
// A group whose scale is 2^d times smaller has its codes shifted down by d binary places, rounded to nearest even, denormals included.
// Exact but for bits below 2^-9 of the new scale. One warp per token, 16 bytes per lane and step; a step lies in one group.
#pragma once

#include <megamoe/ptx/fp8.cuh>

namespace megamoe {

struct FoldTokensParams {
  const uint8* codes;       // [num_rows, num_channels] E4M3
  const uint8* sf;          // [num_rows, num_sf] UE8M0
  uint8* folded;            // [num_rows, num_channels] E4M3
  uint8* token_sf;          // [num_rows] UE8M0
  const int32* bounds;      // [G, 2]: of rows g * group_stride .. only those inside are folded; null: all are
  uint32 num_rows, num_channels, num_sf;
  uint32 channels_per_sf;   // a multiple of 16
  uint32 group_stride;
};

// 2^-d as a pair of FP16. From 2^-25 on it is zero, when no code is left above half of the smallest one anyway.
MEGAMOE_DEVICE uint32 shift_factors(uint32 d) {
  const uint32 half = d < 15 ? (15 - d) << 10 : d < 25 ? 1u << (24 - d) : 0;
  return half << 16 | half;
}

MEGAMOE_DEVICE uint32 shift_word(uint32 codes, uint32 factors) {
  return ptx::scale_e4m3x2(codes & 0xffff, factors) | ptx::scale_e4m3x2(codes >> 16, factors) << 16;
}

MEGAMOE_DEVICE void fold_tokens(const FoldTokensParams& p) {
  const uint32 lane = threadIdx.x % 32;
  const uint64 row = static_cast<uint64>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= p.num_rows) return;
  if (p.bounds != nullptr && row >= p.bounds[2 * (row / p.group_stride) + 1]) return;

  const uint8* sf = p.sf + row * p.num_sf;
  uint32 largest = 0;
  for (uint32 i = lane; i < p.num_sf; i += 32) largest = sf[i] > largest ? sf[i] : largest;
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) p.token_sf[row] = largest;

  const auto* from = reinterpret_cast<const uint4*>(p.codes + row * p.num_channels);
  auto* to = reinterpret_cast<uint4*>(p.folded + row * p.num_channels);
#pragma unroll 4
  for (uint32 i = lane; i < p.num_channels / 16; i += 32) {
    uint4 v = from[i];
    const uint32 d = largest - sf[i * 16 / p.channels_per_sf];
    if (d != 0) {
      const uint32 factors = shift_factors(d);
      v = make_uint4(shift_word(v.x, factors), shift_word(v.y, factors), shift_word(v.z, factors), shift_word(v.w, factors));
    }
    to[i] = v;
  }
}

}  // namespace megamoe
