// fp4_gemm: y[row, :] = x[row, :] @ W[group of row]^T with E4M3 tokens (one UE8M0 scale per token) and FP4 weights in sm_90a kernel layout.
//
// Operands are swapped: 64 weight rows are the M side of each wgmma (A, expanded from FP4 in registers), tokens are the N side (B, from
// shared memory). One persistent block per SM walks the tiles of schedule/grouped_tiles.cuh:
//
//     scheduler (1 thread) which tile is next                           -> ring of tiles
//     loader (1 thread)    weights and tokens by tensor copies          -> ring of stages, one K = 128 block each
//     math warpgroups      64 weight rows each: expand, multiply, promote every 512 of K, then the epilogue
//
// Params, SmemPlan and barriers are in fp4_gemm_facts.cuh, roles in roles/; this file is their table of contents.
#pragma once

#include <megamoe/roles/gemm_load.cuh>
#include <megamoe/roles/gemm_math.cuh>
#include <megamoe/roles/gemm_schedule.cuh>

namespace megamoe {

template <class Config>
MEGAMOE_DEVICE void fp4_gemm(const Fp4GemmParams& p) {
  using Plan = SmemPlan<Config>;
  extern __shared__ __align__(1024) uint8 smem[];
  auto& table = *reinterpret_cast<GroupTable<Config>*>(smem + Plan::kTable);
  auto* tiles = reinterpret_cast<Tile*>(smem + Plan::kTiles);
  const uint32 base = ptx::shared_address(smem);
  const TilePipeline tile_pipe(base + Plan::kTileBarriers);
  constexpr uint32 kMathWarps = Config::kMathWarpgroups * 4;
  const uint32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

  if (threadIdx.x == kMathWarps * 32) {
    ptx::prefetch_tensor_map(&p.w_map);
    for (uint32 i = 0; i < Config::TokenTiles::kCount; ++i) ptx::prefetch_tensor_map(&p.x_maps[i]);
    StagePipeline<Config>::init(base + Plan::kBarriers, kMathWarps);
    TilePipeline::init(base + Plan::kTileBarriers, kMathWarps * 32 + 1);  // math, load
    ptx::fence_mbarrier_init();
  }
  table.build(p.grouping, ceil_div(p.num_row_blocks, Config::kMathWarpgroups), threadIdx.x, Config::kThreads);
  __syncthreads();

  if (warp >= kMathWarps) {
    ptx::give_registers<Config::kAuxRegisters>();
    if (warp == kMathWarps && ptx::elect_one()) gemm_load<Config>(p, {tiles, tile_pipe}, base);
    if (warp == kMathWarps + 1 && ptx::elect_one()) gemm_schedule<Config>(p, table, tiles, tile_pipe);
  } else {
    ptx::take_registers<Config::kMathRegisters>();
    gemm_math<Config>(p, {tiles, tile_pipe}, base, warp / 4);
  }
}

}  // namespace megamoe
