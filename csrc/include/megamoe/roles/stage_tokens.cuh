// stage_tokens: tokens into this rank's arena as E4M3 with one exponent per token, which every byte of its x_sf holds.
//
// A token belongs to one block and stays in registers between its loads and its stores. BF16 is quantised per 32 channels, then the codes
// of each group are shifted to the token's exponent: bit for bit quantize_tokens followed by fold_tokens. While the warps of a block
// exchange the exponents of one token, the next one is on its way.
//
// For mega_moe the codes may go to the arena in thread order (thread_order.cuh).
#pragma once

#include <megamoe/e4m3.cuh>
#include <megamoe/fold_codes.cuh>
#include <megamoe/ptx/memory.cuh>
#include <megamoe/thread_order.cuh>

namespace megamoe {

// Eight codes of one group; see the other fold_codes.
MEGAMOE_DEVICE uint2 fold_codes(uint2 v, uint32 d) {
  if (d == 0) return v;
  const uint32 factors = shift_factors(d);
  return make_uint2(shift_word(v.x, factors), shift_word(v.y, factors));
}

// Vector i of this thread's share of a token: neighbouring lanes have neighbouring vectors, so no group leaves its warp.
template <class Config>
MEGAMOE_DEVICE uint32 staged_vector(uint32 i) { return i * Config::kStageThreads + threadIdx.x; }

// This thread's share of a BF16 token: eight channels per vector, a group in four neighbouring lanes.
template <class Config>
struct Bf16Share {
  static constexpr uint32 kVectors = Config::kHidden / 8, kPerThread = ceil_div(kVectors, Config::kStageThreads);
  const uint4* x;  // [T, H] BF16
  uint2* to;       // [T, H] E4M3
  uint4 next[kPerThread];
  uint2 codes[kPerThread];
  uint32 sf[kPerThread];

  // Zeros past the end of a token and of the tokens; their exponent is the smallest there is.
  MEGAMOE_DEVICE void fetch(uint32 token, uint32 num_tokens) {
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      const uint32 vector = staged_vector<Config>(i);
      next[i] = make_uint4(0, 0, 0, 0);
      if (token < num_tokens && vector < kVectors) next[i] = ptx::ld_stream_128(x + uint64(token) * kVectors + vector);
    }
  }

  // Quantises what was fetched. Returns the largest exponent of this thread's groups. All lanes of a warp must call.
  MEGAMOE_DEVICE uint32 take() {
    Channels channels[kPerThread];
    float amax[kPerThread];
    bool all_finite = true;
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      channels[i] = Packed<Bf16>{next[i]}.unpack();
      amax[i] = channels[i].largest();
      all_finite = all_finite && is_finite(amax[i]);
    }
    if (!__all_sync(~0u, all_finite)) {
#pragma unroll
      for (uint32 i = 0; i < kPerThread; ++i) {
        amax[i] = channels[i].largest_finite();
        channels[i].turn_inf_into_nan();
      }
    }
    uint32 largest = 0;
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      amax[i] = fmaxf(amax[i], __shfl_xor_sync(~0u, amax[i], 1));
      amax[i] = fmaxf(amax[i], __shfl_xor_sync(~0u, amax[i], 2));
      sf[i] = ceil_exponent(amax[i]);
      codes[i] = channels[i].codes(inverse_scale(sf[i]));
      largest = sf[i] > largest ? sf[i] : largest;
    }
    return largest;
  }

  MEGAMOE_DEVICE void store(uint32 token, uint32 largest) const {
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      uint32 vector = staged_vector<Config>(i);
      const bool is_inside = vector < kVectors;
      uint2 folded = fold_codes(codes[i], largest - sf[i]);
      if constexpr (Config::kThreadOrder) put_in_thread_order(folded, vector);
      if (is_inside) to[uint64(token) * kVectors + vector] = folded;
    }
  }

 private:
  // The two words of a vector lie apart in thread order, and beside the words of the same number of the next group, which the lane 4 from here
  // has: each of the two lanes takes a pair and stores it at `vector`. By all lanes.
  static MEGAMOE_DEVICE void put_in_thread_order(uint2& words, uint32& vector) {
    const bool takes_second = threadIdx.x & 4;  // the lane of the odd group
    const uint32 other = __shfl_xor_sync(~0u, takes_second ? words.x : words.y, 4);
    words = takes_second ? make_uint2(other, words.y) : make_uint2(words.x, other);
    const uint32 first = takes_second ? 2 * vector + 1 - 8 : 2 * vector;  // in natural order
    vector = place_in_thread_order(first) / 2;
  }
};

