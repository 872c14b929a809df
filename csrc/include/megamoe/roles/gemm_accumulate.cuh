// The main loop of a math warpgroup: expand FP4 in registers, multiply, promote.
#pragma once

#include <megamoe/kernels/fp4_gemm_facts.cuh>

namespace megamoe {

// The tensor cores add with 14 significant bits: every 512 of K the sums move to FP32 registers. Error against FP64 at K = 7168: 2.8e-4
// with 512, 1.7e-4 with 256, 1.6e-3 without (H200, 2026-11-21); BF16 rounding alone is 1.7e-3.
constexpr uint32 kPromotionBlocks = 4;

// Starts sums (+)= A * B for the four k32 steps of the stage at `stage`. `fresh`: the sums start from zero.
template <class Config, uint32 kTokens>
MEGAMOE_DEVICE void multiply(float (&sums)[kTokens / 2], const sm90::WeightFragment& a, uint32 stage, bool fresh) {
  const uint64 tokens = ptx::descriptor_128b_swizzle(stage + SmemPlan<Config>::kTokensOffset);
  ptx::pin_registers(sums);
  ptx::wgmma_fence();
#pragma unroll
  for (uint32 j = 0; j < 4; ++j)
    ptx::WgmmaE5m2E4m3<kTokens>::mma(sums, a[4 * j], a[4 * j + 1], a[4 * j + 2], a[4 * j + 3], tokens + 2 * j, j > 0 || !fresh);
  ptx::wgmma_commit();
  ptx::pin_registers(sums);
}

// One warpgroup's view of the ring: the stage it multiplies next and, where it loads ahead, the one it takes weights from next.
template <class Config>
struct StageReader {
  using PackedWeights = sm90::PackedFragment<Config::kThreadOrder>;
  using Ring = StagePipeline<Config>;

  Ring pipe, ahead;
  uint32 base, warpgroup, thread;
  uint32 first_empty;         // in a cluster that of the block to which this lane says that a stage is read
  bool next_is_full = false;  // the stage behind the last one loaded, when that was loaded

  MEGAMOE_DEVICE StageReader(const Ring& ring, uint32 base, uint32 warpgroup)
      : pipe(ring), ahead(ring), base(base), warpgroup(warpgroup), thread(threadIdx.x % 128), first_empty(ring.first_empty()) {
    if constexpr (Config::kClusterBlocks > 1) first_empty = ptx::map_shared(first_empty, thread % Config::kClusterBlocks);
  }

  MEGAMOE_DEVICE uint32 stage() const { return base + pipe.stage * SmemPlan<Config>::kStageBytes; }
  // Whether load would return at once. For the whole warp, which may see the barrier change in between.
  MEGAMOE_DEVICE bool is_ready() const { return __all_sync(~0u, (Config::kLoadsAhead ? ahead : pipe).is_full()); }
  // A barrier takes 50 clk to answer. Asked for the next stage now, it has answered when that is wanted. Who loads ahead has the time to
  // wait for it, and was 5 to 8 % slower with the question (32 x ~96 rows, on another H200, where other sizes were not slower).
  MEGAMOE_DEVICE void load(PackedWeights& packed) {
    if constexpr (Config::kLoadsAhead) {
      ahead.wait_full();
      packed.load(weights_of(ahead), thread);
      ahead.advance();
    } else {
      pipe.wait_full_unless(next_is_full);
      packed.load(weights_of(pipe), thread);
      Ring next = pipe;
      next.advance();
      next_is_full = next.is_full();
    }
  }
  // Every warp says for itself that it has read a stage: its own LDS and its quarter of the wgmma.
  MEGAMOE_DEVICE void release(uint32 stage) const {
    if (thread % 32 >= Config::kClusterBlocks) return;
    if constexpr (Config::kClusterBlocks == 1)
      ptx::mbarrier_arrive(first_empty + Ring::offset_of(stage));
    else
      ptx::mbarrier_arrive_cluster(first_empty + Ring::offset_of(stage));
  }
  // Passes over the current stage, whose weights are not needed.
  MEGAMOE_DEVICE void skip() {
    pipe.wait_full();
    release(pipe.stage);
    pipe.advance();
    if constexpr (Config::kLoadsAhead) ahead.advance();
    next_is_full = false;
  }

 private:
  MEGAMOE_DEVICE uint32 weights_of(const Ring& ring) const {
    return base + ring.stage * SmemPlan<Config>::kStageBytes + warpgroup * sm90::WeightUnit::kBytes;
  }
};

// One tile's sums over K.
template <class Config, uint32 kTokens>
struct Accumulator {
  float totals[kTokens / 2];
  sm90::WeightFragment even;  // the tile's next even block, expanded
  typename StageReader<Config>::PackedWeights packed;  // on its way to a fragment: where weights are loaded ahead, the block after `even`

  // Expands the first block of a tile.
  MEGAMOE_DEVICE void begin(StageReader<Config>& reader) {
    reader.load(packed);
    sm90::expand(packed, even);
  }

