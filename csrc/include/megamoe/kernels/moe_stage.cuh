// moe_stage: a call's tokens and routing into this rank's arena, then inputs_ready to every rank. roles/stage_tokens.cuh quantises and
// folds the tokens.
//
// Raises the epoch: every launch is a call, a graph replay too. Any number of blocks; the last to finish publishes.
#pragma once

#include <megamoe/ptx/control.cuh>
#include <megamoe/roles/stage_tokens.cuh>
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

// Indices go out as they are; whoever reads them skips those that name no expert.
template <class Layout, class Config>
MEGAMOE_DEVICE void stage_routing(const MoeStageParams& p) {
  int64* idx_out = p.symm.at<&Layout::topk_idx>(p.symm.rank, 0, 0);
  float* weights_out = p.symm.at<&Layout::topk_weights>(p.symm.rank, 0, 0);
  const uint32 count = p.num_tokens * Config::kNumTopk;
  for (uint32 i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const int64 idx = p.topk_idx[i];
    const float weight = p.topk_weights[i];
    if (idx < -1 || idx >= Config::kNumExperts) p.calls.note_bad_index(i / Config::kNumTopk, i % Config::kNumTopk);
    idx_out[i] = idx;
    weights_out[i] = weight;
  }
}

template <class Layout, class Config, class Share>
MEGAMOE_DEVICE void stage_call(const MoeStageParams& p, Share share) {
  share.fetch(blockIdx.x, p.num_tokens);  // here, so that the other reads of a short call are not one round trip after the other
  const int64 epoch = p.calls.epoch() + 1;
  const bool is_failed = p.calls.is_failed(epoch);  // then the arena needs a reset, and peers may still read what is in it
  if (!is_failed) {
    stage_routing<Layout, Config>(p);
    stage_tokens<Config>(share, p.symm.at<&Layout::x_sf>(p.symm.rank, 0, 0), p.num_tokens);
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

template <class Layout, class Config>
MEGAMOE_DEVICE void moe_stage(const MoeStageParams& p) {
  ptx::launch_dependents();
  E4m3* x = p.symm.at<&Layout::x>(p.symm.rank, 0, 0);
  if (p.is_quantized) {
    const void* codes = p.x == nullptr ? x : p.x;
    const uint8* sf = p.x_sf == nullptr ? p.symm.at<&Layout::x_sf>(p.symm.rank, 0, 0) : p.x_sf;
    stage_call<Layout, Config>(p, CodesShare<Config>{static_cast<const uint4*>(codes), sf, reinterpret_cast<uint4*>(x)});
  } else {
    stage_call<Layout, Config>(p, Bf16Share<Config>{static_cast<const uint4*>(p.x), reinterpret_cast<uint2*>(x)});
  }
}

}  // namespace megamoe
