// fold_tokens: E4M3 tokens with one UE8M0 scale per group of channels -> one scale per token, the largest of its groups.
//
// A group whose scale is 2^d times smaller has its codes shifted down by d binary places, rounded to nearest even, denormals included.
// Exact but for bits below 2^-9 of the new scale. One warp per token at a time, 16 bytes per lane and step; a step lies in one group.
// A lane reads a step before it writes it, so the result may take the place of the codes.
#pragma once

#include <megamoe/fold_codes.cuh>

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

MEGAMOE_DEVICE void fold_token(const FoldTokensParams& p, uint64 row, uint32 lane) {
  const uint8* sf = p.sf + row * p.num_sf;
  uint32 largest = 0;
  for (uint32 i = lane; i < p.num_sf; i += 32) largest = sf[i] > largest ? sf[i] : largest;
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) p.token_sf[row] = largest;

  const auto* from = reinterpret_cast<const uint4*>(p.codes + row * p.num_channels);
  auto* to = reinterpret_cast<uint4*>(p.folded + row * p.num_channels);
#pragma unroll 4
  for (uint32 i = lane; i < p.num_channels / 16; i += 32) {
    to[i] = fold_codes(from[i], largest - sf[i * 16 / p.channels_per_sf]);
  }
}

MEGAMOE_DEVICE void fold_tokens(const FoldTokensParams& p) {
  const uint32 warps = blockDim.x / 32;
  for (uint64 row = static_cast<uint64>(blockIdx.x) * warps + threadIdx.x / 32; row < p.num_rows; row += gridDim.x * warps) {
    const bool is_inside = p.bounds == nullptr || row < p.bounds[2 * (row / p.group_stride) + 1];
    if (is_inside) fold_token(p, row, threadIdx.x % 32);
  }
}

}  // namespace megamoe
