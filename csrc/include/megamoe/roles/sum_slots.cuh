// The end of a call: the partials of a token's slots, added in FP32 in slot order; slots that name no expert are skipped.
#pragma once

#include <megamoe/comm/symm.cuh>
#include <megamoe/ptx/memory.cuh>
#include <megamoe/ptx/numeric.cuh>

namespace megamoe {

MEGAMOE_DEVICE void add_bf16(float (&sum)[8], uint4 v) {
  sum[0] += ptx::bf16_low(v.x), sum[1] += ptx::bf16_high(v.x), sum[2] += ptx::bf16_low(v.y), sum[3] += ptx::bf16_high(v.y);
  sum[4] += ptx::bf16_low(v.z), sum[5] += ptx::bf16_high(v.z), sum[6] += ptx::bf16_low(v.w), sum[7] += ptx::bf16_high(v.w);
}

// Eight channels of the sum over a token's slots.
template <class Layout, class Config>
MEGAMOE_DEVICE uint4 sum_of_slots(const Symm& symm, uint32 token, uint32 vector) {
  constexpr uint32 kInFlight = min_of(Config::kNumTopk, 8);
  const int64* topk_idx = symm.at<&Layout::topk_idx>(symm.rank, token, 0);
  const auto* partials = reinterpret_cast<const uint4*>(symm.at<&Layout::partials>(symm.rank, token, 0, 0)) + vector;
  float sum[8] = {};
#pragma unroll 1
  for (uint32 first = 0; first < Config::kNumTopk; first += kInFlight) {
    bool is_routed[kInFlight];
    uint4 v[kInFlight];
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i)
      is_routed[i] = first + i < Config::kNumTopk && static_cast<uint64>(topk_idx[first + i]) < Config::kNumExperts;
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i)
      if (is_routed[i]) v[i] = ptx::ld_stream_128(partials + uint64(first + i) * (Config::kHidden / 8));
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i)
      if (is_routed[i]) add_bf16(sum, v[i]);
  }
  return make_uint4(ptx::pack_bf16(sum[0], sum[1]), ptx::pack_bf16(sum[2], sum[3]), ptx::pack_bf16(sum[4], sum[5]),
                    ptx::pack_bf16(sum[6], sum[7]));
}

}  // namespace megamoe
