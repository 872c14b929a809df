// moe_pull: the rows of one pass from the ranks their tokens live on, which folded them to one exponent, into the pool.
//
// One warp per row: all loads of a row are in flight together, since each takes a round trip over NVLink.
#pragma once

#include <megamoe/comm/symm.cuh>
#include <megamoe/ptx/memory.cuh>

namespace megamoe {

struct MoePullParams {
  Symm symm;
  const int32* row_entry;  // [P] entries of this pass's rows: src * T * K + token * K + slot, with T = max_tokens
  const int32* bounds;     // [2] 0 and the number of rows of this pass
  uint8* codes;            // [P, H] E4M3
  uint8* sf;               // [P] UE8M0
  float* row_weight;       // [P]
  uint64* row_dst;         // [P] address of the row's place in the partials of its source rank
};

constexpr uint32 kPullWarps = 8;

// Grid: any number of blocks of kPullWarps warps.
template <class Layout, class Config>
MEGAMOE_DEVICE void moe_pull(const MoePullParams& p) {
  constexpr uint32 kEntriesPerRank = Config::kMaxTokens * Config::kNumTopk;
  constexpr uint32 kVectors = Config::kHidden / 16, kInFlight = min_of(ceil_div(kVectors, 32), 16);
  const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_rows = p.bounds[1];

  // Neighbouring rows go to different blocks, so that a few rows are spread over all SMs.
  for (uint32 row = blockIdx.x + gridDim.x * warp; row < num_rows; row += gridDim.x * kPullWarps) {
    const uint32 entry = p.row_entry[row], src = entry / kEntriesPerRank;
    const uint32 token = entry % kEntriesPerRank / Config::kNumTopk, slot = entry % Config::kNumTopk;
    const auto* from = reinterpret_cast<const uint4*>(p.symm.at<&Layout::x>(src, token, 0));
    auto* to = reinterpret_cast<uint4*>(p.codes + uint64(row) * Config::kHidden);

    uint32 sf = 0;
    float weight = 0.0f;
    if (lane == 0) {
      sf = ptx::ld_early_byte(p.symm.at<&Layout::x_sf>(src, token, 0));
      weight = *p.symm.at<&Layout::topk_weights>(src, token, slot);
    }
#pragma unroll 1
    for (uint32 first = lane; first - lane < kVectors; first += 32 * kInFlight) {
      uint4 v[kInFlight];
#pragma unroll
      for (uint32 i = 0; i < kInFlight; ++i)
        if (first + 32 * i < kVectors) v[i] = ptx::ld_stream_128(from + first + 32 * i);
#pragma unroll
      for (uint32 i = 0; i < kInFlight; ++i)
        if (first + 32 * i < kVectors) to[first + 32 * i] = v[i];
    }
    if (lane == 0) {
      p.sf[row] = sf;
      p.row_weight[row] = weight;
      p.row_dst[row] = reinterpret_cast<uint64>(p.symm.at<&Layout::partials>(src, token, slot, 0));
    }
  }
}

}  // namespace megamoe
