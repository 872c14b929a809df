// moe_combine: tells every rank that its inputs are read and its partials pushed, waits for the same from all, and sums the slots.
//
// y[t] = partials[t, 0] + partials[t, 1] + ... in FP32, in slot order; slots that name no expert are skipped. A call that has failed still
// tells, so that no rank waits for it at the end of the call, and gives NaN.
#pragma once

#include <megamoe/ptx/numeric.cuh>
#include <megamoe/sync/peer_wait.cuh>

namespace megamoe {

struct MoeCombineParams {
  Symm symm;
  CallStateParams calls;
  Bf16* y;  // [T, H]
  uint32 num_tokens;
};

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

// Whether the call succeeds, for all threads. Block 0 posts before it waits, so it does not depend on other blocks having a place to run.
// Ranks that gave up post combine_ready too, after the abort word of the one that saw the reason first: a rank that comes late finds every
// signal of the call there and must not take their partials for results.
template <class Layout>
MEGAMOE_DEVICE bool meet_peers(const MoeCombineParams& p) {
  const int64 epoch = p.calls.epoch();
  bool is_good = !p.calls.is_failed(epoch);
  if (blockIdx.x == 0) post_to_peers<&Layout::combine_ready>(p.symm, epoch);
  if (is_good && threadIdx.x < p.symm.num_ranks)
    is_good = wait_for_peer<Layout, &Layout::combine_ready>(p.symm, p.calls, epoch, CallPhase::kCombine, threadIdx.x) &&
              !has_aborted<Layout>(p.symm, p.calls, epoch, CallPhase::kCombine, threadIdx.x);
  return __syncthreads_and(is_good);
}

// Grid: any number of blocks of at least Symm::kMaxRanks threads. One thread makes 16 bytes of y.
template <class Layout, class Config>
MEGAMOE_DEVICE void moe_combine(const MoeCombineParams& p) {
  constexpr uint32 kVectors = Config::kHidden / 8, kNan = 0x7fc07fc0;
  const bool is_good = meet_peers<Layout>(p);
  const uint64 num_vectors = uint64(p.num_tokens) * kVectors;
  for (uint64 i = uint64(blockIdx.x) * blockDim.x + threadIdx.x; i < num_vectors; i += uint64(gridDim.x) * blockDim.x) {
    const uint32 token = i / kVectors, vector = i % kVectors;
    reinterpret_cast<uint4*>(p.y)[i] = is_good ? sum_of_slots<Layout, Config>(p.symm, token, vector) : make_uint4(kNan, kNan, kNan, kNan);
  }
}

}  // namespace megamoe
