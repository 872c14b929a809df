// Epilogue store / accumulate: scale the sums of one warpgroup (64 weight rows x tokens), add the bias, round to BF16, write token-major
// rows, to `out` or (scatter) wherever `row_dst` says, which may be the memory of another GPU.
//
// The fragment is channel-major, the output token-major: 8x8 transposing stores bring it to shared memory as one token per row, from
// where 8 threads write the 128 contiguous bytes of a token.
#pragma once

#include <megamoe/kernels/fp4_gemm_facts.cuh>

namespace megamoe {

// 2^(biased - 127).
MEGAMOE_DEVICE float exponent_to_float(uint32 biased) { return __uint_as_float(biased == 0 ? 0x00400000u : biased << 23); }

// Which rows and tokens a warpgroup's fragment is. Loads what the epilogue needs before the main loop starts, to hide the latency behind
// it.
struct EpilogueTile {
  uint32 group, row_block, first_row, num_tokens;
  // Bytes as loaded: combining them here would wait for them here.
  uint32 row_bases[2];        // of this thread's upper and lower row
  uint32 token_exponents[2];  // of tokens thread and thread + 128

  MEGAMOE_DEVICE EpilogueTile(const Fp4GemmParams& p, const Tile& tile, uint32 row_block)
      : group(tile.group), row_block(row_block), first_row(tile.first_row), num_tokens(tile.num_tokens) {
    const uint8* bases = p.w_row_base + uint64(group * p.num_row_blocks + row_block) * 64 + warp() * 16 + lane_group();
#pragma unroll
    for (uint32 i = 0; i < 2; ++i) {
      row_bases[i] = ptx::ld_early_byte(bases + 8 * i);
      const uint32 token = thread() + 128 * i;
      token_exponents[i] = token < num_tokens ? ptx::ld_early_shared_byte(p.x_sf + first_row + token) : 127;
    }
  }

  // Place in the warpgroup. Computed where needed: registers that live through the main loop are the scarcest thing here.
  static MEGAMOE_DEVICE uint32 thread() { return threadIdx.x % 128; }
  static MEGAMOE_DEVICE uint32 warp() { return threadIdx.x / 32 % 4; }
  static MEGAMOE_DEVICE uint32 lane_group() { return threadIdx.x % 32 / 4; }
  static MEGAMOE_DEVICE uint32 lane_in_group() { return threadIdx.x % 4; }

  // 2^(row_base - 114): what the main loop's exponents leave out (formats/layout_sm90.py).
  MEGAMOE_DEVICE float row_scale(uint32 half) const { return exponent_to_float(row_bases[half] + 127 - 114); }

  // Starts to copy the tokens' row weights, or their destinations, to a row of shared memory that no thread of the warpgroup reads any
  // more.
  template <uint32 kTokens>
  MEGAMOE_DEVICE void fetch_weights(const Fp4GemmParams& p, uint32 row) const {
    for_my_tokens<kTokens>([&](uint32 token, uint32) {
      if (p.row_weight == nullptr)
        ptx::st_shared_float(row + token * 4, 1.0f);
      else if (token < num_tokens)
        ptx::copy_async<4>(row + token * 4, p.row_weight + first_row + token);
    });
  }
  template <uint32 kTokens>
  MEGAMOE_DEVICE void fetch_destinations(const Fp4GemmParams& p, uint32 row) const {
    for_my_tokens<kTokens>([&](uint32 token, uint32) {
      if (token < num_tokens) ptx::copy_async<8>(row + token * 8, p.row_dst + first_row + token);
    });
  }

  template <uint32 kTokens>
  MEGAMOE_DEVICE void share_scales(uint32 row) const {
    for_my_tokens<kTokens>([&](uint32 token, uint32 i) { ptx::st_shared_float(row + token * 4, exponent_to_float(token_exponents[i])); });
  }

 private:
  // visit(token, i) for tokens thread + 128 i.
  template <uint32 kTokens, class Visit>
  static MEGAMOE_DEVICE void for_my_tokens(Visit visit) {
#pragma unroll
    for (uint32 i = 0; i < ceil_div(kTokens, 128); ++i)
      if (thread() + i * 128 < kTokens) visit(thread() + i * 128, i);
  }
};

// The pieces of the warpgroup's output that are this thread's: 16 bytes each, 8 threads on the 128 bytes of a token. A thread has the same
// piece of each of its tokens. Shared memory is read without a condition, so that all loads of a step are under way together; what is read
// for tokens that the tile has not got goes nowhere.
template <class Config, uint32 kTokens>
struct OutputPieces {
  static constexpr uint32 kCount = ceil_div(kTokens, 16);

  uint32 staging;        // shared address of the thread's piece of token 0
  Bf16* places[kCount];  // in the output; null: nowhere

  MEGAMOE_DEVICE OutputPieces(const Fp4GemmParams& p, const EpilogueTile& tile, uint32 staging, uint32 destinations)
      : staging(staging + tile.thread() % 8 * 16) {
    const uint32 channel = tile.row_block * 64 + tile.thread() % 8 * 8, num_tokens = channel < p.n ? tile.num_tokens : 0;
#pragma unroll
    for (uint32 i = 0; i < kCount; ++i) {
      Bf16* row = p.out + uint64(tile.first_row + token(i)) * p.n;
      if constexpr (Config::kScatter) {
        const ptx::Words2 address = ptx::ld_shared_64(destinations + token(i) * 8);
        row = reinterpret_cast<Bf16*>(uint64(address.y) << 32 | address.x);
      }
      places[i] = first_token() + i * 16 < num_tokens && row != nullptr ? row + channel : nullptr;
    }
  }

