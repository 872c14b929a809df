// All interleavings of the roles of two blocks for small shapes: a search over the states of an abstract machine that waits and publishes
// through the real TileFlow and takes its tasks from the real MoeTaskStream. No state is stuck before the end, and nobody reads or replaces
// a row of another tile or one that is not ready.
// Arguments: missing_slots (below the bound of moe_tasks.cuh), holds_rows (1: rows in flight are kept back while a slot is awaited).
#include <cstring>
#include <deque>
#include <string>
#include <unordered_set>

#include "arguments.hpp"
#include "tables.hpp"

namespace protocol {

constexpr uint32 kBlocks = 2, kRowBlocks[2] = {2, 1}, kMostSlots = 8, kMostRows = 8, kNothing = 255, kInFlight = 2, kClaims = 2,
                 kFoldRun = 2;
using Config = TileConfig<1, 2>;

// How far a row of the pool has come, and the tile it is of.
enum Content : uint8 { kEmpty, kPulled, kFolded };
struct PoolRow {
  uint8 tile, content, num_computed[2];  // row blocks of each linear that are done with it
};

struct BlockState {
  uint8 tasks[kClaims], num_tasks, has_started, is_done;  // claimed tasks, the first one loaded
  uint8 unpublished[kClaims], num_unpublished;            // computed ones, which keep their places until they are published
  uint8 num_started, num_landed;                          // of the block's rows
  uint8 num_folded;                                       // of its runs of rows
};

// Everything that changes. Compared and hashed as bytes: states are made by copying all of them, padding too.
struct State {
  SlotCounters counters[kMostSlots];
  PoolRow pool[kMostSlots * 2];
  BlockState blocks[kBlocks];
  uint8 num_tickets;
};

// In the place of CallWatch: looks once.
struct Look {
  struct {
    uint32 rank;
  } symm{0};
  mutable bool is_there = true;

  template <class Poll>
  void wait(uint32, Poll poll) const {
    int64 got;
    is_there = poll(got);
  }
};

struct Explorer {
  GroupTable<Config> table;
  MoeStreamShape shape;
  bool holds_rows;
  std::vector<Tile> tasks;
  std::vector<RowPlace> rows;
  std::vector<std::pair<RowPlace, uint32>> runs[kBlocks];  // that a block folds: first row and number of rows

  Explorer(const std::vector<uint32>& counts, uint32 band, uint32 lag, uint32 missing_slots, bool holds_rows)
      : shape{{kRowBlocks[0], kRowBlocks[1]}, {1, 1}, band, lag,
              {std::max(lag + 2 * band - 1 - missing_slots, 1u), Config::TokenTiles::largest()}},
        holds_rows(holds_rows) {
    const std::vector<int32> offsets = offsets_of(counts);
    build_table(table, offsets);
    MoeTaskStream<Config> stream(table, shape);
    for (Tile task; stream.find(static_cast<uint32>(tasks.size()), task);) tasks.push_back(task);
    for (int32 row = 0; row < offsets.back(); ++row) rows.push_back(place_of(row, table));
    for (uint32 b = 0; b < kBlocks; ++b)
      for_each_run<kFoldRun>(table, offsets.back(), b, kBlocks, [&](RowPlace place, uint32 count) { runs[b].push_back({place, count}); });
  }

  TileFlow flow(State& state) const { return {state.counters, shape.ring, {kRowBlocks[0], kRowBlocks[1]}}; }
  PoolRow& pool_row(State& state, const RowPlace& place) const { return state.pool[shape.ring.first_row(place.tile) + place.idx]; }
  uint32 num_rows(uint32 block) const { return (static_cast<uint32>(rows.size()) + kBlocks - 1 - block) / kBlocks; }
  const RowPlace& row(uint32 block, uint32 idx) const { return rows[idx * kBlocks + block]; }

  template <class Wait>
  static bool looks_there(Wait wait) {
    const Look look;
    wait(look);
    return look.is_there;
  }

  // One step of a role of a block; false if it must wait or has nothing left to do.
  using Step = bool (Explorer::*)(State&, uint32) const;

  bool claim(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    if (block.is_done || block.num_tasks + block.num_unpublished == kClaims) return false;
    if (s.num_tickets == tasks.size()) return block.is_done = true;
    block.tasks[block.num_tasks++] = s.num_tickets++;
    return true;
  }

  bool load(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    if (block.num_tasks == 0 || block.has_started) return false;
    const Tile& task = tasks[block.tasks[0]];
    const bool is_there = looks_there([&](const Look& look) {
      task.linear == 0 ? flow(s).wait_pulled(task.number, look) : flow(s).wait_folded(task.number, look);
    });
    if (!is_there) return false;
    for (uint32 i = 0; i < task.num_tokens; ++i) {
      const PoolRow& row = s.pool[task.first_row + i];
      expect(row.tile == task.number && row.content == (task.linear == 0 ? kPulled : kFolded),
             "linear %u of tile %u reads a row that is not ready", task.linear, task.number);
    }
    return block.has_started = true;
  }

