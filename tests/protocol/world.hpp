// The ranks of a run: their arenas, what each of them keeps to itself, and the check that every atomic access has the scope its address
// needs. Ranks share nothing else; every datum is plain memory, so ThreadSanitizer sees an edge that the protocol forgets.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include <megamoe/sync/tile_flow.cuh>

#include "layout.hpp"  // generated: struct Layout of a small arena

namespace protocol {

using namespace megamoe;

struct Config {
  static constexpr uint32 kMaxGroups = 8;
  using TokenTiles = Sizes<2, 4>;
};

constexpr uint32 kMaxTokens = Layout::x_extent_0, kHidden = Layout::x_extent_1, kTopk = Layout::topk_idx_extent_1;
constexpr uint32 kNumExperts = 6, kSlotRows = Config::TokenTiles::largest(), kMaxSlots = 16, kColumns = 2;  // of a row block
constexpr uint32 kWarpgroups = 2, kRowBlocks[2] = {3, kHidden / kColumns}, kIntermediate = kRowBlocks[0] * kColumns;
constexpr uint32 kNan = 0x7fc07fc0;

// Words of one rank that its own threads share.
struct LocalWords {
  int64 calls[4];
  SlotCounters counters[kMaxSlots];
  uint32 num_tickets, num_finished;
};

struct PoolRow {
  uint32 x[kHidden], weight, a[kIntermediate];
  int64 dst;
};

struct RankMemory {
  std::unique_ptr<uint8, decltype(&std::free)> arena{static_cast<uint8*>(std::aligned_alloc(1024, Layout::num_bytes)), &std::free};
  LocalWords words;
  int64 reports[9];
  PoolRow pool[kMaxSlots * kSlotRows];
  uint32 y[kMaxTokens][kHidden];

  RankMemory() { reset(); }

  // What Arena.reset does when no call runs.
  void reset() {
    std::memset(arena.get(), 0, Layout::num_bytes);
    words = {};
    std::memset(reports, 0, sizeof(reports));
  }
};

enum class FaultKind { kNone, kNeverStages, kAborts, kRefuses, kLosesRow, kSilentBeforeCombine };

// Waits that a fault can give less time.
enum class WaitKind { kPeers, kExperts, kFold, kPull };

// What goes wrong in one call, by one rank, and which waits end early in it.
struct Fault {
  FaultKind kind = FaultKind::kNone;
  int64 epoch = 0;
  uint32 rank = 0;
  enum Hasty { kNobody, kAllForPeers, kTheRank, kItsPulls } hasty = kNobody;
  uint64 hasty_ns = 0;              // deadline of those
  bool combine_looks_late = false;  // for combine_ready: after that deadline
  bool abort_posts_slowly = false;
  bool loses_first_row = false;     // instead of the last

  bool hits(FaultKind what, uint32 r, int64 e) const { return kind == what && rank == r && epoch == e; }
  bool makes_hasty(uint32 r, int64 e, WaitKind wait) const {
    if (e != epoch || hasty == kNobody) return false;
    if (hasty == kAllForPeers) return wait == WaitKind::kPeers;
    return r == rank && (wait == WaitKind::kPull || (wait != WaitKind::kPeers && hasty == kTheRank));
  }
};

struct World {
  uint32 num_ranks, num_blocks, cluster_blocks;
  uint64 seed;
  uint64 timeout_ns;
  Fault fault;
  std::vector<std::unique_ptr<RankMemory>> ranks;

  World(uint32 num_ranks, uint32 num_blocks, uint32 cluster_blocks, uint64 seed, uint64 timeout_ns)
      : num_ranks(num_ranks), num_blocks(num_blocks), cluster_blocks(cluster_blocks), seed(seed), timeout_ns(timeout_ns) {
    for (uint32 r = 0; r < num_ranks; ++r) ranks.push_back(std::make_unique<RankMemory>());
  }

  uint64 deadline_ns(uint32 rank, int64 epoch, WaitKind wait) const {
    return fault.makes_hasty(rank, epoch, wait) ? fault.hasty_ns : timeout_ns;
  }
  uint32 num_local_experts() const { return kNumExperts / num_ranks; }

  Symm symm(uint32 rank) const {
    Symm symm{};
    symm.base = reinterpret_cast<uint64>(ranks[rank]->arena.get());
    for (uint32 r = 0; r < num_ranks; ++r) symm.offsets[r] = ranks[r]->arena.get() - ranks[rank]->arena.get();
    symm.rank = rank;
    symm.num_ranks = num_ranks;
    return symm;
  }
};

// The run, and the rank that the current thread belongs to.
inline const World* world_under_test = nullptr;
inline thread_local uint32 current_rank = 0;

template <class T>
bool contains(const T& object, const void* address) {
  const auto* begin = reinterpret_cast<const char*>(&object);
  return address >= begin && address < begin + sizeof(object);
}

// Where `address` is as its accesses are concerned.
enum class Place { kOwn, kReport, kArena, kForeign };

inline Place place_of(const void* address) {
  const World& world = *world_under_test;
  for (const auto& memory : world.ranks)
    if (address >= memory->arena.get() && address < memory->arena.get() + Layout::num_bytes) return Place::kArena;
  const RankMemory& own = *world.ranks[current_rank];
  return contains(own.words, address) ? Place::kOwn : contains(own.reports, address) ? Place::kReport : Place::kForeign;
}

inline void check_scope(const void* address, machine::Scope scope) {
  const Place place = place_of(address);
  if (place == Place::kOwn || (place != Place::kForeign && scope == machine::Scope::kSys)) return;
  std::printf("scope: rank %u accesses with gpu scope what it shares, or another rank's own words\n", current_rank);
  std::fflush(stdout);
  std::_Exit(3);
}

}  // namespace protocol
