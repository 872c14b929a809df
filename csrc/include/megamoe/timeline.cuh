// Timeline: what each role of each block did when, for people who look for gaps (launch/trace_moe.py draws it).
//
// A debug build: Config::kTimeline is false in every shipped kernel, where Timeline is empty and each of its calls compiles to nothing.
// Switched on it costs registers, and math warpgroups may spill. megamoe/testing/timeline.py mirrors the record, the lanes and the kinds.
#pragma once

#include <megamoe/ptx/timer.cuh>
#include <megamoe/schedule/tile.cuh>

namespace megamoe {

// What a role was busy with; waits are kinds of their own.
enum class SpanKind : uint32 {
  kWeights,      // issuing the copies of a task's weights, which includes waiting for free stages
  kTokensWait,   // until all rows of the tile are there
  kTokens,       // issuing the copies of a task's tokens
  kPullWait,     // until the slot of the row's tile is free
  kPull,         // from the remote read of a row to its publication
  kFoldWait,     // until linear 1 of the row's tile is done
  kFold,
  kStageWait,    // until the first stage of a task is full, and its weights are expanded
  kMainLoop,
  kEpilogue,     // to its last store; the next task is taken meanwhile
  kSkippedTask,  // its weight rows are all other warpgroups'
  kMeetPeers,    // from the last task to combine_ready of every rank
  kSumSlots,
};

// Roles that record, each in a lane of its own; math warpgroup w has kMathLane + w, whatever the number of warpgroups.
enum TimelineLane : uint32 { kWeightsLane, kTokensLane, kPullLane, kFoldLane, kMathLane, kNumTimelineLanes = kMathLane + 4 };

struct alignas(16) TimelineSpan {
  uint64 begin_ns, end_ns;
  SpanKind kind;
  uint32 tile;    // number of the token tile; 0 outside of tasks
  uint32 linear;  // 0 or 1
  uint32 part;    // of the tile: its row tile, or its row (pull, fold)
};
static_assert(sizeof(TimelineSpan) == 32);

// Record 0 of a lane has the number of its spans, in begin_ns: more than `capacity` when some were dropped. The host zeroes all.
struct TimelineBuffer {
  TimelineSpan* records;  // [num_blocks, kNumTimelineLanes, 1 + capacity]
  uint32 capacity;        // spans of a lane
};

// One thread's pen. Spans follow each other: each begins where the one before ended, or at the last `begin`.
template <bool kOn>
class Timeline {
 public:
  MEGAMOE_DEVICE Timeline(const TimelineBuffer&, uint32, bool) {}
  MEGAMOE_DEVICE void begin() {}
  MEGAMOE_DEVICE void mark(SpanKind, const Tile&) {}
  MEGAMOE_DEVICE void mark(SpanKind, uint32 = 0, uint32 = 0, uint32 = 0) {}
  MEGAMOE_DEVICE void write(SpanKind, uint32, uint32) {}
  MEGAMOE_DEVICE void advance() {}
};

template <>
class Timeline<true> {
 public:
  // `lane_idx` counts over all blocks. Of threads that share a lane, `is_writer` says which one's marks are kept.
  MEGAMOE_DEVICE Timeline(const TimelineBuffer& buffer, uint32 lane_idx, bool is_writer)
      : records_(buffer.records + uint64(lane_idx) * (1 + buffer.capacity)), capacity_(buffer.capacity), is_writer_(is_writer) {
    begin();
  }

  MEGAMOE_DEVICE void begin() { last_ns_ = ptx::global_timer_ns(); }

  // Ends the current span.
  MEGAMOE_DEVICE void mark(SpanKind kind, const Tile& task) { mark(kind, task.number, task.row_tile, task.linear); }
  MEGAMOE_DEVICE void mark(SpanKind kind, uint32 tile = 0, uint32 part = 0, uint32 linear = 0) {
    if (is_writer_) write(kind, tile, part, linear);
    advance();
  }

  // The halves of `mark`, for threads that share a lane and write in turns: one writes, then all advance.
  MEGAMOE_DEVICE void write(SpanKind kind, uint32 tile, uint32 part, uint32 linear = 0) {
    const uint64 now = ptx::global_timer_ns();
    records_[0].begin_ns = num_spans_ + 1;
    if (num_spans_ < capacity_) records_[1 + num_spans_] = {last_ns_, now, kind, tile, linear, part};
    last_ns_ = now;
  }
  MEGAMOE_DEVICE void advance() { ++num_spans_; }

 private:
  TimelineSpan* records_;
  uint32 capacity_, num_spans_ = 0;
  bool is_writer_;
  uint64 last_ns_;
};

}  // namespace megamoe
