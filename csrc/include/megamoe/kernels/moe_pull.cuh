// moe_pull: the rows of one pass from the ranks their tokens live on into the pool, folded to one exponent per token on the way.
//
// One warp per row: all loads of a row are in flight together, since each takes a round trip over NVLink.
#pragma once

#include <megamoe/comm/symm.cuh>
#include <megamoe/fold_codes.cuh>
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
  constexpr uint32 kGroups = Config::kHidden / 32, kVectors = Config::kHidden / 16;
  constexpr uint32 kInFlight = min_of(ceil_div(kVectors, 32), 16), kSfPerLane = ceil_div(kGroups, 32);
  __shared__ uint8 staged_sf[kPullWarps][kGroups];
  const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_rows = p.bounds[1];
  uint8* sf = staged_sf[warp];

  // Neighbouring rows go to different blocks, so that a few rows are spread over all SMs.
  for (uint32 row = blockIdx.x + gridDim.x * warp; row < num_rows; row += gridDim.x * kPullWarps) {
    const uint32 entry = p.row_entry[row], src = entry / kEntriesPerRank;
    const uint32 token = entry % kEntriesPerRank / Config::kNumTopk, slot = entry % Config::kNumTopk;
    const auto* from = reinterpret_cast<const uint4*>(p.symm.at<&Layout::x>(src, token, 0));
    const uint8* from_sf = p.symm.at<&Layout::x_sf>(src, token, 0);
    auto* to = reinterpret_cast<uint4*>(p.codes + uint64(row) * Config::kHidden);

    uint32 group_sf[kSfPerLane], largest = 0;
    uint4 v[kInFlight];
#pragma unroll
    for (uint32 i = 0; i < kSfPerLane; ++i) group_sf[i] = 32 * i + lane < kGroups ? ptx::ld_early_byte(from_sf + 32 * i + lane) : 0;
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i)
      if (32 * i + lane < kVectors) v[i] = ptx::ld_stream_128(from + 32 * i + lane);
    if (lane == 0) {
      p.row_weight[row] = *p.symm.at<&Layout::topk_weights>(src, token, slot);
      p.row_dst[row] = reinterpret_cast<uint64>(p.symm.at<&Layout::partials>(src, token, slot, 0));
    }
#pragma unroll
    for (uint32 i = 0; i < kSfPerLane; ++i) {
      if (32 * i + lane < kGroups) sf[32 * i + lane] = group_sf[i];
      largest = group_sf[i] > largest ? group_sf[i] : largest;
    }
    largest = __reduce_max_sync(~0u, largest);
    if (lane == 0) p.sf[row] = largest;
    __syncwarp();

    for (uint32 first = lane;;) {
#pragma unroll
      for (uint32 i = 0; i < kInFlight; ++i)
        if (first + 32 * i < kVectors) to[first + 32 * i] = fold_codes(v[i], largest - sf[(first + 32 * i) / 2]);
      first += 32 * kInFlight;
      if (first - lane >= kVectors) break;
#pragma unroll
      for (uint32 i = 0; i < kInFlight; ++i)
        if (first + 32 * i < kVectors) v[i] = ptx::ld_stream_128(from + first + 32 * i);
    }
    __syncwarp();  // all lanes have read the staged scales before the next row's take their place
  }
}

}  // namespace megamoe