// This thread's share of a token that is quantised already: 16 codes per vector, a group in two neighbouring lanes.
template <class Config>
struct CodesShare {
  static constexpr uint32 kVectors = Config::kHidden / 16, kPerThread = ceil_div(kVectors, Config::kStageThreads);
  const uint4* x;     // [T, H] E4M3
  const uint8* x_sf;  // [T, H/32] UE8M0
  uint4* to;          // [T, H] E4M3, may be x in natural order
  uint4 next[kPerThread], codes[kPerThread];
  uint32 next_sf[kPerThread], sf[kPerThread];

  MEGAMOE_DEVICE void fetch(uint32 token, uint32 num_tokens) {
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      const uint64 vector = uint64(token) * kVectors + staged_vector<Config>(i);
      const bool is_inside = token < num_tokens && staged_vector<Config>(i) < kVectors;
      next_sf[i] = is_inside ? x_sf[vector / 2] : 0;
      next[i] = make_uint4(0, 0, 0, 0);
      if (is_inside) next[i] = ptx::ld_stream_128(x + vector);
    }
  }

  MEGAMOE_DEVICE uint32 take() {
    uint32 largest = 0;
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      codes[i] = next[i];
      sf[i] = next_sf[i];
      largest = sf[i] > largest ? sf[i] : largest;
    }
    return largest;
  }

  // In place, groups that have the token's exponent are there already.
  MEGAMOE_DEVICE void store(uint32 token, uint32 largest) const {
#pragma unroll
    for (uint32 i = 0; i < kPerThread; ++i) {
      const uint32 vector = staged_vector<Config>(i);
      const uint4 folded = fold_codes(codes[i], largest - sf[i]);
      if constexpr (Config::kThreadOrder) {
        if (vector < kVectors) store_in_thread_order(reinterpret_cast<uint32*>(to + uint64(token) * kVectors), 4 * vector, folded);
      } else {
        const bool is_there = x == to && sf[i] == largest;
        if (vector < kVectors && !is_there) to[uint64(token) * kVectors + vector] = folded;
      }
    }
  }
};

// Tokens blockIdx.x, blockIdx.x + gridDim.x, ..., the first of which `share` has fetched. The sources may be the arena's own regions: a
// block has read all of a token, scales included, when it passes the barrier, and writes it after that.
template <class Config, class Share>
MEGAMOE_DEVICE void stage_tokens(Share& share, uint8* sf, uint32 num_tokens) {
  constexpr uint32 kGroups = Config::kHidden / 32, kWarps = Config::kStageThreads / 32;
  __shared__ uint32 of_warp[2][kWarps];  // in turns, so that one barrier per token keeps a warp from overwriting what another still reads
  const uint32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32 turn = 0;
  for (uint32 token = blockIdx.x; token < num_tokens; token += gridDim.x, turn ^= 1) {
    const uint32 of_lanes = __reduce_max_sync(~0u, share.take());
    if (lane == 0) of_warp[turn][warp] = of_lanes;
    share.fetch(token + gridDim.x, num_tokens);
    __syncthreads();
    const uint32 largest = __reduce_max_sync(~0u, lane < kWarps ? of_warp[turn][lane] : 0);
    share.store(token, largest);
    for (uint32 i = threadIdx.x; i < kGroups; i += Config::kStageThreads) sf[uint64(token) * kGroups + i] = largest;
  }
}

}  // namespace megamoe
