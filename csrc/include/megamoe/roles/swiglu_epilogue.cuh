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

  // Loops over all tokens, one for each step: shared accesses stay in program order, so a loop over batches with all steps in it would wait
  // for the whole chain of latencies once per batch.
  constexpr uint32 kBlocks = kTokens / 8, kBatches = ceil_div(kBlocks, 4);  // 8 tokens, of which a thread has two; 32 tokens
  const float gate_scale = tile.row_scale(0), up_scale = tile.row_scale(1);
  const SwigluGate gated(p.limit, p.alpha, p.up_bias);
  const auto offset_of = [](uint32 block) { return (8 * block + 2 * EpilogueTile::lane_in_group()) * 4; };
  // The activated values take the place of the gate sums: totals[4 j] and totals[4 j + 1] are this thread's channel of two tokens.
#pragma unroll
  for (uint32 j = 0; j < kBlocks; ++j) {
    const ptx::Words2 s = ptx::ld_shared_64(values.scales + offset_of(j)), w = ptx::ld_shared_64(values.weights() + offset_of(j));
#pragma unroll
    for (uint32 i = 0; i < 2; ++i) {
      const float scale = __uint_as_float(i ? s.y : s.x), weight = __uint_as_float(i ? w.y : w.x);
      const float gate = totals[4 * j + i] * gate_scale * scale + gate_bias, up = totals[4 * j + 2 + i] * up_scale * scale + up_bias;
      totals[4 * j + i] = inf_to_nan(gated(gate, up) * weight);
    }
  }
  float largest[kBatches];
#pragma unroll
  for (uint32 b = 0; b < kBatches; ++b) {
    float magnitudes[8] = {};
#pragma unroll
    for (uint32 i = 0; i < 8; ++i)
      if (4 * b + i / 2 < kBlocks) magnitudes[i] = fabsf(totals[4 * (4 * b + i / 2) + i % 2]);
    largest[b] = max_over_lane_groups(magnitudes);
  }
#pragma unroll
  for (uint32 b = 0; b < kBatches; ++b) {
    const uint32 token = 32 * b + 8 * (tile.lane_group() / 2) + 2 * tile.lane_in_group() + tile.lane_group() % 2;
    if (token < kTokens) ptx::st_shared_float(values.maxima(tile.warp()) + token * 4, fmaxf(largest[b], 0.0f));  // fmaxf passes over NaN
  }
  ptx::barrier_sync<128>(barrier);

  // One thread per token agrees on the exponent, publishes it, and leaves its inverse where the scale was.
  constexpr uint32 kMine = ceil_div(kTokens, 128);
  float amax[kMine] = {};
#pragma unroll
  for (uint32 i = 0; i < kMine; ++i)
    if (const uint32 token = tile.thread() + 128 * i; token < kTokens)
#pragma unroll
      for (uint32 warp = 0; warp < 4; ++warp) amax[i] = fmaxf(amax[i], ptx::ld_shared_float(values.maxima(warp) + token * 4));
#pragma unroll
  for (uint32 i = 0; i < kMine; ++i) {
    const uint32 token = tile.thread() + 128 * i, e = ceil_exponent(amax[i]);
    if (token < kTokens) ptx::st_shared_float(values.scales + token * 4, exponent_to_float(254 - e));
    if (token < tile.num_tokens) p.a_sf[uint64(tile.first_row + token) * (p.n / 64) + tile.row_block] = e;
  }
  ptx::barrier_sync<128>(barrier);

  const uint32 channel = tile.warp() * 8 + tile.lane_group();
  ptx::Words2 inverse[kBlocks];
#pragma unroll
  for (uint32 j = 0; j < kBlocks; ++j) inverse[j] = ptx::ld_shared_64(values.scales + offset_of(j));
#pragma unroll
  for (uint32 j = 0; j < kBlocks; ++j) {
    const uint32 to = staging + (8 * j + 2 * tile.lane_in_group()) * kPitch + channel;
    const uint32 codes = ptx::pack_e4m3(totals[4 * j] * __uint_as_float(inverse[j].x), totals[4 * j + 1] * __uint_as_float(inverse[j].y));
    ptx::st_shared_byte(to, codes & 0xff);
    ptx::st_shared_byte(to + kPitch, codes >> 8);
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
