// Epilogue swiglu (linear 1): bias, clamp, gate, row weight, then E4M3 with one UE8M0 exponent per 32 channels (act_group 32).
//
// Gate and up rows are interleaved by 8, so one thread holds both of a channel: no exchange before the maximum. A warpgroup's 64 rows are
// 32 channels, one group: the maximum runs over 8 lanes and 4 warps, and never leaves the warpgroup.
#pragma once

#include <megamoe/e4m3.cuh>
#include <megamoe/roles/store_epilogue.cuh>
#include <megamoe/swiglu.cuh>

namespace megamoe {

// The maximum of each of 8 values over the 8 lanes that have the same lane % 4: lane 4 g + i gets that of value g. Halves travel both ways,
// so this takes 7 shuffles where one value after the other would take 24.
MEGAMOE_DEVICE float max_over_lane_groups(const float (&v)[8]) {
  const uint32 lane = threadIdx.x % 32;
  const auto exchange = [lane](float low, float high, uint32 bit) {  // keeps one and takes its partner's
    const bool is_high = lane & bit;
    return fmaxf(is_high ? high : low, __shfl_xor_sync(~0u, is_high ? low : high, bit));
  };
  float half[4], quarter[2];
#pragma unroll
  for (uint32 i = 0; i < 4; ++i) half[i] = exchange(v[i], v[i + 4], 16);
#pragma unroll
  for (uint32 i = 0; i < 2; ++i) quarter[i] = exchange(half[i], half[i + 2], 8);
  return exchange(quarter[0], quarter[1], 4);
}

template <class Config, uint32 kTokens>
MEGAMOE_DEVICE void swiglu_epilogue(float (&totals)[kTokens / 2], const Fp4GemmParams& p, const EpilogueTile& tile, uint32 base,
                                     uint32 warpgroup) {
  using Plan = SmemPlan<Config>;
  constexpr uint32 kChannels = 32, kPitch = 48;  // 48: 16-byte rows whose bytes spread over the banks
  const uint32 staging = base + Plan::kStaging + warpgroup * Plan::kStagingBytes;
  const TokenValues<Config> values(base, warpgroup);
  const uint32 barrier = kEpilogueBarrier + warpgroup;
  tile.share_scales<kTokens>(values.scales);
  float gate_bias = 0.0f, up_bias = 0.0f;
  if (p.bias != nullptr) {
    const uint32 row = tile.row_block * 64 + tile.warp() * 16 + tile.lane_group();
    gate_bias = p.bias[uint64(tile.group) * p.n + row];
    up_bias = p.bias[uint64(tile.group) * p.n + row + 8];
  }
  ptx::copy_async_wait();  // the row weights
  ptx::barrier_sync<128>(barrier);

  const float gate_scale = tile.row_scale(0), up_scale = tile.row_scale(1);
  // The activated values take the place of the gate sums: totals[4 j] and totals[4 j + 1] are this thread's channel of two tokens. In
  // batches of 32 tokens: shared accesses stay in program order, and eight tokens at a time would expose the latency of the whole chain.
  constexpr uint32 kBatch = 4;
  const SwigluGate gated(p.limit, p.alpha, p.up_bias);
  const auto offset_of = [](uint32 j) { return (8 * j + 2 * EpilogueTile::lane_in_group()) * 4; };
#pragma unroll
  for (uint32 first = 0; first < kTokens / 8; first += kBatch) {
    ptx::Words2 s[kBatch], w[kBatch];
#pragma unroll
    for (uint32 b = 0; b < kBatch; ++b) {
      if (first + b >= kTokens / 8) break;
      s[b] = ptx::ld_shared_64(values.scales + offset_of(first + b));
      w[b] = ptx::ld_shared_64(values.weights() + offset_of(first + b));
    }
    float magnitudes[2 * kBatch] = {};
#pragma unroll
    for (uint32 i = 0; i < 2 * kBatch; ++i) {
      const uint32 b = i / 2, at = 4 * (first + b) + i % 2;
      if (first + b >= kTokens / 8) break;
      const float scale = __uint_as_float(i % 2 ? s[b].y : s[b].x);
      const float gate = totals[at] * gate_scale * scale + gate_bias, up = totals[at + 2] * up_scale * scale + up_bias;
      const float v = gated(gate, up) * __uint_as_float(i % 2 ? w[b].y : w[b].x);
      // E4M3 has no Inf, and saturation would turn one into 448; fmaxf passes over NaN.
      totals[at] = is_finite(v) ? v : __uint_as_float(0x7fffffff);
      magnitudes[i] = fabsf(totals[at]);
    }
    const float largest = max_over_lane_groups(magnitudes);
    const uint32 token = 8 * (first + tile.lane_group() / 2) + 2 * tile.lane_in_group() + tile.lane_group() % 2;
    if (token < kTokens) ptx::st_shared_float(values.maxima(tile.warp()) + token * 4, fmaxf(largest, 0.0f));
  }
  ptx::barrier_sync<128>(barrier);

  // One thread per token agrees on the exponent, publishes it, and leaves its inverse where the scale was.
#pragma unroll
  for (uint32 i = 0; i < ceil_div(kTokens, 128); ++i) {
    const uint32 token = tile.thread() + i * 128;
    if (token < kTokens) {
      float amax = 0.0f;
#pragma unroll
      for (uint32 warp = 0; warp < 4; ++warp) amax = fmaxf(amax, ptx::ld_shared_float(values.maxima(warp) + token * 4));
      const uint32 e = ceil_exponent(amax);
      ptx::st_shared_float(values.scales + token * 4, exponent_to_float(254 - e));
      if (token < tile.num_tokens) p.a_sf[uint64(tile.first_row + token) * (p.n / 64) + tile.row_block] = e;
    }
  }
  ptx::barrier_sync<128>(barrier);

  const uint32 channel = tile.warp() * 8 + tile.lane_group();
#pragma unroll
  for (uint32 first = 0; first < kTokens / 8; first += kBatch) {
    ptx::Words2 inverse[kBatch];
#pragma unroll
    for (uint32 b = 0; b < kBatch; ++b)
      if (first + b < kTokens / 8)
        inverse[b] = ptx::ld_shared_64(values.scales + (8 * (first + b) + 2 * tile.lane_in_group()) * 4);
#pragma unroll
    for (uint32 b = 0; b < kBatch; ++b) {
      const uint32 j = first + b, token = 8 * j + 2 * tile.lane_in_group();
      if (j >= kTokens / 8) break;
      const uint32 codes = ptx::pack_e4m3(totals[4 * j] * __uint_as_float(inverse[b].x), totals[4 * j + 1] * __uint_as_float(inverse[b].y));
      ptx::st_shared_byte(staging + token * kPitch + channel, codes & 0xff);
      ptx::st_shared_byte(staging + (token + 1) * kPitch + channel, codes >> 8);
    }
  }
  ptx::barrier_sync<128>(barrier);
#pragma unroll
  for (uint32 i = 0; i < ceil_div(kTokens, 64); ++i) {
    const uint32 token = i * 64 + tile.thread() / 2, half = tile.thread() % 2;
    if (token < tile.num_tokens) {
      const ptx::Words4 v = ptx::ld_shared_128(staging + token * kPitch + half * 16);
      uint8* to = p.a_codes + uint64(tile.first_row + token) * (p.n / 2) + tile.row_block * kChannels + half * 16;
      *reinterpret_cast<uint4*>(to) = make_uint4(v.x, v.y, v.z, v.w);
    }
  }
}

}  // namespace megamoe
