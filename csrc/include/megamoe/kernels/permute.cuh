// permute_tokens: out[i] = rows[index[i]], zeros for -1. Bytes, since the kernel does not care what they are.
//
// One warp per output row and segment of 4 vectors per lane. An index out of range is reported and gives zeros.
#pragma once

#include <megamoe/kernels/row_bounds.cuh>

namespace megamoe {

struct PermuteTokensParams {
  const uint8* rows;  // [num_rows, row_bytes]
  uint8* out;         // [num_out, row_bytes]
  Indices index;      // [num_out]
  DeviceErrors errors;
  uint32 num_rows, num_out, row_bytes;
};

// Vector divides row_bytes and both addresses.
template <class Vector>
MEGAMOE_DEVICE void permute_tokens(const PermuteTokensParams& p) {
  constexpr uint32 kVectors = 4;
  const uint32 num_vectors = p.row_bytes / sizeof(Vector), num_segments = ceil_div(num_vectors, 32 * kVectors);
  const uint32 warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32 out_idx = warp / num_segments, segment = warp % num_segments;
  if (out_idx >= p.num_out) return;

  const int64 row = p.index[out_idx];
  const bool is_inside = row >= 0 && row < p.num_rows;
  if (!is_inside && row != -1 && segment == 0 && lane == 0) p.errors.report(kRowOutOfRange, out_idx, row);

  const auto* from = reinterpret_cast<const Vector*>(p.rows + (is_inside ? uint64(row) : 0) * p.row_bytes);
  auto* to = reinterpret_cast<Vector*>(p.out + uint64(out_idx) * p.row_bytes);
  const uint32 first = segment * 32 * kVectors + lane;
  Vector v[kVectors] = {};
#pragma unroll
  for (uint32 i = 0; i < kVectors; ++i) {
    if (is_inside && first + 32 * i < num_vectors) v[i] = from[first + 32 * i];
  }
#pragma unroll
  for (uint32 i = 0; i < kVectors; ++i) {
    if (first + 32 * i < num_vectors) to[first + 32 * i] = v[i];
  }
}

}  // namespace megamoe
