// Sums of tiles that are cut along K: contributors leave them in the workspace, the owner adds them in block order, so results repeat bit
// for bit.
//
// Workspace: four flags per block, then per block and warpgroup one slot of float4 [max tokens / 8][128 threads] in fragment order. A
// flag is set by the contributor (release), awaited by the owner (acquire) and set back by it: between launches all flags are zero,
// wherever the slots of a config lie.
#pragma once

#include <megamoe/kernels/fp4_gemm_facts.cuh>

namespace megamoe {

template <class Config>
struct TailSums {
  static constexpr uint32 kSlotFloats = SmemPlan<Config>::kMaxTokens / 2 * 128;

  float* workspace;
  uint32 warpgroup, thread, barrier;

  template <uint32 kTokens>
  MEGAMOE_DEVICE void leave(const float (&totals)[kTokens / 2]) const {
    float4* to = slot(blockIdx.x);
#pragma unroll
    for (uint32 j = 0; j < kTokens / 8; ++j)
      __stcg(to + j * 128, make_float4(totals[4 * j], totals[4 * j + 1], totals[4 * j + 2], totals[4 * j + 3]));
    ptx::barrier_sync<128>(barrier);  // orders the warpgroup's stores before the release
    if (thread == 0) ptx::st_release_gpu(flag(blockIdx.x), 1);
  }

  template <uint32 kTokens>
  MEGAMOE_DEVICE void add(float (&totals)[kTokens / 2], uint32 num_contributors) const {
#pragma unroll 1
    for (uint32 block = blockIdx.x - num_contributors; block < blockIdx.x; ++block) {
      if (thread == 0)
        while (ptx::ld_acquire_gpu(flag(block)) == 0) {}
      ptx::barrier_sync<128>(barrier);
      const float4* from = slot(block);
#pragma unroll
      for (uint32 j = 0; j < kTokens / 8; ++j) {
        const float4 v = __ldcg(from + j * 128);
        totals[4 * j] += v.x, totals[4 * j + 1] += v.y, totals[4 * j + 2] += v.z, totals[4 * j + 3] += v.w;
      }
      if (thread == 0) ptx::st_release_gpu(flag(block), 0);
    }
  }

 private:
  static constexpr uint32 kFlagsPerBlock = 4;

  MEGAMOE_DEVICE uint32* flag(uint32 block) const { return reinterpret_cast<uint32*>(workspace) + block * kFlagsPerBlock + warpgroup; }
  MEGAMOE_DEVICE float4* slot(uint32 block) const {
    const uint64 idx = uint64(block) * Config::kMathWarpgroups + warpgroup;
    return reinterpret_cast<float4*>(workspace + gridDim.x * kFlagsPerBlock + idx * kSlotFloats) + thread;
  }
};

}  // namespace megamoe
