// Pull: one warp fetches the block's share of the rank's rows from the ranks their tokens live on into the pool.
//
// Rows are dealt to the blocks one by one in row order, so all blocks fetch rows of the tiles that are due next. Lane l looks after row
// 32 i + l of the block from its routing to its publication: the remote reads of 32 rows are in flight together, and no value changes
// lanes. Bytes go peer -> shared memory -> pool by bulk copies, kPullBuffers rows at a time.
#pragma once

#include <megamoe/kernels/mega_moe.cuh>

namespace megamoe {

// A row on its way, in the lane that looks after it.
struct PulledRow {
  RowPlace place;
  uint32 pool_row;
  const uint8* codes;  // in the source rank's arena
  float weight;
  uint32 sf;
  int64 dst;
};

template <class Layout, class Config>
MEGAMOE_DEVICE PulledRow find_row(const MegaBlock<Layout, Config>& block, uint32 row) {
  constexpr uint32 kEntriesPerRank = Config::kMaxTokens * Config::kNumTopk;
  const MegaMoeParams& p = block.p;
  const uint32 entry = p.row_entry[row], src = entry / kEntriesPerRank;
  const uint32 token = entry % kEntriesPerRank / Config::kNumTopk, slot = entry % Config::kNumTopk;
  PulledRow found;
  found.weight = *p.symm.at<&Layout::topk_weights>(src, token, slot);
  found.sf = *p.symm.at<&Layout::x_sf>(src, token, 0);
  found.codes = reinterpret_cast<const uint8*>(p.symm.at<&Layout::x>(src, token, 0));
  found.dst = reinterpret_cast<int64>(p.symm.at<&Layout::partials>(src, token, slot, 0));
  found.place = place_of(row, block.table);
  found.pool_row = p.stream.ring.first_row(found.place.tile) + found.place.idx;
  return found;
}

// The block's rows between start and finish: at most kPullBuffers, in the order of a ring of buffers.
template <class Layout, class Config>
struct RowsInFlight {
  using Plan = MegaSmemPlan<Config>;
  static constexpr uint32 kRowBytes = Config::kHidden;

  const MegaBlock<Layout, Config>& block;
  typename Plan::PullPipeline starts, finishes;
  uint64 policy = ptx::policy_evict_first();
  Timeline<Config::kTimeline> timeline;  // of the lane: it looks after one row at a time

  MEGAMOE_DEVICE explicit RowsInFlight(const MegaBlock<Layout, Config>& block)
      : block(block), starts(block.base + Plan::kPullBarriers), finishes(starts), timeline(block.timeline(kPullLane, true)) {}

  // By the warp; the row is lane `owner`'s.
  MEGAMOE_DEVICE void start(uint32 owner, const PulledRow& row, const CallWatch<Layout>& watch) {
    const MegaMoeParams& p = block.p;
    if (threadIdx.x % 32 == owner) {
      timeline.begin();
      p.flow.wait_free(row.place.tile, watch);
      timeline.write(SpanKind::kPullWait, row.place.tile, row.place.idx);
      p.row_weight[row.pool_row] = row.weight;
      p.pool_sf[row.pool_row] = row.sf;
      p.row_dst[row.pool_row] = row.dst;
      ptx::mbarrier_arrive_expect_bytes(starts.full(), kRowBytes);
      ptx::bulk_load(buffer(starts.stage), row.codes, kRowBytes, starts.full(), policy);
    }
    starts.advance();
    timeline.advance();
    __syncwarp();
  }

  // Brings the oldest row from its buffer to the pool and publishes it. By the warp; the row is lane `owner`'s.
  MEGAMOE_DEVICE void finish(uint32 owner, const PulledRow& row) {
    const MegaMoeParams& p = block.p;
    if (threadIdx.x % 32 == owner) {
      finishes.wait_full();
      ptx::bulk_store(p.pool_codes + uint64(row.pool_row) * kRowBytes, buffer(finishes.stage), kRowBytes);
      ptx::bulk_commit();
      ptx::bulk_wait();
      p.flow.publish_pulled(row.place);
      timeline.write(SpanKind::kPull, row.place.tile, row.place.idx);
    }
    finishes.advance();
    timeline.advance();
    __syncwarp();
  }

 private:
  MEGAMOE_DEVICE uint32 buffer(uint32 stage) const { return block.base + Plan::kPullBuffers + stage * kRowBytes; }
};

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_pull(const MegaBlock<Layout, Config>& block) {
  const MegaMoeParams& p = block.p;
  const CallWatch<Layout> watch = block.watch(CallPhase::kExperts);
  const uint32 lane = threadIdx.x % 32;
  RowsInFlight<Layout, Config> rows(block);
  ptx::fence_proxy_async_global();  // bulk copies read what the ranks' threads wrote

  for (uint32 first = block.idx; first < block.num_rows; first += 32 * p.num_blocks) {
    const uint32 count = min_of(32, ceil_div(block.num_rows - first, p.num_blocks));
    PulledRow row;
    if (lane < count) row = find_row(block, first + lane * p.num_blocks);
    uint32 num_finished = 0;
#pragma unroll 1
    for (uint32 i = 0; i < count; ++i) {
      // No row is kept back while a slot is awaited: the tasks that free the slot may come after those that want the row.
      const bool is_free = __any_sync(~0u, lane == i && p.flow.is_free(row.place.tile));
      const uint32 most_in_flight = is_free ? Config::kPullBuffers - 1 : 0;
#pragma unroll 1
      for (; i - num_finished > most_in_flight; ++num_finished) rows.finish(num_finished, row);
      rows.start(i, row, watch);
    }
#pragma unroll 1
    for (; num_finished < count; ++num_finished) rows.finish(num_finished, row);
  }
}

}  // namespace megamoe
