// Publisher: tells the other blocks what this block's math warpgroups have finished, and ends the rank's call.
//
// It is no warp of its own but a part of the fold warp, which polls it whenever it waits: a release waits until all stores of the SM are
// acknowledged, 0.6 us at best and 2 us while weights stream at full rate (H200, 2026-11-21), and math warps have better things to do.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>
#include <megamoe/roles/gemm_schedule.cuh>

namespace megamoe {

// By one thread. Tasks are published in the order in which the block has claimed them.
template <class Config>
struct TaskPublisher {
  const MegaMoeParams& p;
  uint32 num_tiles;      // of the call
  TileReader tiles;      // at the oldest task that has not been published; its slot is kept until then
  uint32 done;           // shared address of DoneBarriers
  bool is_over = false;  // all tasks are published

  // Publishes the oldest task if math is done with it.
  MEGAMOE_DEVICE void poll() {
    if (is_over || !tiles.pipe.is_full()) return;
    const Tile& task = tiles.slots[tiles.pipe.stage];
    is_over = task.num_tokens == 0;
    if (is_over || !ptx::mbarrier_test(DoneBarriers::of(done, tiles.pipe.stage), tiles.pipe.phase)) return;
    const uint32 end = p.flow.row_blocks[task.linear], first = task.row_tile * Config::kMathWarpgroups;
    const bool has_rows = Config::kClusterBlocks == 1 || first < end;  // for a block of a cluster there may be none left
    const uint32 num_row_blocks = has_rows ? min_of(Config::kMathWarpgroups, end - first) : 0;
    if (task.linear == 0)
      p.flow.publish_activated(task.number, num_row_blocks);
    else if (p.flow.is_slot_used_again(task.number, num_tiles))
      p.flow.publish_finished(task.number, num_row_blocks);
    ptx::mbarrier_arrive(tiles.pipe.empty());
    tiles.pipe.advance();
  }
};

// The last block of a rank to publish all its tasks tells every rank; `finish` releases what was not worth a publication of its own. By a
// warp.
template <class Layout, class Config>
MEGAMOE_DEVICE void end_call(const MegaBlock<Layout, Config>& block, int64 epoch) {
  const MegaMoeParams& p = block.p;
  const uint32 lane = threadIdx.x % 32;
  if (!__any_sync(~0u, lane == 0 && p.end.finish())) return;
  __syncwarp();  // what lane 0 has acquired is behind every lane's post
  for (uint32 r = lane; r < p.symm.num_ranks; r += 32) post_to_peer<&Layout::combine_ready>(p.symm, r, epoch);
  p.flow.clear(lane, 32);
  if (lane == 0) p.end.clear();
}

}  // namespace megamoe
