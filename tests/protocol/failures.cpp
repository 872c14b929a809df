// A call that fails: every thread of every rank comes back, y is marked, reports name the rank at fault, and the arena works again after a
// reset (after a refusal at once).
// Arguments: scenario, seed, blocks, cluster (blocks of one), hasty_ms (deadline of the waits that must end), patience_ms (of all others),
// limit_s (of the run).
#include <algorithm>
#include <set>

#include "program.hpp"

namespace protocol {

constexpr uint32 kRanks = 3, kCulprit = 1, kGoodCalls = 3;
constexpr uint32 kFailedReason = 2;

struct Scenario {
  FaultKind kind;
  Fault::Hasty hasty;
  CallPhase phase;  // in which peers of the culprit fail
  bool combine_looks_late, abort_posts_slowly;
};

const std::map<std::string, Scenario> kScenarios = {
    {"never_stages", {FaultKind::kNeverStages, Fault::kAllForPeers, CallPhase::kDispatch, false, false}},
    {"aborts", {FaultKind::kAborts, Fault::kNobody, CallPhase::kDispatch, false, false}},
    {"refuses", {FaultKind::kRefuses, Fault::kNobody, CallPhase::kDispatch, false, false}},
    {"silent_before_combine", {FaultKind::kSilentBeforeCombine, Fault::kAllForPeers, CallPhase::kCombine, false, false}},
    {"loses_row", {FaultKind::kLosesRow, Fault::kTheRank, CallPhase::kCombine, false, false}},
    {"loses_row_combine_late", {FaultKind::kLosesRow, Fault::kTheRank, CallPhase::kCombine, true, false}},
    // Of the roles that wait, pull is the one without which the others can end the call.
    {"loses_row_aborts_slow", {FaultKind::kLosesRow, Fault::kItsPulls, CallPhase::kCombine, false, true}},
};

// What the host finds in a report.
struct Report {
  int64 epoch;
  CallPhase phase;
  WaitFailure kind;
  uint32 peer;
  AbortWord abort;

