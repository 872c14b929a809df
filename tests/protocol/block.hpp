// The roles of one block of mega_moe as threads, each making the accesses to shared state that its warp or warpgroup makes, in that order:
// csrc/include/megamoe/roles/mega_{load,pull,fold,publish,math,combine}.cuh.
#pragma once

#include "call.hpp"
#include "handoff.hpp"

namespace protocol {

struct Stage {
  uint32 rows[kSlotRows][kHidden > kIntermediate ? kHidden : kIntermediate];
};

constexpr uint32 kMostClusterBlocks = 2;
class Block;

// Blocks that take a task together, a row tile each.
struct Cluster {
  uint32 num_blocks;
  Block* blocks[kMostClusterBlocks]{};
  Handoff<uint32, 1> tickets;  // from the first to the others

  explicit Cluster(uint32 num_blocks) : num_blocks(num_blocks), tickets(num_blocks - 1) {}
};

class Block {
 public:
  Block(Call& call, const TileFlow& flow, const CallEnd& end, Cluster& cluster, uint32 idx)
      : call_(call), world_(call.world), memory_(call.memory), flow_(flow), end_(end), cluster_(cluster), idx_(idx),
        rank_(idx % cluster.num_blocks) {
    cluster.blocks[rank_] = this;
  }

  std::vector<std::thread> start() {
    std::vector<std::thread> threads;
    const auto add = [&](uint32 role, auto run) {
      threads.emplace_back([this, role, run] {
        current_rank = call_.rank;
        run(Delays{mix(world_.seed, call_.calls.epoch(), call_.rank, idx_, role)});
      });
    };
    add(0, [this](Delays delays) { claim_tasks(delays); });
    add(1, [this](Delays delays) { load_tokens(delays); });
    add(2, [this](Delays delays) { pull(delays); });
    add(3, [this](Delays delays) { fold_rows(delays); });
    for (uint32 w = 0; w < kWarpgroups; ++w)
      add(4 + w, [this, w](Delays delays) {
        if (compute(w, delays)) combine(w);
      });
    return threads;
  }

 private:
  PoolRow* pool_row(uint32 tile) const { return memory_.pool + call_.rows.shape.ring.first_row(tile); }

  void claim_tasks(Delays delays) {
    MoeTaskStream<Config> stream(call_.rows.table, call_.rows.shape);
    bool is_valid = true;
    for (uint32 n = 0; is_valid; ++n) {
      delays.pause();
      Tile task;
      is_valid = stream.find(claim(n), task);
      if (!is_valid) task.num_tokens = 0;
      task.row_tile = task.row_tile * cluster_.num_blocks + rank_;
      tasks_.put(n, task);
    }
  }

  uint32 claim(uint32 n) {
    if (rank_ > 0) return cluster_.tickets.take(n);
    const uint32 ticket = end_.claim();
    if (cluster_.num_blocks > 1) cluster_.tickets.put(n, ticket);
    return ticket;
  }

  void load_tokens(Delays delays) {
    const CallWatch<Layout> w = call_.watch(CallPhase::kExperts, call_.expert_calls);
    uint32 n = 0;
    for (Tile task = tasks_.take(0); task.num_tokens > 0; task = tasks_.take(++n)) {
      if (task.linear == 0)
        flow_.wait_pulled(task.number, w);
      else
        flow_.wait_folded(task.number, w);
      delays.pause();
      Stage part{};
      for (uint32 i = first_token(rank_, task); i < first_token(rank_ + 1, task); ++i) {
        const PoolRow& row = memory_.pool[task.first_row + i];
        if (task.linear == 0)
          std::memcpy(part.rows[i], row.x, sizeof(row.x));
        else
          std::memcpy(part.rows[i], row.a, sizeof(row.a));
      }
      for (uint32 b = 0; b < cluster_.num_blocks; ++b) cluster_.blocks[b]->parts_[rank_].put(n, part);
    }
  }

  // Of those that block `rank` of the cluster brings to all of them.
  uint32 first_token(uint32 rank, const Tile& task) const { return task.num_tokens * rank / cluster_.num_blocks; }

  // A row between its source rank and the pool.
  struct RowInFlight {
    RowPlace place;
    uint32 row, x[kHidden];
  };

