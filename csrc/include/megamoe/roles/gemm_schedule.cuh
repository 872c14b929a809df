// Scheduler: one thread walks the tiles of its block and hands them to the other roles through a small ring, ahead of time. The index
// arithmetic (five divisions and a search) takes longer than an epilogue; in the math warps it cost 0.6 to 2 us per tile (H200,
// 2026-11-21).
#pragma once

#include <megamoe/kernels/fp4_gemm_facts.cuh>

namespace megamoe {

template <class Config>
MEGAMOE_DEVICE void gemm_schedule(const Fp4GemmParams& p, const GroupTable<Config>& table, Tile* slots, TilePipeline pipe) {
  TileStream<Config> stream(table, p.num_k_blocks, p.workspace != nullptr);
  for (bool is_valid = true; is_valid; pipe.advance()) {
    Tile tile;
    is_valid = stream.next(tile);
    if (!is_valid) tile.num_tokens = 0;  // the end
    pipe.acquire();
    slots[pipe.stage] = tile;
    pipe.publish();
  }
}

// A consumer's end of the ring: `warp` arrives once per tile, by one of its threads.
struct TileReader {
  const Tile* slots;
  TilePipeline pipe;

  // By a whole warp.
  MEGAMOE_DEVICE Tile next() {
    const Tile tile = read();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipe.empty());
    pipe.advance();
    return tile;
  }
  // By a single thread that stands for its warp.
  MEGAMOE_DEVICE Tile next_alone() {
    const Tile tile = read();
    ptx::mbarrier_arrive(pipe.empty());
    pipe.advance();
    return tile;
  }

 private:
  MEGAMOE_DEVICE Tile read() const {
    pipe.wait_full();
    return slots[pipe.stage];
  }
};

}  // namespace megamoe
