// moe_stage: a call's tokens and routing into this rank's arena, quantised on the way, then inputs_ready to every rank.
//
// Raises the epoch: every launch is a call, a graph replay too. Runs on all blocks; the last to finish publishes.
#pragma once

#include <megamoe/e4m3.cuh>
#include <megamoe/sync/last_block.cuh>
#include <megamoe/sync/peer_wait.cuh>

namespace megamoe {

struct MoeStageParams {
  Symm symm;
  CallStateParams calls;
  const void* x;              // [T, H] BF16, or E4M3 codes; null: the codes are in the arena already
  const uint8* x_sf;          // [T, H/32] UE8M0 of the codes; null: in the arena already
  const int64* topk_idx;      // [T, K], may be in the arena
  const float* topk_weights;  // [T, K], may be in the arena
  uint32* num_arrived;        // of arrive_last
  uint32 num_tokens;
  uint32 is_quantized;        // whether x is codes
};

constexpr uint32 kStageVectors = 4;  // per thread in flight: 16 bytes each

// Eight channels per lane, a group of 32 in four lanes. Rows follow each other and are whole groups, so token boundaries do not matter.
template <class Layout, class Config>
MEGAMOE_DEVICE void stage_quantized(const MoeStageParams& p) {
  const uint64 num_vectors = uint64(p.num_tokens) * (Config::kHidden / 8), step = uint64(gridDim.x) * blockDim.x * kStageVectors;
  const auto* x = static_cast<const uint4*>(p.x);
  auto* codes = reinterpret_cast<uint2*>(p.symm.at<&Layout::x>(p.symm.rank, 0, 0));
  uint8* sf = p.symm.at<&Layout::x_sf>(p.symm.rank, 0, 0);
  const uint32 lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler sees that the loop is uniform
  for (uint64 first = (uint64(blockIdx.x) * blockDim.x + warp * 32) * kStageVectors; first < num_vectors; first += step) {
    uint4 raw[kStageVectors];
#pragma unroll
    for (uint32 i = 0; i < kStageVectors; ++i) {
      const uint64 vector = first + 32 * i + lane;
      raw[i] = vector < num_vectors ? ptx::ld_stream_128(x + vector) : make_uint4(0, 0, 0, 0);
    }
    Channels channels[kStageVectors];
    float amax[kStageVectors];
    bool all_finite = true;
#pragma unroll
    for (uint32 i = 0; i < kStageVectors; ++i) {
      channels[i] = Packed<Bf16>{raw[i]}.unpack();
      amax[i] = channels[i].largest();
      all_finite = all_finite && is_finite(amax[i]);
    }
    if (!__all_sync(~0u, all_finite)) {
#pragma unroll
      for (uint32 i = 0; i < kStageVectors; ++i) {
        amax[i] = channels[i].largest_finite();
        channels[i].turn_inf_into_nan();
      }
    }
#pragma unroll
    for (uint32 i = 0; i < kStageVectors; ++i) {
      const uint64 vector = first + 32 * i + lane;
      amax[i] = fmaxf(amax[i], __shfl_xor_sync(~0u, amax[i], 1));
      amax[i] = fmaxf(amax[i], __shfl_xor_sync(~0u, amax[i], 2));
      const uint32 e = ceil_exponent(amax[i]);
      if (vector < num_vectors) {
        codes[vector] = channels[i].codes(inverse_scale(e));
        if (lane % 4 == 0) sf[vector / 4] = e;
      }
    }
  }
}

template <class T>
MEGAMOE_DEVICE void copy_to_arena(T* to, const T* from, uint64 count) {
  const uint64 step = uint64(gridDim.x) * blockDim.x;
  for (uint64 first = uint64(blockIdx.x) * blockDim.x + threadIdx.x; first < count; first += kStageVectors * step) {
    T v[kStageVectors];
#pragma unroll
    for (uint32 i = 0; i < kStageVectors; ++i)
      if (first + i * step < count) v[i] = from[first + i * step];
#pragma unroll
    for (uint32 i = 0; i < kStageVectors; ++i)
      if (first + i * step < count) to[first + i * step] = v[i];
  }
}

template <class Layout, class Config>
MEGAMOE_DEVICE void stage_tokens(const MoeStageParams& p) {
  const uint64 num_groups = uint64(p.num_tokens) * (Config::kHidden / 32);
  if (p.x != nullptr && !p.is_quantized) {
    stage_quantized<Layout, Config>(p);
  } else if (p.x != nullptr) {
    copy_to_arena(reinterpret_cast<uint4*>(p.symm.at<&Layout::x>(p.symm.rank, 0, 0)), static_cast<const uint4*>(p.x), 2 * num_groups);
  }
  if (p.x_sf != nullptr) copy_to_arena(p.symm.at<&Layout::x_sf>(p.symm.rank, 0, 0), p.x_sf, num_groups);
}

// Indices go out as they are; whoever reads them skips those that name no expert.
template <class Layout, class Config>
MEGAMOE_DEVICE void stage_routing(const MoeStageParams& p) {
  int64* idx_out = p.symm.at<&Layout::topk_idx>(p.symm.rank, 0, 0);
  float* weights_out = p.symm.at<&Layout::topk_weights>(p.symm.rank, 0, 0);
  const uint32 count = p.num_tokens * Config::kNumTopk;
  for (uint32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const int64 idx = p.topk_idx[i];
    if (idx < -1 || idx >= Config::kNumExperts) p.calls.note_bad_index(i / Config::kNumTopk, i % Config::kNumTopk);
    idx_out[i] = idx;
    weights_out[i] = p.topk_weights[i];
  }
}

template <class Layout, class Config>
MEGAMOE_DEVICE void moe_stage(const MoeStageParams& p) {
  const int64 epoch = p.calls.epoch() + 1;
  const bool is_failed = p.calls.is_failed(epoch);  // then the arena needs a reset, and peers may still read what is in it
  if (!is_failed) {
    stage_routing<Layout, Config>(p);
    stage_tokens<Layout, Config>(p);
  }
  if (!arrive_last(p.num_arrived)) return;
  if (threadIdx.x == 0) {
    p.calls.set_epoch(epoch);
    if (!is_failed) {
      *p.symm.at<&Layout::num_tokens>(p.symm.rank, 0) = p.num_tokens;
      p.calls.report_bad_indices(epoch, [&](uint32 token, uint32 slot) { return *p.symm.at<&Layout::topk_idx>(p.symm.rank, token, slot); });
    }
  }
  __syncthreads();
  if (!is_failed) post_to_peers<&Layout::inputs_ready>(p.symm, epoch);
}

}  // namespace megamoe