  void pull(Delays delays) {
    const CallWatch<Layout> w = call_.watch(CallPhase::kExperts, call_.pull_calls);
    std::vector<RowInFlight> in_flight;
    const auto finish_oldest = [&] {
      finish_pull(in_flight.front());
      in_flight.erase(in_flight.begin());
    };
    for (uint32 row = idx_; row < call_.rows.entries.size(); row += world_.num_blocks) {
      delays.pause();
      const RowPlace place = place_of(row, call_.rows.table);
      const uint32 most_in_flight = flow_.is_free(place.tile) ? kPullBuffers - 1 : 0;
      while (in_flight.size() > most_in_flight) finish_oldest();
      in_flight.push_back(start_pull(row, place, w));
    }
    while (!in_flight.empty()) {
      delays.pause();
      finish_oldest();
    }
  }

  RowInFlight start_pull(uint32 row, RowPlace place, const CallWatch<Layout>& w) {
    const uint32 entry = call_.rows.entries[row];
    const uint32 src = entry / (kMaxTokens * kTopk), token = entry / kTopk % kMaxTokens, slot = entry % kTopk;
    flow_.wait_free(place.tile, w);
    PoolRow& to = pool_row(place.tile)[place.idx];
    to.weight = *call_.weight_of(src, token, slot);
    to.dst = reinterpret_cast<int64>(call_.partial(src, token, slot));
    RowInFlight started{place, row, {}};
    std::memcpy(started.x, call_.x_row(src, token), sizeof(started.x));
    return started;
  }

  void finish_pull(const RowInFlight& row) {
    std::memcpy(pool_row(row.place.tile)[row.place.idx].x, row.x, sizeof(row.x));
    const size_t lost = world_.fault.loses_first_row ? 0 : call_.rows.entries.size() - 1;
    if (row.row == lost && world_.fault.hits(FaultKind::kLosesRow, call_.rank, call_.calls.epoch())) return;
    flow_.publish_pulled(row.place);
  }

  // Publishes the block's oldest task if all warpgroups are done with it.
  void poll_publisher() {
    if (is_published_ || !tasks_.is_there(num_published_)) return;
    const uint32 n = num_published_;
    const Tile& task = tasks_.look_at(n);
    is_published_ = task.num_tokens == 0;
    if (is_published_ || num_done_[n % kTaskSlots].load(std::memory_order_acquire) < (n / kTaskSlots + 1) * kWarpgroups) return;
    const uint32 first = task.row_tile * kWarpgroups, end = kRowBlocks[task.linear];
    const uint32 num_row_blocks = first < end ? std::min(kWarpgroups, end - first) : 0;
    if (task.linear == 0)
      flow_.publish_activated(task.number, num_row_blocks);
    else if (flow_.is_slot_used_again(task.number, call_.rows.table.num_tiles))
      flow_.publish_finished(task.number, num_row_blocks);
    tasks_.give_back(n);
    ++num_published_;
  }

  // A CallWatch with the publisher at work meanwhile.
  struct PublishingWatch {
    const CallWatch<Layout>& watch;
    Block& block;
    const Symm& symm;

    template <class Poll>
    bool wait(uint32 peer, Poll poll) const {
      return watch.wait(peer, [&](int64& got) {
        block.poll_publisher();
        return poll(got);
      });
    }
  };

  void fold_rows(Delays delays) {
    const CallWatch<Layout> watch = call_.watch(CallPhase::kExperts, call_.fold_calls);
    const PublishingWatch w{watch, *this, call_.symm};
    const auto fold_run = [&](RowPlace place, uint32 count) {
      flow_.wait_activated(place.tile, w);
      for (uint32 i = 0; i < count; ++i) {
        delays.pause();
        fold(pool_row(place.tile)[place.idx + i].a);
      }
      flow_.publish_folded(place, count);
    };
    const uint32 num_rows = static_cast<uint32>(call_.rows.entries.size());
    if (world_.seed % 2 == 0)
      for_each_run<1>(call_.rows.table, num_rows, idx_, world_.num_blocks, fold_run);
    else
      for_each_run<4>(call_.rows.table, num_rows, idx_, world_.num_blocks, fold_run);
    while (!is_published_) {
      poll_publisher();
      wait_briefly();
    }
    end_call(watch.epoch);
  }

  // The fault of this run may silence a rank: nobody of it says combine_ready.
  void end_call(int64 epoch) {
    if (world_.fault.hits(FaultKind::kSilentBeforeCombine, call_.rank, epoch) || !end_.finish()) return;
    for (uint32 r = 0; r < world_.num_ranks; ++r) post_to_peer<&Layout::combine_ready>(call_.symm, r, epoch);
    flow_.clear(0, 1);
    end_.clear();
  }

