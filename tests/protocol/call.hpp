// One call of one rank before mega_moe: staging its inputs, and the rows that it receives from all ranks. Sequential, as launches on a
// stream are; other ranks are met only through the protocol's words.
#pragma once

#include "delays.hpp"
#include "tables.hpp"

namespace protocol {

// The rows of a call and how the rank works on them.
struct Rows {
  std::vector<uint32> entries;  // src * T * K + token * K + slot, by expert, source rank, token, slot
  GroupTable<Config> table;
  MoeStreamShape shape;
};

struct Call {
  const World& world;
  RankMemory& memory;
  uint32 rank;
  Symm symm;
  CallStateParams calls, expert_calls, fold_calls, pull_calls;  // the same words with the deadlines of each WaitKind
  Rows rows;

  Call(const World& world, uint32 rank)
      : world(world), memory(*world.ranks[rank]), rank(rank), symm(world.symm(rank)),
        calls{memory.words.calls, memory.reports, world.timeout_ns}, expert_calls(calls), fold_calls(calls), pull_calls(calls) {}

  CallWatch<Layout> watch(CallPhase phase, const CallStateParams& with) const { return {symm, with, with.epoch(), phase}; }
  Inputs inputs() const { return {world, calls.epoch(), rank}; }

  void begin(int64 epoch) {
    calls.set_epoch(epoch);
    calls.timeout_ns = world.deadline_ns(rank, epoch, WaitKind::kPeers);
    expert_calls.timeout_ns = world.deadline_ns(rank, epoch, WaitKind::kExperts);
    fold_calls.timeout_ns = world.deadline_ns(rank, epoch, WaitKind::kFold);
    pull_calls.timeout_ns = world.deadline_ns(rank, epoch, WaitKind::kPull);
  }

  // moe_stage. Poisons what nobody may read before it is written again: the rank's own pool, partials and y.
  void stage() {
    const int64 epoch = calls.epoch() + 1;
    begin(epoch);
    std::memset(static_cast<void*>(memory.pool), 0xbd, sizeof(memory.pool));
    for (PoolRow& row : memory.pool) row.dst = 0;
    std::memset(memory.y, 0xbd, sizeof(memory.y));
    if (calls.is_failed(epoch)) return;
    std::memset(partial(rank, 0, 0), 0xbd, kMaxTokens * kTopk * kHidden * sizeof(uint32));
    const Inputs in = inputs();
    const uint32 num_tokens = in.num_tokens();
    *symm.at<&Layout::num_tokens>(rank, 0) = num_tokens;
    for (uint32 token = 0; token < num_tokens; ++token) {
      for (uint32 i = 0; i < kHidden; ++i) x_row(rank, token)[i] = in.x(token, i);
      for (uint32 slot = 0; slot < kTopk; ++slot) {
        *symm.at<&Layout::topk_idx>(rank, token, slot) = in.expert(token, slot);
        *weight_of(rank, token, slot) = in.weight(token, slot);
      }
    }
    for (uint32 r = 0; r < world.num_ranks; ++r) post_to_peer<&Layout::inputs_ready>(symm, r, epoch);
  }

  // moe_route and moe_assign; a failed call has no rows.
  void route(const MoeStreamShape& shape) {
    const CallWatch<Layout> w = watch(CallPhase::kDispatch, calls);
    std::vector<std::vector<uint32>> of_expert(world.num_local_experts());
    for (uint32 src = 0; src < world.num_ranks; ++src)
      if (!calls.is_failed(w.epoch) && w.wait_for_peer<&Layout::inputs_ready>(src)) collect(src, of_expert);
    if (calls.is_failed(w.epoch))
      for (auto& entries : of_expert) entries.clear();
    std::vector<int32> offsets{0};
    rows.entries.clear();
    for (const auto& entries : of_expert) {
      rows.entries.insert(rows.entries.end(), entries.begin(), entries.end());
      offsets.push_back(static_cast<int32>(rows.entries.size()));
    }
    build_table(rows.table, offsets);
    rows.shape = shape;
  }

  uint32* x_row(uint32 peer, uint32 token) const { return reinterpret_cast<uint32*>(symm.at<&Layout::x>(peer, token, 0)); }
  uint32* weight_of(uint32 peer, uint32 token, uint32 slot) const {
    return reinterpret_cast<uint32*>(symm.at<&Layout::topk_weights>(peer, token, slot));
  }
  uint32* partial(uint32 peer, uint32 token, uint32 slot) const {
    return reinterpret_cast<uint32*>(symm.at<&Layout::partials>(peer, token, slot, 0));
  }

 private:
  void collect(uint32 src, std::vector<std::vector<uint32>>& of_expert) const {
    const int64 num_tokens = *symm.at<&Layout::num_tokens>(src, 0), first_expert = int64(rank) * world.num_local_experts();
    for (uint32 token = 0; token < num_tokens; ++token)
      for (uint32 slot = 0; slot < kTopk; ++slot) {
        const uint64 local = *symm.at<&Layout::topk_idx>(src, token, slot) - first_expert;
        if (local < of_expert.size()) of_expert[local].push_back((src * kMaxTokens + token) * kTopk + slot);
      }
  }
};

// Any legal shape for a call of `rank`: rings at the bound or a little above.
inline MoeStreamShape draw_shape(const World& world, uint32 rank, int64 epoch) {
  const uint32 draw = mix(world.seed, epoch, rank, 8), band = 1 + draw % 3, lag = draw / 3 % 4, extra = draw / 12 % 3;
  const uint32 of_task = world.cluster_blocks * kWarpgroups;
  return {{ceil_div(kRowBlocks[0], of_task), ceil_div(kRowBlocks[1], of_task)}, {1, 1}, band, lag,
          {lag + 2 * band - 1 + extra, kSlotRows}};
}

}  // namespace protocol
