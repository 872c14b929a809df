// unpermute_tokens: out[t] = sum over slots k, in order, of weights[t, k] * rows[index[t, k]], in FP32, rounded once to BF16.
//
// One warp per token and segment of 512 channels: two vectors of eight per lane, four slots in flight. A slot of -1 adds nothing; an index
// out of range is reported and adds nothing. Products and sums round separately, as in the plain-torch twin.
#pragma once

#include <megamoe/e4m3.cuh>
#include <megamoe/kernels/row_bounds.cuh>

namespace megamoe {

struct UnpermuteTokensParams {
  const void* rows;      // [num_rows, num_channels] BF16, at a multiple of 16 bytes
  void* out;             // [num_tokens, num_channels] BF16, likewise
  Indices index;         // [num_tokens, num_topk]
  const float* weights;  // [num_tokens, num_topk], or null for ones
  DeviceErrors errors;
  uint32 num_rows, num_tokens, num_topk;
  uint32 num_channels;   // a multiple of 8
};

struct Slot {
  uint32 row;  // kNoRow: adds nothing
  float weight;
};

constexpr uint32 kNoRow = ~0u;

MEGAMOE_DEVICE Slot read_slot(const UnpermuteTokensParams& p, uint32 entry, bool reports) {
  const int64 row = p.index[entry];
  if (row >= 0 && row < p.num_rows) return {static_cast<uint32>(row), p.weights == nullptr ? 1.0f : p.weights[entry]};
  if (row != -1 && reports) p.errors.report(kSlotOutOfRange, entry, row);
  return {kNoRow, 0.0f};
}

MEGAMOE_DEVICE uint4 pack_channels(const Channels& c) {
  return make_uint4(ptx::pack_bf16(c.v[0], c.v[1]), ptx::pack_bf16(c.v[2], c.v[3]), ptx::pack_bf16(c.v[4], c.v[5]),
                    ptx::pack_bf16(c.v[6], c.v[7]));
}

MEGAMOE_DEVICE void unpermute_tokens(const UnpermuteTokensParams& p) {
  constexpr uint32 kVectors = 2, kSlots = 4;
  const uint32 num_vectors = p.num_channels / 8, num_segments = ceil_div(num_vectors, 32 * kVectors);
  const uint32 warp = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32 token = warp / num_segments, segment = warp % num_segments, first = segment * 32 * kVectors + lane;
  if (token >= p.num_tokens) return;

  const auto* rows = static_cast<const Packed<Bf16>*>(p.rows);
  Channels sums[kVectors] = {};
  for (uint32 base = 0; base < p.num_topk; base += 32) {  // each lane reads one slot for all
    Slot mine = {kNoRow, 0.0f};
    if (base + lane < p.num_topk) mine = read_slot(p, token * p.num_topk + base + lane, segment == 0);
    const uint32 num_slots = min_of(p.num_topk - base, 32);
    for (uint32 batch = 0; batch < num_slots; batch += kSlots) {
      Packed<Bf16> raw[kSlots][kVectors];  // zeros where nothing is added: the sums, which begin at +0, do not change
      float weights[kSlots];
#pragma unroll
      for (uint32 k = 0; k < kSlots; ++k) {
        const uint32 row = __shfl_sync(~0u, mine.row, batch + k);
        weights[k] = __shfl_sync(~0u, mine.weight, batch + k);
#pragma unroll
        for (uint32 i = 0; i < kVectors; ++i) {
          const uint32 vector = first + 32 * i;
          raw[k][i] = {};
          if (row != kNoRow && vector < num_vectors) raw[k][i] = rows[uint64(row) * num_vectors + vector];
        }
      }
#pragma unroll
      for (uint32 k = 0; k < kSlots; ++k) {
#pragma unroll
        for (uint32 i = 0; i < kVectors; ++i) {
          const Channels term = raw[k][i].unpack();
#pragma unroll
          for (uint32 c = 0; c < 8; ++c) sums[i].v[c] = __fadd_rn(sums[i].v[c], __fmul_rn(weights[k], term.v[c]));
        }
      }
    }
  }
  auto* out = static_cast<uint4*>(p.out) + uint64(token) * num_vectors;
#pragma unroll
  for (uint32 i = 0; i < kVectors; ++i) {
    if (first + 32 * i < num_vectors) out[first + 32 * i] = pack_channels(sums[i]);
  }
}

}  // namespace megamoe
