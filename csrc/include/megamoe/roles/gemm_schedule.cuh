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

// A consumer's end of the ring. Every thread that reads says so itself. One lane would do for its warp behind a __syncwarp, but the
// assembler drops the sync of a warp that cannot diverge, and racecheck then reports the reads of the other lanes (48f8373).
struct TileReader {
  const Tile* slots;
  TilePipeline pipe;

  MEGAMOE_DEVICE Tile next() {
    pipe.wait_full();
    const Tile tile = slots[pipe.stage];
    ptx::mbarrier_arrive(pipe.empty());
    pipe.advance();
    return tile;
  }
};

}  // namespace megamoe
