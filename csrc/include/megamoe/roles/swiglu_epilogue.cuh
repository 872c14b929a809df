// Epilogue swiglu (linear 1): bias, clamp, gate, row weight, then E4M3 with one UE8M0 exponent per 32 channels (act_group 32).
//
// Gate and up rows are interleaved by 8, so one thread holds both of a channel. A warpgroup's 64 rows are 32 channels, one group: it never
// leaves the warpgroup. The fragment is channel-major, the output token-major: the activated values go through shared memory, from where
// two threads each take a token, agree on its exponent and write its 32 codes. The maximum over lanes and warps before that exchange, then
// an exchange of codes, took a fifth more instructions and two barriers more.
#pragma once

#include <megamoe/e4m3.cuh>
#include <megamoe/roles/store_epilogue.cuh>
#include <megamoe/swiglu.cuh>

namespace megamoe {

// Sixteen channels of a token, half of its group; the other half is the neighbouring lane's.
struct HalfGroup {
  ptx::Words4 quads[4];  // FP32

  MEGAMOE_DEVICE void load(uint32 address) {
#pragma unroll
    for (uint32 i = 0; i < 4; ++i) quads[i] = ptx::ld_shared_128(address + 16 * i);
  }

  // Of the whole group. By all lanes; fmaxf passes over NaN.
  MEGAMOE_DEVICE uint32 exponent() const {
    float amax = 0.0f;
#pragma unroll
    for (const ptx::Words4& q : quads)
      amax = fmaxf(fmaxf(fmaxf(amax, magnitude(q.x)), fmaxf(magnitude(q.y), magnitude(q.z))), magnitude(q.w));
    return ceil_exponent(fmaxf(amax, __shfl_xor_sync(~0u, amax, 1)));
  }

  MEGAMOE_DEVICE uint4 codes(float inverse) const {
    uint32 words[4];
#pragma unroll
    for (uint32 i = 0; i < 4; ++i)
      words[i] = pair(quads[i].x, quads[i].y, inverse) | pair(quads[i].z, quads[i].w, inverse) << 16;
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

 private:
  static MEGAMOE_DEVICE float magnitude(uint32 bits) { return fabsf(__uint_as_float(bits)); }
  static MEGAMOE_DEVICE uint32 pair(uint32 low, uint32 high, float inverse) {
    return ptx::pack_e4m3(__uint_as_float(low) * inverse, __uint_as_float(high) * inverse);
  }
};

template <class Config, uint32 kTokens>
MEGAMOE_DEVICE void swiglu_epilogue(float (&totals)[kTokens / 2], const Fp4GemmParams& p, const EpilogueTile& tile, uint32 base,
                                     uint32 warpgroup) {
  using Plan = SmemPlan<Config>;
  constexpr uint32 kChannels = 32, kPitch = Plan::kStagingPitch;
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
  // After this barrier the tokens' values are there and the warpgroup has finished reading the staging of its last tile.
  ptx::barrier_sync<128>(barrier);

  // Each step for all tokens before the next one: shared accesses stay in program order, so a loop over batches with all steps in it would
  // wait for the whole chain of latencies once per batch.
  const float gate_scale = tile.row_scale(0), up_scale = tile.row_scale(1);
  const SwigluGate gated(p.limit, p.alpha, p.up_bias);
  // The activated values take the place of the gate sums: totals[4 j] and totals[4 j + 1] are this thread's channel of two tokens.
#pragma unroll
  for (uint32 j = 0; j < kTokens / 8; ++j) {
    const uint32 offset = (8 * j + 2 * tile.lane_in_group()) * 4;
    const ptx::Words2 s = ptx::ld_shared_64(values.scales + offset), w = ptx::ld_shared_64(values.weights() + offset);
#pragma unroll
    for (uint32 i = 0; i < 2; ++i) {
      const float scale = __uint_as_float(i ? s.y : s.x), weight = __uint_as_float(i ? w.y : w.x);
      const float gate = totals[4 * j + i] * gate_scale * scale + gate_bias, up = totals[4 * j + 2 + i] * up_scale * scale + up_bias;
      totals[4 * j + i] = inf_to_nan(gated(gate, up) * weight);
    }
  }
  const uint32 place = staging + 2 * tile.lane_in_group() * kPitch + (tile.warp() * 8 + tile.lane_group()) * 4;
#pragma unroll
  for (uint32 j = 0; j < kTokens / 8; ++j)
#pragma unroll
    for (uint32 i = 0; i < 2; ++i) ptx::st_shared_float(place + (8 * j + i) * kPitch, totals[4 * j + i]);
  ptx::barrier_sync<128>(barrier);

  constexpr uint32 kMine = ceil_div(kTokens, 64);
  const uint32 first = tile.thread() / 2, half = tile.thread() % 2;
  HalfGroup groups[kMine];
#pragma unroll
  for (uint32 i = 0; i < kMine; ++i)  // what is read for tokens that the tile has not got goes nowhere
    groups[i].load(staging + min_of(first + 64 * i, kTokens - 1) * kPitch + half * (kChannels / 2 * 4));
#pragma unroll
  for (uint32 i = 0; i < kMine; ++i) {
    const uint32 token = first + 64 * i, e = groups[i].exponent();
    if (token >= tile.num_tokens) continue;
    const uint64 row = tile.first_row + token;
    *reinterpret_cast<uint4*>(p.a_codes + row * (p.n / 2) + tile.row_block * kChannels + half * (kChannels / 2)) =
        groups[i].codes(exponent_to_float(254 - e));
    if (half == 0) p.a_sf[row * (p.n / 64) + tile.row_block] = e;
  }
}

}  // namespace megamoe