  // Both ways between the output and staging.
  MEGAMOE_DEVICE void load() const {
#pragma unroll
    for (uint32 i = 0; i < kCount; ++i)
      if (places[i] != nullptr) {
        const uint4 v = *reinterpret_cast<const uint4*>(places[i]);
        ptx::st_shared_128(staging_of(i), {v.x, v.y, v.z, v.w});
      }
  }
  MEGAMOE_DEVICE void store() const {
    ptx::Words4 v[kCount];
#pragma unroll
    for (uint32 i = 0; i < kCount; ++i) v[i] = ptx::ld_shared_128(staging_of(i));
#pragma unroll
    for (uint32 i = 0; i < kCount; ++i)
      if (places[i] != nullptr) *reinterpret_cast<uint4*>(places[i]) = make_uint4(v[i].x, v[i].y, v[i].z, v[i].w);
  }

 private:
  static MEGAMOE_DEVICE uint32 first_token() { return EpilogueTile::thread() / 8; }
  // Within the tile, which need not have a multiple of 16 tokens.
  static MEGAMOE_DEVICE uint32 token(uint32 i) { return min_of(first_token() + i * 16, kTokens - 1); }
  MEGAMOE_DEVICE uint32 staging_of(uint32 i) const { return staging + token(i) * SmemPlan<Config>::kStagingPitch; }
};

// Starts to bring what the epilogue reads from global memory, before the main loop, to hide the latency behind it.
template <class Config, uint32 kTokens>
MEGAMOE_DEVICE void fetch_store_inputs(const Fp4GemmParams& p, const EpilogueTile& tile, const TokenValues<Config>& values) {
  if constexpr (Config::kHasBias) tile.fetch_weights<kTokens>(p, values.weights());
  if constexpr (Config::kScatter) tile.fetch_destinations<kTokens>(p, values.destinations());
}

template <class Config, uint32 kTokens>
MEGAMOE_DEVICE void store_epilogue(float (&totals)[kTokens / 2], const Fp4GemmParams& p, const EpilogueTile& tile, uint32 base,
                                    uint32 warpgroup) {
  using Plan = SmemPlan<Config>;
  const uint32 staging = base + Plan::kStaging + warpgroup * Plan::kStagingBytes;
  const TokenValues<Config> values(base, warpgroup);
  const uint32 biases = base + Plan::kBiases + warpgroup * 64 * 4, barrier = kEpilogueBarrier + warpgroup;
  tile.share_scales<kTokens>(values.scales);
  if constexpr (Config::kHasBias) {
    const uint32 row = tile.row_block * 64 + tile.thread();
    if (tile.thread() < 64) ptx::st_shared_float(biases + tile.thread() * 4, row < p.n ? p.bias[uint64(tile.group) * p.n + row] : 0.0f);
  }
  ptx::copy_async_wait();
  // After this barrier the tokens' values are there and the warpgroup has finished reading the staging of its last tile.
  ptx::barrier_sync<128>(barrier);
  if constexpr (Config::kAccumulate) {
    OutputPieces<Config, kTokens>(p, tile, staging, values.destinations()).load();
    ptx::barrier_sync<128>(barrier);
  }
  const float upper = tile.row_scale(0), lower = tile.row_scale(1);
  float bias[2];  // of this thread's upper and lower row
  if constexpr (Config::kHasBias) {
    const uint32 row = tile.warp() * 16 + tile.lane_group();
#pragma unroll
    for (uint32 i = 0; i < 2; ++i) bias[i] = ptx::ld_shared_float(biases + (row + 8 * i) * 4);
  }
  const uint32 lane = tile.thread() % 32;
  // Row of the 8x8 matrices that this lane addresses: token lane % 8, channels 0-7 of the warp for lanes 0-7 and 8-15 for lanes 8-15.
  const uint32 matrix_row = staging + (lane % 8) * Plan::kStagingPitch + tile.warp() * 32 + (lane / 8 % 2) * 16;
  // All loads before all stores: shared accesses stay in program order, and a load between two stores would expose its latency every time.
  ptx::Words2 scales[kTokens / 8];
#pragma unroll
  for (uint32 j = 0; j < kTokens / 8; ++j) scales[j] = ptx::ld_shared_64(values.scales + (8 * j + 2 * tile.lane_in_group()) * 4);
#pragma unroll
  for (uint32 j = 0; j < kTokens / 8; ++j) {
    const uint32 row = matrix_row + j * 8 * Plan::kStagingPitch;
    const float s0 = __uint_as_float(scales[j].x), s1 = __uint_as_float(scales[j].y);
    float v[4] = {totals[4 * j] * upper * s0, totals[4 * j + 1] * upper * s1,
                  totals[4 * j + 2] * lower * s0, totals[4 * j + 3] * lower * s1};
    if constexpr (Config::kHasBias) {
      const ptx::Words2 w = ptx::ld_shared_64(values.weights() + (8 * j + 2 * tile.lane_in_group()) * 4);
      const float w0 = __uint_as_float(w.x), w1 = __uint_as_float(w.y);
      v[0] += w0 * bias[0], v[1] += w1 * bias[0], v[2] += w0 * bias[1], v[3] += w1 * bias[1];
    }
    if constexpr (Config::kAccumulate) {
      const ptx::Words2 old = ptx::ldmatrix_x2_trans(row);
      v[0] += ptx::bf16_low(old.x), v[1] += ptx::bf16_high(old.x), v[2] += ptx::bf16_low(old.y), v[3] += ptx::bf16_high(old.y);
    }
    ptx::stmatrix_x2_trans(row, ptx::pack_bf16(v[0], v[1]), ptx::pack_bf16(v[2], v[3]));
  }
  const OutputPieces<Config, kTokens> pieces(p, tile, staging, values.destinations());
  ptx::barrier_sync<128>(barrier);
  pieces.store();
}

}  // namespace megamoe
