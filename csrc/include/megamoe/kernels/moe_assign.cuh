// moe_assign: each entry that names one of this rank's experts -> its row, by a stable rank among the chunk's entries of that expert.
//
// One block per chunk. A warp owns neighbouring entries and counts per expert as it goes; the counts of the warps before it and the row at
// which moe_route lets the chunk begin complete the rank. So rows of an expert are ordered by source rank, from this one on, token, slot in
// every run.
#pragma once

#include <megamoe/comm/call_state.cuh>
#include <megamoe/ptx/control.cuh>
#include <megamoe/schedule/entry_chunks.cuh>

namespace megamoe {

struct MoeAssignParams {
  CallStateParams calls;
  const int16* entry_expert;  // [W * chunks, kChunkEntries] local expert, -1 for none
  const int32* chunk_rows;    // [W * chunks, e] first row of a chunk's entries for an expert
  int32* row_entry;           // [W * T * K] entry of each row: src * T * K + token * K + slot, with T = max_tokens
  uint32 rank;                // this one
};

constexpr uint32 kAssignWarps = 16;

// Grid: W * chunks blocks of kAssignWarps warps.
template <class Config>
MEGAMOE_DEVICE void moe_assign(const MoeAssignParams& p) {
  constexpr uint32 kExperts = Config::kNumLocalExperts, kRounds = Config::kChunkEntries / (32 * kAssignWarps);
  __shared__ uint16 counts[kAssignWarps][kExperts];
  ptx::wait_for_launcher();
  if (p.calls.is_failed(p.calls.epoch())) return;  // chunk_rows are those of no call
  const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * 32 * kRounds + lane;
  const int16* experts = p.entry_expert + uint64(blockIdx.x) * Config::kChunkEntries + first;
  int32 expert[kRounds];
#pragma unroll
  for (uint32 i = 0; i < kRounds; ++i) expert[i] = experts[i * 32];
  bool has_any = false;
#pragma unroll
  for (uint32 i = 0; i < kRounds; ++i) has_any = has_any || expert[i] >= 0;
  if (!__syncthreads_or(has_any)) return;

  const int32* chunk_rows = p.chunk_rows + uint64(blockIdx.x) * kExperts;
  int32 row[kRounds];
#pragma unroll
  for (uint32 i = 0; i < kRounds; ++i) row[i] = expert[i] >= 0 ? chunk_rows[expert[i]] : 0;
  for (uint32 e = lane; e < kExperts; e += 32) counts[warp][e] = 0;
  __syncwarp();
#pragma unroll
  for (uint32 i = 0; i < kRounds; ++i) {
    const uint32 same = __match_any_sync(~0u, expert[i]), before = __popc(same & ((1u << lane) - 1));
    const uint32 counted = expert[i] >= 0 ? counts[warp][expert[i]] : 0;
    row[i] += counted + before;
    __syncwarp();
    if (expert[i] >= 0 && before == 0) counts[warp][expert[i]] = counted + __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (uint32 e = threadIdx.x; e < kExperts; e += 32 * kAssignWarps) {
    uint32 sum = 0;
#pragma unroll
    for (uint32 w = 0; w < kAssignWarps; ++w) {
      const uint32 count = counts[w][e];
      counts[w][e] = sum;
      sum += count;
    }
  }
  __syncthreads();
  const EntryChunk chunk = entry_chunk<Config>(blockIdx.x, p.rank);
  const uint32 first_entry = chunk.src * Config::kMaxTokens * Config::kNumTopk + chunk.first + first;
#pragma unroll
  for (uint32 i = 0; i < kRounds; ++i)
    if (expert[i] >= 0) p.row_entry[row[i] + counts[warp][expert[i]]] = first_entry + i * 32;
}

}  // namespace megamoe