  explicit Report(const int64* words)
      : epoch(words[0] >> 16), phase(CallPhase(words[0] >> 12 & 15)), kind(WaitFailure(words[0] >> 8 & 15)), peer(words[0] & 255),
        abort{words[1]} {}
  // The rank at fault, as the host of `rank` names it.
  uint32 culprit() const { return kind == WaitFailure::kTimeout || abort.is_refusal() ? peer : abort.word & 255; }
};

std::atomic<uint32> num_reports[kRanks];

void observe(const void* address, machine::Scope scope) {
  check_scope(address, scope);
  const World& world = *world_under_test;
  const RankMemory& own = *world.ranks[current_rank];
  if (address == own.reports || address == own.reports + 2) ++num_reports[current_rank];
  const auto* byte = static_cast<const uint8*>(address);
  for (uint32 r = 0; world.fault.abort_posts_slowly && r < world.num_ranks; ++r) {
    const uint8* words = reinterpret_cast<const uint8*>(Layout::abort(world.ranks[r]->arena.get(), 0, 0));
    if (r != current_rank && byte >= words && byte < words + Layout::abort_extent_0 * Layout::abort_extent_1 * sizeof(int64))
      std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

// The experts of `rank` that get rows, at least a tile each.
uint32 busy_experts_of(const World& world, uint32 rank, int64 epoch) {
  std::set<int64> experts;
  for (uint32 src = 0; src < world.num_ranks; ++src) {
    const Inputs in{world, epoch, src};
    for (uint32 i = 0; i < in.num_tokens() * kTopk; ++i) {
      const int64 expert = in.expert(i / kTopk, i % kTopk);
      if (expert >= 0 && expert / world.num_local_experts() == rank) experts.insert(expert);
    }
  }
  return static_cast<uint32>(experts.size());
}

// Moves on to a seed with which every rank has tokens in call `epoch` and the culprit receives rows, of which the last one holds up so few
// tasks that some of its blocks have none left; all its blocks have tokens to sum. `waits_in_pull`: slots are used more than once.
void draw_seed(World& world, int64 epoch, bool waits_in_pull) {
  const auto fits = [&] {
    bool has_tokens = true;
    for (uint32 r = 0; r < world.num_ranks; ++r) has_tokens = has_tokens && Inputs{world, epoch, r}.num_tokens() > 0;
    const MoeStreamShape shape = draw_shape(world, kCulprit, epoch);
    const uint32 num_slots = waits_in_pull ? shape.ring.num_slots : 0;
    return has_tokens && busy_experts_of(world, kCulprit, epoch) > num_slots && shape.band_tiles == 1 && shape.lag_tiles == 0 &&
           Inputs{world, epoch, kCulprit}.num_tokens() == kMaxTokens;
  };
  while (!fits()) ++world.seed;
}

void post_abort(const Call& call, int64 epoch, uint32 reason) {
  for (uint32 r = 0; r < kRanks; ++r)
    if (r != call.rank) post_to_peer<&Layout::abort>(call.symm, r, epoch << 16 | reason << 8 | call.rank);
}

// The host of a rank that refuses its arguments (Calls.fail_call): nobody goes on before all have left the call.
void refuse(Call& call) {
  const int64 epoch = call.calls.epoch() + 1;
  call.begin(epoch);
  post_abort(call, epoch, AbortWord::kRefused);
  for (uint32 r = 0; r < kRanks; ++r) post_to_peer<&Layout::combine_ready>(call.symm, r, epoch);
  for (uint32 r = 0; r < kRanks; ++r)
    while (machine::ld_acquire_sys(call.symm.at<&Layout::combine_ready>(call.rank, r, 0)) < epoch) wait_briefly();
}

void expect_marked(const Call& call, const char* when) {
  for (uint32 token = 0; token < call.inputs().num_tokens(); ++token)
    for (uint32 i = 0; i < kHidden; ++i)
      expect(call.memory.y[token][i] == kNan, "rank %u: token %u column %u is not marked %s", call.rank, token, i, when);
}

void expect_report(const Call& call, const Scenario& scenario, const int64* words) {
  const Report report(words);
  const int64 epoch = call.world.fault.epoch;
  expect(num_reports[call.rank] == 1, "rank %u made %u reports", call.rank, num_reports[call.rank].load());
  expect(report.epoch == epoch, "rank %u reports call %lld", call.rank, report.epoch);
  expect(report.culprit() == kCulprit, "rank %u blames rank %u: %llx %llx", call.rank, report.culprit(), words[0], words[1]);
  const CallPhase phase = call.rank == kCulprit ? CallPhase::kExperts : scenario.phase;
  expect(report.phase == phase, "rank %u failed in phase %u", call.rank, static_cast<uint32>(report.phase));
  const bool must_abort = scenario.kind == FaultKind::kAborts || scenario.kind == FaultKind::kRefuses ||
                          (scenario.kind == FaultKind::kLosesRow && call.rank != kCulprit);
  expect(!must_abort || report.kind == WaitFailure::kAborted, "rank %u timed out", call.rank);
}

// Whether the culprit stays away from the whole call or its end; the process behind it is taken for dead.
bool is_dead(const Scenario& scenario, uint32 rank) {
  return rank == kCulprit && scenario.kind != FaultKind::kLosesRow && scenario.kind != FaultKind::kRefuses;
}

void run_bad_call(Call& call, const Scenario& scenario) {
  const int64 epoch = call.world.fault.epoch;
  if (call.rank == kCulprit && scenario.kind == FaultKind::kNeverStages) return;
  if (call.rank == kCulprit && scenario.kind == FaultKind::kAborts) return post_abort(call, epoch, kFailedReason);
  if (call.rank == kCulprit && scenario.kind == FaultKind::kRefuses) return refuse(call);
  const uint64 begin = machine::global_timer_ns();
  run_call(call);
  const uint64 ns = machine::global_timer_ns() - begin;
  if (is_dead(scenario, call.rank)) return;
  expect(call.calls.is_failed(epoch), "rank %u did not notice", call.rank);
  expect_marked(call, "in the call that failed");
  expect(ns < call.world.timeout_ns / 2, "rank %u took %llu ns", call.rank, ns);
  const bool is_refused = scenario.kind == FaultKind::kRefuses;
  expect(call.calls.is_failed(epoch + 1) != is_refused, "rank %u: a failure lasts until the reset, a refusal for one call", call.rank);
  expect_report(call, scenario, call.memory.reports + (is_refused ? 0 : 2));
}

// Without a reset nothing works, and nothing waits.
void run_call_in_vain(Call& call) {
  const uint64 begin = machine::global_timer_ns();
  run_call(call);
  const uint64 ns = machine::global_timer_ns() - begin;
  expect(ns < call.world.timeout_ns / 2, "rank %u waited %llu ns in a call after the failure", call.rank, ns);
  expect_marked(call, "in the call after the failure");
  expect(num_reports[call.rank] == 1, "rank %u reported the failure again", call.rank);
}

void run(World& world, const Scenario& scenario, uint64 hasty_ns) {
  const int64 epoch = kGoodCalls + 1;
  draw_seed(world, epoch, scenario.hasty == Fault::kItsPulls);
  run_good_calls(world, kGoodCalls);
  world.fault = {scenario.kind, epoch, kCulprit, scenario.hasty, hasty_ns, scenario.combine_looks_late, scenario.abort_posts_slowly,
                 scenario.hasty == Fault::kItsPulls};
  on_all_ranks(world, [&](uint32 r) {
    Call call(world, r);
    run_bad_call(call, scenario);
    if (scenario.kind != FaultKind::kRefuses && !is_dead(scenario, r)) run_call_in_vain(call);
    for (uint32 i = 0; scenario.kind == FaultKind::kRefuses && i < kGoodCalls; ++i) {
      run_call(call);
      expect_y(call);
    }
  });
  world.fault = {};
  for (auto& memory : world.ranks) memory->reset();
  run_good_calls(world, kGoodCalls);
}

}  // namespace protocol

void megamoe::machine::observe(const void* address, Scope scope) { protocol::observe(address, scope); }

int main(int argc, char** argv) {
  using namespace protocol;
  const Arguments arguments(argc, argv);
  end_after(static_cast<uint32>(arguments.number("limit_s")));
  World world(kRanks, static_cast<uint32>(arguments.number("blocks")), static_cast<uint32>(arguments.number("cluster")),
              arguments.number("seed"), arguments.number("patience_ms") * 1000000);
  world_under_test = &world;
  run(world, kScenarios.at(arguments.text("scenario")), arguments.number("hasty_ms") * 1000000);
  std::printf("ok\n");
}
