// Fold: one warp brings the block's share of the activated rows to one exponent per row, in place, so that linear 2 needs no scales in its
// main loop (exponents per 128 channels cost a quarter of its speed at 128 tokens). Linear 1 leaves the codes in natural order; where linear 2
// wants thread order, this is where they change places.
//
// Rows are dealt to the blocks in row order, Config::kFoldRun neighbours at a time, which are published together: a release waits for all
// stores of the SM, those of linear 2 to other GPUs among them. While rows were pulled, 7.3 us for each row one by one was more than the
// blocks had (four H200, v4-flash, 8192 tokens: 2717 us a call, 2552 with two rows at a time).
#pragma once

#include <megamoe/fold_codes.cuh>
#include <megamoe/roles/mega_publish.cuh>
#include <megamoe/thread_order.cuh>

namespace megamoe {

// Folds one row of I codes with I / 32 exponents; returns its exponent, for all lanes. By a warp.
template <class Config>
MEGAMOE_DEVICE uint32 fold_row(uint8* codes, const uint8* sf, uint32 lane) {
  constexpr uint32 kGroups = Config::kIntermediate / 32, kVectors = Config::kIntermediate / 16;
  constexpr uint32 kPerLane = ceil_div(kVectors, 32), kInFlight = ceil_div(kPerLane, ceil_div(kPerLane, 3));  // 4 would spill
  const auto* vectors = reinterpret_cast<const uint4*>(codes);
  uint4 v[kInFlight];
#pragma unroll
  for (uint32 i = 0; i < kInFlight; ++i)
    if (32 * i + lane < kVectors) v[i] = __ldcg(vectors + 32 * i + lane);
  uint32 largest = 0;
#pragma unroll 4
  for (uint32 group = lane; group < kGroups; group += 32) {
    const uint32 e = sf[group];
    largest = e > largest ? e : largest;
  }
  largest = __reduce_max_sync(~0u, largest);
#pragma unroll 1
  for (uint32 first = 0; first < kVectors; first += 32 * kInFlight) {
    __syncwarp();  // in thread order a lane writes where others have read
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i) {
      const uint32 vector = first + 32 * i + lane;
      if (vector >= kVectors) continue;
      const uint4 folded = fold_codes(v[i], largest - sf[vector / 2]);
      if constexpr (Config::kThreadOrder)
        store_in_thread_order(reinterpret_cast<uint32*>(codes), 4 * vector, folded);
      else
        reinterpret_cast<uint4*>(codes)[vector] = folded;
    }
#pragma unroll
    for (uint32 i = 0; i < kInFlight; ++i) {
      const uint32 vector = first + 32 * (kInFlight + i) + lane;
      if (vector < kVectors) v[i] = __ldcg(vectors + vector);
    }
  }
  return largest;
}

// Waits as a CallWatch, with the publisher at work meanwhile.
template <class Layout, class Config>
struct PublishingWatch {
  const CallWatch<Layout>& watch;
  TaskPublisher<Config>& publisher;
  const Symm& symm;

  template <class Poll>
  MEGAMOE_DEVICE bool wait(uint32 peer, Poll poll) const {
    return watch.wait(peer, [&](int64& got) {
      publisher.poll();
      return poll(got);
    });
  }
};

template <class Layout, class Config>
MEGAMOE_DEVICE void mega_fold(const MegaBlock<Layout, Config>& block, TileReader tiles) {
  const MegaMoeParams& p = block.p;
  const CallWatch<Layout> watch = block.watch(CallPhase::kExperts);
  TaskPublisher<Config> publisher{p, block.table.num_tiles, tiles, block.base + MegaSmemPlan<Config>::kDone};
  const PublishingWatch<Layout, Config> publishing{watch, publisher, p.symm};
  const uint32 lane = threadIdx.x % 32;
  auto timeline = block.timeline(kFoldLane, lane == 0);
  for_each_run<Config::kFoldRun>(block.table, block.num_rows, block.idx, p.num_blocks, [&](RowPlace place, uint32 count) {
    timeline.begin();
    if (lane == 0) p.flow.wait_activated(place.tile, publishing);
    __syncwarp();
    timeline.mark(SpanKind::kFoldWait, place.tile, place.idx);
    const uint32 first = p.stream.ring.first_row(place.tile) + place.idx;
#pragma unroll 1
    for (uint32 row = first; row < first + count; ++row) {
      const uint8* sf = p.linear[0].a_sf + uint64(row) * (Config::kIntermediate / 32);
      const uint32 e = fold_row<Config>(p.linear[0].a_codes + uint64(row) * Config::kIntermediate, sf, lane);
      if (lane == 0) p.act_row_sf[row] = e;
    }
    ptx::fence_proxy_async_global();  // the tensor copies of linear 2 read what the whole warp has written, or found as it is
    __syncwarp();
    if (lane == 0) p.flow.publish_folded(place, count);
    timeline.mark(SpanKind::kFold, place.tile, place.idx);
  });
  while (lane == 0 && !publisher.is_over) {
    publisher.poll();
    machine::nanosleep(kPollPauseNs);
  }
  __syncwarp();
  end_call(block, watch.epoch);
}

}  // namespace megamoe
