// moe_route: waits for every rank's inputs, finds the (token, slot) entries that name this rank's experts, and gives each expert its rows.
//
// The entries of a rank are divided into chunks (schedule/entry_chunks.cuh), one block each. A block stores its entries' local experts and
// counts them per expert; the last block turns the counts [chunk, expert] into the row at which each (expert, chunk) begins: rows are ordered
// by expert, then by chunk.
// Example: 2 chunks, 2 experts, counts [[1, 2], [3, 0]] -> rows begin at [[0, 4], [1, 6]], experts at 0 and 4, 6 rows in all.
#pragma once

#include <megamoe/ptx/control.cuh>
#include <megamoe/ptx/copy.cuh>
#include <megamoe/schedule/entry_chunks.cuh>
#include <megamoe/sync/last_block.cuh>
#include <megamoe/sync/peer_wait.cuh>

namespace megamoe {

struct MoeRouteParams {
  Symm symm;
  CallStateParams calls;
  int16* entry_expert;  // [W * chunks, kChunkEntries] local expert, -1 for none
  int32* chunk_rows;    // [W * chunks, e] first row of a chunk's entries for an expert
  int32* offsets;       // [passes, e + 1] first row of each expert within a pass
  int32* bounds;        // [passes, 2] 0 and the number of rows of a pass
  int64* expert_load;   // [e] rows per expert are added
  uint32* num_arrived;  // of arrive_last
  const uint8* ahead;   // what to bring to L2 meanwhile, a multiple of 16 bytes
  uint32 ahead_bytes;   // 0 for nothing
};

constexpr uint32 kRouteThreads = 1024;

// The sum over the threads before this one, for kRouteThreads threads; `total` is the sum over all.
MEGAMOE_DEVICE int32 exclusive_block_sum(int32 value, int32* total) {
  __shared__ int32 of_warp[32];
  const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto inclusive = [lane](int32 v) {
#pragma unroll
    for (uint32 step = 1; step < 32; step *= 2) {
      const int32 before = __shfl_up_sync(~0u, v, step);
      v += lane >= step ? before : 0;
    }
    return v;
  };
  const int32 sum = inclusive(value);
  if (lane == 31) of_warp[warp] = sum;
  __syncthreads();
  if (warp == 0) of_warp[lane] = inclusive(of_warp[lane]);
  __syncthreads();
  *total = of_warp[31];
  return sum - value + (warp ? of_warp[warp - 1] : 0);
}

// Visits the counts of one expert in chunks [begin, end), several loads in flight: visit(count, address).
template <class Config, class Visit>
MEGAMOE_DEVICE void for_each_count(int32* counts, uint32 expert, uint32 begin, uint32 end, Visit visit) {
  constexpr uint32 kBatch = 8;
  for (uint32 first = begin; first < end; first += kBatch) {
    int32 count[kBatch];
#pragma unroll
    for (uint32 i = 0; i < kBatch; ++i)
      count[i] = first + i < end ? __ldcg(counts + uint64(first + i) * Config::kNumLocalExperts + expert) : 0;
#pragma unroll
    for (uint32 i = 0; i < kBatch; ++i)
      if (first + i < end) visit(count[i], counts + uint64(first + i) * Config::kNumLocalExperts + expert);
  }
}

// One block of kRouteThreads. Threads are [part of the chunks, expert], so that the chunks of an expert are walked in parallel.
template <class Config>
MEGAMOE_DEVICE void place_rows(const MoeRouteParams& p, bool is_failed) {
  constexpr uint32 kExperts = Config::kNumLocalExperts, kParts = min_of(32, kRouteThreads / kExperts);
  constexpr uint32 kAllChunks = Config::kNumRanks * Config::kNumChunks, kChunksPerPart = ceil_div(kAllChunks, kParts);
  __shared__ int32 part_rows[kParts * kExperts];
  __shared__ int32 first_row[kExperts + 1];
  const uint32 thread = threadIdx.x, part = thread / kExperts, expert = thread % kExperts;
  const uint32 begin = part * kChunksPerPart, end = part < kParts ? min_of(begin + kChunksPerPart, kAllChunks) : 0;

  int32 sum = 0;
  for_each_count<Config>(p.chunk_rows, expert, begin, end, [&](int32 count, int32*) { sum += count; });
  if (part < kParts) part_rows[thread] = sum;
  __syncthreads();

  int32 num_rows = 0, total;
  if (thread < kExperts && !is_failed) {
#pragma unroll 4
    for (uint32 i = 0; i < kParts; ++i) {
      const int32 before = num_rows;
      num_rows += part_rows[i * kExperts + expert];
      part_rows[i * kExperts + expert] = before;
    }
    p.expert_load[expert] += num_rows;
  }
  const int32 row = exclusive_block_sum(num_rows, &total);
  if (thread < kExperts) first_row[expert] = row;
  if (thread == 0) first_row[kExperts] = total;
  __syncthreads();

  for (uint32 i = thread; i < Config::kNumPasses * (kExperts + 1); i += kRouteThreads) {
    const int64 in_pass = first_row[i % (kExperts + 1)] - int64(i / (kExperts + 1)) * Config::kPoolRows;
    const int32 clipped = in_pass < 0 ? 0 : in_pass > Config::kPoolRows ? Config::kPoolRows : in_pass;
    p.offsets[i] = clipped;
    if (i % (kExperts + 1) == kExperts) {
      p.bounds[i / (kExperts + 1) * 2] = 0;
      p.bounds[i / (kExperts + 1) * 2 + 1] = clipped;
    }
  }
  int32 next = part < kParts ? first_row[expert] + part_rows[thread] : 0;
  for_each_count<Config>(p.chunk_rows, expert, begin, end, [&](int32 count, int32* first) {
    *first = next;
    next += count;
  });
}

// Brings the block's share of `ahead` to L2. By a warp.
MEGAMOE_DEVICE void prefetch_ahead(const MoeRouteParams& p, uint32 lane) {
  constexpr uint32 kPiece = 16384;
  const uint64 step = uint64(gridDim.x) * 32 * kPiece;
  for (uint64 at = (uint64(blockIdx.x) * 32 + lane) * kPiece; at < p.ahead_bytes; at += step)
    ptx::bulk_prefetch(p.ahead + at, min_of(kPiece, p.ahead_bytes - at));
}

// Entries of the block's source rank that are there this call; 0 if the call has failed. Acquires for the block.
template <class Layout, class Config>
MEGAMOE_DEVICE uint32 wait_for_entries(const MoeRouteParams& p, int64 epoch, uint32 src) {
  __shared__ uint32 num_entries;
  if (threadIdx.x == 0) {
    const CallWatch<Layout> watch{p.symm, p.calls, epoch, CallPhase::kDispatch};
    const bool is_ready = !p.calls.is_failed(epoch) && watch.template wait_for_peer<&Layout::inputs_ready>(src);
    num_entries = is_ready ? static_cast<uint32>(*p.symm.at<&Layout::num_tokens>(src, 0)) * Config::kNumTopk : 0;
  }
  __syncthreads();
  return num_entries;
}

// Grid: W * chunks blocks of kRouteThreads. May be launched to depend on moe_stage, and moe_assign on it.
template <class Layout, class Config>
MEGAMOE_DEVICE void moe_route(const MoeRouteParams& p) {
  constexpr uint32 kPerThread = Config::kChunkEntries / kRouteThreads, kExperts = Config::kNumLocalExperts;
  __shared__ int32 counts[kExperts];
  if (threadIdx.x / 32 == kRouteThreads / 32 - 1) prefetch_ahead(p, threadIdx.x % 32);
  ptx::wait_for_launcher();
  ptx::launch_dependents();
  const int64 epoch = p.calls.epoch();
  const EntryChunk chunk = entry_chunk<Config>(blockIdx.x, p.symm.rank);
  if (threadIdx.x < kExperts) counts[threadIdx.x] = 0;
  const uint32 num_entries = wait_for_entries<Layout, Config>(p, epoch, chunk.src);

  const uint64 first_expert = uint64(p.symm.rank) * kExperts;
  uint64 local[kPerThread];
#pragma unroll
  for (uint32 i = 0; i < kPerThread; ++i) {
    const uint32 entry = chunk.first + i * kRouteThreads + threadIdx.x;
    local[i] = entry < num_entries ? *p.symm.at<&Layout::topk_idx>(chunk.src, 0, entry) - first_expert : kExperts;
  }
  int16* experts = p.entry_expert + uint64(blockIdx.x) * Config::kChunkEntries + threadIdx.x;
#pragma unroll
  for (uint32 i = 0; i < kPerThread; ++i) {
    const bool is_ours = local[i] < kExperts;
    experts[i * kRouteThreads] = is_ours ? static_cast<int16>(local[i]) : -1;
    if (is_ours) atomicAdd(counts + local[i], 1);
  }
  __syncthreads();
  if (threadIdx.x < kExperts) p.chunk_rows[uint64(blockIdx.x) * kExperts + threadIdx.x] = counts[threadIdx.x];
  if (arrive_last(p.num_arrived)) place_rows<Config>(p, p.calls.is_failed(epoch));
}

}  // namespace megamoe
