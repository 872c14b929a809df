// quantize_tokens: BF16 or FP32 tokens -> E4M3 codes with one UE8M0 scale per group of channels, or per token.
//
// What is quantised comes from a Source: `row(i)` gives an object whose `load(vector)` fetches eight channels and whose `values` makes FP32
// of them, apart from each other so that all loads of a thread are in flight before the first is used. swiglu_quantize.cuh has another.
// NaN and Inf channels become NaN and take no part in the maximum. They are looked for once per thread, through a maximum that keeps NaN.
#pragma once

#include <megamoe/e4m3.cuh>

namespace megamoe {

struct QuantizedRows {
  uint8* codes;         // [num_rows, num_channels] E4M3, rows at multiples of 8 bytes
  uint8* sf;            // [num_rows, number of groups] UE8M0
  uint32 num_rows;
  uint32 num_channels;  // a multiple of 8

  MEGAMOE_DEVICE uint2* row_codes(uint32 row) const { return reinterpret_cast<uint2*>(codes + uint64(row) * num_channels); }
};

constexpr uint32 kVectorsPerThread = 4;
constexpr uint32 kWholeToken = 0;  // as a group size

// The maximum over `kLanes` neighbouring lanes.
template <uint32 kLanes>
MEGAMOE_DEVICE float max_of_lanes(float m) {
#pragma unroll
  for (uint32 step = 1; step < kLanes; step *= 2) m = ptx::max_propagating_nan(m, __shfl_xor_sync(~0u, m, step));
  return m;
}

// Fetches vectors first, first + step, ... of a row; zeros past its end.
template <class Row, class Raw>
MEGAMOE_DEVICE void load_vectors(const Row& row, uint32 first, uint32 step, uint32 num_vectors, Raw (&raw)[kVectorsPerThread]) {
#pragma unroll
  for (uint32 i = 0; i < kVectorsPerThread; ++i) {
    raw[i] = {};
    if (first + i * step < num_vectors) raw[i] = row.load(first + i * step);
  }
}

// One scale per kGroup channels. A warp owns 1024 neighbouring channels of a row, so no group leaves it; the last group may be short.
template <uint32 kGroup, class Source>
MEGAMOE_DEVICE void quantize_groups(const Source& source, const QuantizedRows& out) {
  constexpr uint32 kLanes = kGroup / 8;
  const uint32 num_vectors = out.num_channels / 8, num_segments = ceil_div(num_vectors, 32 * kVectorsPerThread);
  const uint32 warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32 row_idx = warp / num_segments, first = warp % num_segments * 32 * kVectorsPerThread + lane;
  if (row_idx >= out.num_rows) return;

  const auto row = source.row(row_idx);
  typename Source::Raw raw[kVectorsPerThread];
  load_vectors(row, first, 32, num_vectors, raw);
  Channels channels[kVectorsPerThread];
  float amax[kVectorsPerThread];
  bool all_finite = true;
#pragma unroll
  for (uint32 i = 0; i < kVectorsPerThread; ++i) {
    channels[i] = row.values(raw[i]);
    amax[i] = max_of_lanes<kLanes>(channels[i].largest());
    all_finite = all_finite && is_finite(amax[i]);
  }
  if (!__all_sync(~0u, all_finite)) {
#pragma unroll
    for (uint32 i = 0; i < kVectorsPerThread; ++i) {
      amax[i] = max_of_lanes<kLanes>(channels[i].largest_finite());
      channels[i].turn_inf_into_nan();
    }
  }
  uint2* codes = out.row_codes(row_idx);
  uint8* sf = out.sf + uint64(row_idx) * ceil_div(num_vectors, kLanes);
#pragma unroll
  for (uint32 i = 0; i < kVectorsPerThread; ++i) {
    const uint32 vector = first + 32 * i, e = ceil_exponent(amax[i]);
    if (vector < num_vectors) {
      codes[vector] = channels[i].codes(inverse_scale(e));
      if (lane % kLanes == 0) sf[vector / kLanes] = e;
    }
  }
}

// The maximum over a block of at most 32 warps, for m >= 0 or NaN, whose bits are ordered like the values with NaN on top.
MEGAMOE_DEVICE float max_of_block(float m) {
  __shared__ uint32 of_warp[32];
  const uint32 lane = threadIdx.x % 32;
  const uint32 bits = __reduce_max_sync(~0u, __float_as_uint(m));
  if (lane == 0) of_warp[threadIdx.x / 32] = bits;
  __syncthreads();
  return __uint_as_float(__reduce_max_sync(~0u, lane < blockDim.x / 32 ? of_warp[lane] : 0));
}

// One scale per row, one block per row, which stays in registers between the maximum and the rounding.
template <class Source>
MEGAMOE_DEVICE void quantize_short_row(const Source& source, const QuantizedRows& out) {
  const uint32 num_vectors = out.num_channels / 8;
  const auto row = source.row(blockIdx.x);
  typename Source::Raw raw[kVectorsPerThread];
  load_vectors(row, threadIdx.x, blockDim.x, num_vectors, raw);
  Channels channels[kVectorsPerThread];
  float amax = 0.0f;
#pragma unroll
  for (uint32 i = 0; i < kVectorsPerThread; ++i) {
    channels[i] = row.values(raw[i]);
    amax = ptx::max_propagating_nan(amax, channels[i].largest());
  }
  amax = max_of_block(amax);
  if (!is_finite(amax)) {
    amax = 0.0f;
#pragma unroll
    for (uint32 i = 0; i < kVectorsPerThread; ++i) {
      amax = fmaxf(amax, channels[i].largest_finite());
      channels[i].turn_inf_into_nan();
    }
    __syncthreads();  // all have read the first maximum before it is overwritten
    amax = max_of_block(amax);
  }
  const uint32 e = ceil_exponent(amax);
  uint2* codes = out.row_codes(blockIdx.x);
#pragma unroll
  for (uint32 i = 0; i < kVectorsPerThread; ++i) {
    const uint32 vector = threadIdx.x + i * blockDim.x;
    if (vector < num_vectors) codes[vector] = channels[i].codes(inverse_scale(e));
  }
  if (threadIdx.x == 0) out.sf[blockIdx.x] = e;
}

// The same for a row of any length, which is read twice.
template <class Source>
MEGAMOE_DEVICE void quantize_long_row(const Source& source, const QuantizedRows& out) {
  const uint32 num_vectors = out.num_channels / 8;
  const auto row = source.row(blockIdx.x);
  const uint32 chunk = kVectorsPerThread * blockDim.x;
  typename Source::Raw raw[kVectorsPerThread];
  float amax = 0.0f;
  for (uint32 base = 0; base < num_vectors; base += chunk) {
    load_vectors(row, base + threadIdx.x, blockDim.x, num_vectors, raw);
#pragma unroll
    for (uint32 i = 0; i < kVectorsPerThread; ++i) amax = fmaxf(amax, row.values(raw[i]).largest_finite());
  }
  const uint32 e = ceil_exponent(max_of_block(amax));
  uint2* codes = out.row_codes(blockIdx.x);
  for (uint32 base = 0; base < num_vectors; base += chunk) {
    load_vectors(row, base + threadIdx.x, blockDim.x, num_vectors, raw);
#pragma unroll
    for (uint32 i = 0; i < kVectorsPerThread; ++i) {
      Channels channels = row.values(raw[i]);
      channels.turn_inf_into_nan();
      const uint32 vector = base + threadIdx.x + i * blockDim.x;
      if (vector < num_vectors) codes[vector] = channels.codes(inverse_scale(e));
    }
  }
  if (threadIdx.x == 0) out.sf[blockIdx.x] = e;
}

// Grids: one block per row for kWholeToken, else one warp per row and 1024 channels.
template <uint32 kGroup, class Source>
MEGAMOE_DEVICE void quantize(const Source& source, const QuantizedRows& out) {
  if constexpr (kGroup != kWholeToken) {
    quantize_groups<kGroup>(source, out);
  } else if (out.num_channels / 8 <= kVectorsPerThread * blockDim.x) {
    quantize_short_row(source, out);
  } else {
    quantize_long_row(source, out);
  }
}

struct QuantizeTokensParams {
  const void* x;  // [num_rows, num_channels] T, at a multiple of 16 bytes
  QuantizedRows out;
};

template <class T>
struct TokenSource {
  using Raw = Packed<T>;
  const Raw* x;
  uint32 num_vectors;

  struct Row {
    const Raw* vectors;

    MEGAMOE_DEVICE Raw load(uint32 vector) const { return vectors[vector]; }
    MEGAMOE_DEVICE Channels values(const Raw& raw) const { return raw.unpack(); }
  };

  MEGAMOE_DEVICE Row row(uint32 row_idx) const { return {x + uint64(row_idx) * num_vectors}; }
};

template <class T, uint32 kGroup>
MEGAMOE_DEVICE void quantize_tokens(const QuantizeTokensParams& p) {
  quantize<kGroup>(TokenSource<T>{static_cast<const Packed<T>*>(p.x), p.out.num_channels / 8}, p.out);
}

}  // namespace megamoe