  // False if the fault of this run silences the warpgroup.
  bool compute(uint32 warpgroup, Delays delays) {
    uint32 n = 0;
    for (Tile task = tasks_.take(0); task.num_tokens > 0; task = tasks_.take(++n)) {
      Stage stage{};
      for (uint32 r = 0; r < cluster_.num_blocks; ++r) {
        const Stage part = parts_[r].take(n);
        for (uint32 i = first_token(r, task); i < first_token(r + 1, task); ++i)
          std::memcpy(stage.rows[i], part.rows[i], sizeof(part.rows[i]));
      }
      delays.pause();
      const uint32 row_block = task.row_tile * kWarpgroups + warpgroup;
      if (row_block < kRowBlocks[task.linear])
        for (uint32 i = 0; i < task.num_tokens; ++i) compute_row(task, row_block, stage.rows[i], memory_.pool[task.first_row + i]);
      delays.pause();
      num_done_[n % kTaskSlots].fetch_add(1, std::memory_order_release);
    }
    return !world_.fault.hits(FaultKind::kSilentBeforeCombine, call_.rank, call_.calls.epoch());
  }

  void compute_row(const Tile& task, uint32 row_block, const uint32* in, PoolRow& row) {
    const uint32 expert = call_.rank * world_.num_local_experts() + task.group, first = row_block * kColumns;
    if (task.linear == 0) {
      for (uint32 i = first; i < first + kColumns; ++i) row.a[i] = linear1(expert, i, in, row.weight);
    } else if (row.dst != 0) {
      for (uint32 i = first; i < first + kColumns; ++i) reinterpret_cast<uint32*>(row.dst)[i] = linear2(expert, i, in);
    }
  }

  void combine(uint32 warpgroup) {
    const CallWatch<Layout> w = call_.watch(CallPhase::kCombine, call_.calls);
    bool is_good = !call_.calls.is_failed(w.epoch);
    if (world_.fault.combine_looks_late && world_.fault.epoch == w.epoch)
      std::this_thread::sleep_for(std::chrono::nanoseconds(2 * world_.fault.hasty_ns));
    for (uint32 r = 0; r < world_.num_ranks; ++r)
      is_good = is_good && w.template wait_for_peer<&Layout::combine_ready>(r) && !w.has_aborted(r);
    is_good = is_good && !call_.calls.is_failed(w.epoch);  // perhaps since the look above: no abort word tells a rank of its own failure
    const Inputs in = call_.inputs();
    for (uint32 token = idx_ * kWarpgroups + warpgroup; token < in.num_tokens(); token += world_.num_blocks * kWarpgroups)
      for (uint32 i = 0; i < kHidden; ++i) memory_.y[token][i] = is_good ? sum_of_slots(token, i) : kNan;
  }

  uint32 sum_of_slots(uint32 token, uint32 column) const {
    uint32 sum = 0;
    for (uint32 slot = 0; slot < kTopk; ++slot)
      if (*call_.symm.at<&Layout::topk_idx>(call_.rank, token, slot) >= 0) sum += call_.partial(call_.rank, token, slot)[column];
    return sum;
  }

  static constexpr uint32 kPullBuffers = 2, kTaskSlots = 2;
  Call& call_;
  const World& world_;
  RankMemory& memory_;
  const TileFlow& flow_;
  const CallEnd& end_;
  Cluster& cluster_;
  uint32 idx_, rank_;  // of the block in its rank, and in its cluster
  Handoff<Tile, kTaskSlots> tasks_{2 + kWarpgroups};  // load tokens, publish, math
  std::atomic<uint32> num_done_[kTaskSlots]{};        // warpgroups, over all tasks of the slot
  uint32 num_published_ = 0;                          // tasks; the fold thread's
  bool is_published_ = false;
  Handoff<Stage, 2> parts_[kMostClusterBlocks]{Handoff<Stage, 2>(kWarpgroups), Handoff<Stage, 2>(kWarpgroups)};  // of each stage
};

// mega_moe of one rank: all its blocks at once.
inline void run_experts(Call& call) {
  LocalWords& words = call.memory.words;
  const TileFlow flow{words.counters, call.rows.shape.ring, {kRowBlocks[0], kRowBlocks[1]}};
  const CallEnd end{&words.num_tickets, &words.num_finished, call.world.num_blocks};
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::thread> threads;
  for (uint32 b = 0; b < call.world.num_blocks; ++b) {
    if (b % call.world.cluster_blocks == 0) clusters.push_back(std::make_unique<Cluster>(call.world.cluster_blocks));
    blocks.push_back(std::make_unique<Block>(call, flow, end, *clusters.back(), b));
  }
  for (const auto& block : blocks)
    for (std::thread& thread : block->start()) threads.push_back(std::move(thread));
  for (std::thread& thread : threads) thread.join();
}

}  // namespace protocol
