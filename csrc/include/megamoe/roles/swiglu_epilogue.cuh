// Epilogue swiglu (linear 1): bias, clamp, gate, row weight, then E4M3 with one UE8M0 exponent per 32 channels (act_group 32).
//
// Gate and up rows are interleaved by 8, so one thread holds both of a channel: no exchange before the maximum. A warpgroup's 64 rows are
// 32 channels, one group: the maximum runs over 8 lanes and 4 warps, and never leaves the warpgroup.
#pragma once

#include <megamoe/e4m3.cuh>
#include <megamoe/roles/store_epilogue.cuh>

namespace megamoe {

// Magnitude for the maximum, in which NaN and Inf do not take part.
MEGAMOE_DEVICE float finite_magnitude(float v) {
  const float m = fabsf(v);
  return m <= kFloatMax ? m : 0.0f;
}

// Clamps propagate NaN: a comparison with NaN is false.
MEGAMOE_DEVICE float clamp_above(float v, float limit) { return v > limit ? limit : v; }
MEGAMOE_DEVICE float clamp_below(float v, float limit) { return v < limit ? limit : v; }

MEGAMOE_DEVICE float gated(float gate, float up, const Fp4GemmParams& p) {
  gate = clamp_above(gate, p.limit);
  up = clamp_below(clamp_above(up, p.limit), -p.limit);
  // The exact division has a slow path that is a call, and a call anywhere in a math role costs spills.
  return __fdividef(gate, 1.0f + __expf(-p.alpha * gate)) * (up + p.up_bias);
}

// value * 2^(127 - e), Inf turned into NaN, since E4M3 has no Inf and saturation would hide it.
MEGAMOE_DEVICE float scaled_for_e4m3(float v, float inverse) {
  const float s = v * inverse;
  return is_finite(s) ? s : __int_as_float(0x7fffffff);
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
  // batches: shared accesses stay in program order, and eight tokens at a time would expose the latency of the whole chain to the maximum.
  constexpr uint32 kBatch = 4;
#pragma unroll
  for (uint32 first = 0; first < kTokens / 8; first += kBatch) {
    constexpr auto offset_of = [](uint32 j) { return (8 * j + 2 * EpilogueTile::lane_in_group()) * 4; };
    ptx::Words2 s[kBatch], w[kBatch];
#pragma unroll
    for (uint32 b = 0; b < kBatch; ++b) {
      if (first + b >= kTokens / 8) break;
      s[b] = ptx::ld_shared_64(values.scales + offset_of(first + b));
      w[b] = ptx::ld_shared_64(values.weights() + offset_of(first + b));
    }
    float largest[kBatch][2] = {};
#pragma unroll
    for (uint32 b = 0; b < kBatch; ++b) {
      if (first + b >= kTokens / 8) break;
#pragma unroll
      for (uint32 i = 0; i < 2; ++i) {
        const uint32 at = 4 * (first + b) + i;
        const float scale = __uint_as_float(i ? s[b].y : s[b].x);
        const float gate = totals[at] * gate_scale * scale + gate_bias, up = totals[at + 2] * up_scale * scale + up_bias;
        totals[at] = gated(gate, up, p) * __uint_as_float(i ? w[b].y : w[b].x);
        largest[b][i] = finite_magnitude(totals[at]);
      }
    }
#pragma unroll
    for (uint32 step = 4; step < 32; step *= 2)
#pragma unroll
      for (uint32 b = 0; b < kBatch; ++b)
#pragma unroll
        for (uint32 i = 0; i < 2; ++i)
          if (first + b < kTokens / 8) largest[b][i] = fmaxf(largest[b][i], __shfl_xor_sync(~0u, largest[b][i], step));
    if (tile.lane_group() == 0) {
#pragma unroll
      for (uint32 b = 0; b < kBatch; ++b) {
        if (first + b >= kTokens / 8) break;
        ptx::st_shared_float(values.maxima(tile.warp()) + offset_of(first + b), largest[b][0]);
        ptx::st_shared_float(values.maxima(tile.warp()) + offset_of(first + b) + 4, largest[b][1]);
      }
    }
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
      const uint32 codes = ptx::pack_e4m3(scaled_for_e4m3(totals[4 * j], __uint_as_float(inverse[b].x)),
                                          scaled_for_e4m3(totals[4 * j + 1], __uint_as_float(inverse[b].y)));
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