  // Sums the tile. On entry the current stage is the tile's first and `even` holds it; on exit the current stage is the one after its last.
  MEGAMOE_DEVICE void run(StageReader<Config>& reader, uint32 num_k_blocks) {
    float sums[kTokens / 2];
#pragma unroll
    for (uint32 i = 0; i < kTokens / 2; ++i) totals[i] = sums[i] = 0.0f;
    if constexpr (Config::kLoadsAhead)
      if (num_k_blocks > 1) reader.load(packed);
    constexpr bool kIsOverlapped = kTokens <= Config::kMaxDoubleBuffered;
    const uint32 k = kIsOverlapped ? run_overlapped(sums, reader, num_k_blocks) : run_in_turns(sums, reader, num_k_blocks);
    // At most three blocks are left when K is no multiple of 512.
#pragma unroll 1
    for (uint32 rest = k; rest < num_k_blocks; ++rest) {
      multiply_alone(sums, reader, true, rest + 1 < num_k_blocks, rest + 2 < num_k_blocks);
      promote(sums);
    }
  }

 private:
  // While one block multiplies, the next is expanded; at most one group is left running, so nothing waits for the tensor cores to drain
  // except the promotion. The interval is unrolled: a conditional promotion makes the assembler insert waits of its own (C7517). Returns
  // the blocks done.
  MEGAMOE_DEVICE uint32 run_overlapped(float (&sums)[kTokens / 2], StageReader<Config>& reader, uint32 num_k_blocks) {
    sm90::WeightFragment odd;
    uint32 k = 0;
#pragma unroll 1
    for (; k + kPromotionBlocks <= num_k_blocks; k += kPromotionBlocks) {
      uint32 odd_stage = 0;
#pragma unroll
      for (uint32 pair = 0; pair < kPromotionBlocks / 2; ++pair) {
        multiply<Config, kTokens>(sums, even, reader.stage(), pair == 0);
        const uint32 even_stage = reader.pipe.stage;
        reader.pipe.advance();
        if (pair > 0) {
          ptx::wgmma_wait<1>();
          reader.release(odd_stage);
        }
        expand_next(reader, odd, true, k + 2 * pair + 2 < num_k_blocks);
        multiply<Config, kTokens>(sums, odd, reader.stage(), false);
        ptx::wgmma_wait<1>();
        reader.release(even_stage);
        odd_stage = reader.pipe.stage;
        reader.pipe.advance();
        expand_next(reader, even, k + 2 * pair + 2 < num_k_blocks, k + 2 * pair + 3 < num_k_blocks);
      }
      ptx::wgmma_wait<0>();
      ptx::pin_registers(sums);
      reader.release(odd_stage);
      promote(sums);
    }
    return k;
  }

  // For tiles whose sums leave no registers for a second fragment: while this warpgroup expands, the others multiply.
  MEGAMOE_DEVICE uint32 run_in_turns(float (&sums)[kTokens / 2], StageReader<Config>& reader, uint32 num_k_blocks) {
    uint32 k = 0;
#pragma unroll 1
    for (; k + kPromotionBlocks <= num_k_blocks; k += kPromotionBlocks) {
#pragma unroll
      for (uint32 i = 0; i < kPromotionBlocks; ++i)
        multiply_alone(sums, reader, i == 0, k + i + 1 < num_k_blocks, k + i + 2 < num_k_blocks);
      promote(sums);
    }
    return k;
  }

  // Multiplies the current stage to the end, then expands the one after it.
  MEGAMOE_DEVICE void multiply_alone(float (&sums)[kTokens / 2], StageReader<Config>& reader, bool fresh, bool has_next, bool has_another) {
    multiply<Config, kTokens>(sums, even, reader.stage(), fresh);
    ptx::wgmma_wait<0>();
    ptx::pin_registers(sums);
    reader.release(reader.pipe.stage);
    reader.pipe.advance();
    expand_next(reader, even, has_next, has_another);
  }

  // Expands the tile's next block, if there is one. With two warpgroups it pays to have its weights in registers by now (4 to 6 % at 128
  // tokens, H200, 2026-11-21); with more it costs 3 to 5 %.
  MEGAMOE_DEVICE void expand_next(StageReader<Config>& reader, sm90::WeightFragment& a, bool has_next, bool has_another) {
    if (!has_next) return;
    if constexpr (!Config::kLoadsAhead) reader.load(packed);
    sm90::expand(packed, a);
    if constexpr (Config::kLoadsAhead)
      if (has_another) reader.load(packed);
  }

  MEGAMOE_DEVICE void promote(const float (&sums)[kTokens / 2]) {
#pragma unroll
    for (uint32 i = 0; i < kTokens / 2; ++i) totals[i] += sums[i];
  }
};

// A warpgroup without weight rows (last tile of N) keeps the ring moving.
template <class Config>
MEGAMOE_DEVICE void skip_tile(StageReader<Config>& reader, uint32 num_k_blocks) {
#pragma unroll 1
  for (uint32 k = 0; k < num_k_blocks; ++k) reader.skip();
}

}  // namespace megamoe
