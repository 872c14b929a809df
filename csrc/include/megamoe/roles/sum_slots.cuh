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

// A thread sums this many vectors of a token at once: 8 channels each, half a token apart. 8192 tokens of 6 slots take 122 us with two at
// H = 4096, 3.9 TB/s (H200, timeline at abaeee4), and took 272 us with one at H = 7168, 3.0 TB/s (2173110).
constexpr uint32 kVectorsAtOnce = 2;

// The slots of a token: fetched, then asked which of them name an expert, a bit each. Up to `kMostHeld` indices stay as they come, so that
// nothing waits for them in `fetch`.
template <class Layout, class Config, uint32 kMostHeld>
struct TokenSlots {
  static_assert(Config::kNumTopk <= 32);
  static constexpr bool kHoldsIndices = Config::kNumTopk <= kMostHeld;
  int64 topk_idx[kHoldsIndices ? Config::kNumTopk : 1];
  uint32 bits = 0;

  MEGAMOE_DEVICE void fetch(const Symm& symm, uint32 token) {
    const int64* from = symm.at<&Layout::topk_idx>(symm.rank, token, 0);
    if constexpr (kHoldsIndices) {
#pragma unroll
      for (uint32 slot = 0; slot < Config::kNumTopk; ++slot) topk_idx[slot] = from[slot];
    } else {
      bits = routed_of(from);
    }
  }

  MEGAMOE_DEVICE uint32 routed() const { return kHoldsIndices ? routed_of(topk_idx) : bits; }

 private:
  static MEGAMOE_DEVICE uint32 routed_of(const int64* indices) {
    uint32 slots = 0;
#pragma unroll 8
    for (uint32 slot = 0; slot < Config::kNumTopk; ++slot)
      slots |= uint32(static_cast<uint64>(indices[slot]) < Config::kNumExperts) << slot;
    return slots;
  }
};

// Vectors `first` and first + kHidden / 16 of the sum over a token's `slots`.
template <class Layout, class Config>
MEGAMOE_DEVICE void sum_of_slots(const Symm& symm, uint32 token, uint32 slots, uint32 first, uint4 (&y)[kVectorsAtOnce]) {
  constexpr uint32 kVectors = Config::kHidden / 8, kInFlight = min_of(Config::kNumTopk, 8);
  const auto* partials = reinterpret_cast<const uint4*>(symm.at<&Layout::partials>(symm.rank, token, 0, 0)) + first;
  float sums[kVectorsAtOnce][8] = {};
#pragma unroll 1
  for (uint32 slot = 0; slot < Config::kNumTopk; slot += kInFlight) {
    uint4 v[kInFlight][kVectorsAtOnce];
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i)
#pragma unroll
      for (uint32 j = 0; j < kVectorsAtOnce; ++j)
        if (slots >> (slot + i) & 1) v[i][j] = ptx::ld_stream_128(partials + uint64(slot + i) * kVectors + j * (kVectors / kVectorsAtOnce));
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i)
#pragma unroll
      for (uint32 j = 0; j < kVectorsAtOnce; ++j)
        if (slots >> (slot + i) & 1) add_bf16(sums[j], v[i][j]);
  }
#pragma unroll
  for (uint32 j = 0; j < kVectorsAtOnce; ++j)
    y[j] = make_uint4(ptx::pack_bf16(sums[j][0], sums[j][1]), ptx::pack_bf16(sums[j][2], sums[j][3]),
                      ptx::pack_bf16(sums[j][4], sums[j][5]), ptx::pack_bf16(sums[j][6], sums[j][7]));
}

// y [num_tokens, H] of this rank: the sums, or NaN after a failure. By thread `thread` of `num_threads`; kMostHeld as its registers allow.
template <class Layout, class Config, uint32 kMostHeld>
MEGAMOE_DEVICE void sum_tokens(const Symm& symm, Bf16* y, uint32 num_tokens, bool is_good, uint32 thread, uint32 num_threads) {
  constexpr uint32 kVectors = Config::kHidden / 8, kPerToken = kVectors / kVectorsAtOnce, kNan = 0x7fc07fc0;
  static_assert(kVectors % kVectorsAtOnce == 0);
  const uint64 num_items = uint64(num_tokens) * kPerToken;
  TokenSlots<Layout, Config, kMostHeld> slots;
  if (is_good && thread < num_items) slots.fetch(symm, thread / kPerToken);
  for (uint64 i = thread; i < num_items; i += num_threads) {
    const uint32 token = i / kPerToken, first = i % kPerToken, routed = slots.routed();
    // They are on their way while this item is summed.
    if (is_good && i + num_threads < num_items) slots.fetch(symm, (i + num_threads) / kPerToken);
    uint4 sums[kVectorsAtOnce];
    if (is_good) sum_of_slots<Layout, Config>(symm, token, routed, first, sums);
    auto* to = reinterpret_cast<uint4*>(y) + uint64(token) * kVectors + first;
#pragma unroll
    for (uint32 j = 0; j < kVectorsAtOnce; ++j) to[j * kPerToken] = is_good ? sums[j] : make_uint4(kNan, kNan, kNan, kNan);
  }
}

}  // namespace megamoe