  bool compute(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    if (!block.has_started) return false;
    const Tile& task = tasks[block.tasks[0]];
    for (uint32 i = 0; i < task.num_tokens; ++i) {
      PoolRow& row = s.pool[task.first_row + i];
      expect(row.tile == task.number, "tile %u was replaced while linear %u used it", task.number, task.linear);
      ++row.num_computed[task.linear];
    }
    block.unpublished[block.num_unpublished++] = block.tasks[0];
    block.tasks[0] = block.tasks[1];
    block.tasks[--block.num_tasks] = kNothing;
    block.has_started = false;
    return true;
  }

  bool publish(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    if (block.num_unpublished == 0) return false;
    const Tile& task = tasks[block.unpublished[0]];
    if (task.linear == 0)
      flow(s).publish_activated(task.number, 1);
    else if (flow(s).is_slot_used_again(task.number, table.num_tiles))
      flow(s).publish_finished(task.number, 1);
    block.unpublished[0] = block.unpublished[1];
    block.unpublished[--block.num_unpublished] = kNothing;
    return true;
  }

  bool start_row(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    if (block.num_started == num_rows(b) || block.num_started - block.num_landed == kInFlight) return false;
    const RowPlace& place = row(b, block.num_started);
    if (!looks_there([&](const Look& look) { flow(s).wait_free(place.tile, look); })) return false;
    PoolRow& to = pool_row(s, place);
    expect(to.tile == kNothing || to.num_computed[1] == kRowBlocks[1], "tile %u takes a row of tile %u, which is in use", place.tile,
           to.tile);
    to = {static_cast<uint8>(place.tile), kEmpty, {0, 0}};
    ++block.num_started;
    return true;
  }

  // A pull that keeps rows back lands one only to make room for the next, or at the end.
  bool land_row(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    const uint32 in_flight = block.num_started - block.num_landed;
    if (in_flight == 0 || (holds_rows && in_flight < kInFlight && block.num_started < num_rows(b))) return false;
    const RowPlace& place = row(b, block.num_landed++);
    pool_row(s, place).content = kPulled;
    flow(s).publish_pulled(place);
    return true;
  }

  bool fold_run(State& s, uint32 b) const {
    BlockState& block = s.blocks[b];
    if (block.num_folded == runs[b].size()) return false;
    const auto& [place, count] = runs[b][block.num_folded];
    if (!looks_there([&, tile = place.tile](const Look& look) { flow(s).wait_activated(tile, look); })) return false;
    for (uint32 i = 0; i < count; ++i) {
      PoolRow& to = (&pool_row(s, place))[i];
      expect(to.tile == place.tile && to.content == kPulled && to.num_computed[0] == kRowBlocks[0],
             "tile %u is folded before it is activated", place.tile);
      to.content = kFolded;
    }
    ++block.num_folded;
    flow(s).publish_folded(place, count);
    return true;
  }

  bool is_over(const State& s) const {
    for (uint32 b = 0; b < kBlocks; ++b) {
      const BlockState& block = s.blocks[b];
      const bool has_tasks = !block.is_done || block.num_tasks + block.num_unpublished > 0;
      if (has_tasks || block.num_landed < num_rows(b) || block.num_folded < runs[b].size()) return false;
    }
    return true;
  }

  // Visits every state. False if one is stuck.
  bool explore(uint64& num_states) const {
    State begin;
    std::memset(static_cast<void*>(&begin), 0, sizeof(begin));
    for (PoolRow& row : begin.pool) row.tile = kNothing;
    for (BlockState& block : begin.blocks) {
      std::memset(block.tasks, kNothing, sizeof(block.tasks));
      std::memset(block.unpublished, kNothing, sizeof(block.unpublished));
    }
    constexpr Step kSteps[] = {&Explorer::claim,     &Explorer::load,     &Explorer::compute, &Explorer::publish,
                               &Explorer::start_row, &Explorer::land_row, &Explorer::fold_run};
    std::unordered_set<std::string> seen{bytes(begin)};
    for (std::deque<State> open{begin}; !open.empty(); open.pop_front()) {
      bool can_go_on = false;
      for (uint32 b = 0; b < kBlocks; ++b)
        for (const Step step : kSteps) {
          State next;
          std::memcpy(static_cast<void*>(&next), &open.front(), sizeof(next));
          if (!(this->*step)(next, b)) continue;
          can_go_on = true;
          if (seen.insert(bytes(next)).second) open.push_back(next);
        }
      if (!can_go_on && !is_over(open.front())) return false;
    }
    num_states += seen.size();
    return true;
  }

 private:
  static std::string bytes(const State& state) { return {reinterpret_cast<const char*>(&state), sizeof(state)}; }
};

}  // namespace protocol

void megamoe::machine::observe(const void*, Scope) {}

int main(int argc, char** argv) {
  using namespace protocol;
  const Arguments arguments(argc, argv);
  const auto missing_slots = static_cast<uint32>(arguments.number("missing_slots"));
  const bool holds_rows = arguments.number("holds_rows");
  uint64 num_states = 0;
  for (const std::vector<uint32>& counts : {std::vector<uint32>{1, 1, 1, 1}, {5, 1}, {0, 4, 2}, {7}, {2, 1, 0, 2}})
    for (uint32 band = 1; band <= 2; ++band)
      for (uint32 lag = 0; lag <= 2; ++lag)
        if (!Explorer(counts, band, lag, missing_slots, holds_rows).explore(num_states)) {
          std::printf("stuck: band %u lag %u\n", band, lag);
          return 2;
        }
  std::printf("ok: %llu states\n", num_states);
}
