"""Planted bugs of the protocol's headers and of the roles, each with the program that must catch it."""

from dataclasses import dataclass

from programs import HANG, RACE, SCOPE, WRONG

FLOW, TASKS, WAIT, CALLS = "sync/tile_flow.cuh", "schedule/moe_tasks.cuh", "sync/peer_wait.cuh", "comm/call_state.cuh"
CHUNKS = "schedule/entry_chunks.cuh"
ROLES = "block.hpp"  # what roles do with those headers, as the programs repeat it


@dataclass(frozen=True)
class Mutant:
    """`old` occurs once in `file`; with `new` in its place `check` must end with one of `codes`.

    `check` is "calls" (y), "clusters" (the same with blocks in pairs), "races" ("calls" under ThreadSanitizer), "order", "explore", or a
    scenario of failures.cpp.
    """

    name: str
    file: str
    old: str
    new: str
    check: str
    codes: tuple[int, ...] = (WRONG,)


def _relaxed_add(name: str, old: str) -> Mutant:
    return Mutant(name, FLOW, old, old.replace("add_release_gpu", "add_relaxed_gpu").replace("add_acq_rel_gpu", "add_relaxed_gpu"), "races",
                  (RACE,))


MUTANTS = (
    # Order and scope.
    _relaxed_add("pulled_without_release", "machine::add_release_gpu(&of(row.tile).pulled"),
    _relaxed_add("activated_without_release", "machine::add_release_gpu(&of(tile).activated"),
    _relaxed_add("folded_without_release", "machine::add_release_gpu(&of(row.tile).folded"),
    _relaxed_add("finished_without_release", "machine::add_release_gpu(&of(tile).finished"),
    _relaxed_add("finish_without_order", "machine::add_acq_rel_gpu(num_finished, 1)"),
    Mutant("tile_wait_without_acquire", FLOW, "got = machine::ld_acquire_gpu(counter);",
           "got = machine::word(counter, machine::Scope::kGpu).load(std::memory_order_relaxed);", "races", (RACE,)),
    Mutant("finish_without_acquire", FLOW, "machine::add_acq_rel_gpu(num_finished, 1)",
           "machine::word(num_finished, machine::Scope::kGpu).fetch_add(1, std::memory_order_release)", "races", (RACE,)),
    Mutant("post_without_release", WAIT, "machine::st_release_sys(symm.at<Signal>(peer, symm.rank, 0), value);",
           "machine::word(symm.at<Signal>(peer, symm.rank, 0), machine::Scope::kSys).store(value, std::memory_order_relaxed);", "races",
           (RACE,)),
    Mutant("peer_wait_without_acquire", WAIT, "got = machine::ld_acquire_sys(word);",
           "got = machine::word(word, machine::Scope::kSys).load(std::memory_order_relaxed);", "races", (RACE,)),
    Mutant("signal_with_gpu_scope", WAIT, "got = machine::ld_acquire_sys(word);", "got = machine::ld_relaxed_gpu(word);", "calls",
           (SCOPE,)),
    Mutant("abort_with_gpu_scope", WAIT, "machine::ld_acquire_sys(symm.at<&Layout::abort>",
           "machine::ld_relaxed_gpu(symm.at<&Layout::abort>", "calls", (SCOPE,)),
    # Counters and the ring.
    Mutant("pulled_of_the_generation_before", FLOW, "wait(&of(tile).pulled, (ring.generation(tile) + 1)",
           "wait(&of(tile).pulled, ring.generation(tile)", "explore"),
    Mutant("activated_of_the_generation_before", FLOW, "wait(&of(tile).activated, (ring.generation(tile) + 1)",
           "wait(&of(tile).activated, ring.generation(tile)", "explore"),
    Mutant("folded_of_the_generation_before", FLOW, "wait(&of(tile).folded, (ring.generation(tile) + 1)",
           "wait(&of(tile).folded, ring.generation(tile)", "calls"),
    Mutant("activated_by_one_row_block", FLOW, "(ring.generation(tile) + 1) * row_blocks[0]", "ring.generation(tile) + 1", "races",
           (RACE, WRONG)),
    Mutant("missing_rows_not_counted", FLOW, "ring.slot_rows - row.num_rows + count : count", "count : count", "calls"),
    Mutant("missing_rows_off_by_one", FLOW, "ring.slot_rows - row.num_rows + count", "ring.slot_rows - row.num_rows + count + 1", "races",
           (RACE, WRONG)),
    Mutant("run_published_as_a_row", FLOW, "folded, share_of(row, count)", "folded, share_of(row, 1)", "calls"),
    Mutant("slot_not_awaited", FLOW, "if (ring.generation(tile) > 0) wait(", "if (ring.generation(tile) > 99) wait(", "explore"),
    Mutant("slot_awaited_one_generation_late", FLOW, "wait(&of(tile).finished, ring.generation(tile)",
           "wait(&of(tile).finished, (ring.generation(tile) - 1)", "races", (RACE, WRONG)),
    Mutant("slot_always_called_free", FLOW, "return ring.generation(tile) == 0 ||", "return ring.generation(tile) < 99 ||", "calls"),
    Mutant("last_awaited_tile_not_published", FLOW, "return tile + ring.num_slots < num_tiles;",
           "return tile + ring.num_slots + 1 < num_tiles;", "calls", (WRONG, HANG)),
    Mutant("counters_not_cleared", FLOW, "counters[slot] = {0, 0, 0, 0};", "static_cast<void>(counters);", "calls"),
    Mutant("folded_not_cleared", FLOW, "counters[slot] = {0, 0, 0, 0};",
           "counters[slot].pulled = counters[slot].activated = counters[slot].finished = 0;", "races", (RACE, WRONG)),
    Mutant("last_slot_not_cleared", FLOW, "slot < ring.num_slots; slot +=", "slot + 1 < ring.num_slots; slot +=", "calls"),
    Mutant("tickets_not_cleared", FLOW, "*num_tickets = *num_finished = 0;", "*num_finished = 0;", "calls"),
    Mutant("finished_blocks_not_cleared", FLOW, "*num_tickets = *num_finished = 0;", "*num_tickets = 0;", "calls"),
    Mutant("generation_starts_early", TASKS, "return tile / num_slots;", "return (tile + 1) / num_slots;", "explore", (WRONG, 2)),
    # Claims and the end of a call.
    Mutant("ticket_gap", FLOW, "machine::add_relaxed_gpu(num_tickets, 1)", "machine::add_relaxed_gpu(num_tickets, 2)", "calls"),
    Mutant("first_one_tells_the_peers", FLOW, "+ 1 == num_expected", "== 0", "calls", (WRONG, HANG)),
    Mutant("one_before_the_last_tells_the_peers", FLOW, "+ 1 == num_expected", "+ 2 == num_expected", "races", (RACE, WRONG)),
    Mutant("nobody_tells_the_peers", FLOW, "+ 1 == num_expected", "== num_expected", "calls"),
    # The stream of tasks.
    Mutant("lag_with_the_wrong_sign", TASKS, "trail.end() + shape.lag_tiles <= lead.end()", "trail.end() <= lead.end() + shape.lag_tiles",
           "order"),
    Mutant("linear_2_after_all_of_linear_1", TASKS, "if (has_lead && !is_due)", "if (has_lead)", "order"),
    Mutant("bands_across_experts", TASKS, "min_of(shape.band_tiles, end_of_group - first)", "shape.band_tiles", "order"),
    Mutant("experts_without_rows_not_skipped", TASKS, "if (end_of_group == first)", "if (end_of_group < first)", "order", (WRONG, HANG)),
    Mutant("expert_left_early", TASKS, "if (first == end_of_group && !enter_group())", "if (!enter_group())", "order", (WRONG, HANG)),
    Mutant("row_tile_of_wide_bands", TASKS, "count == 1 ? in_band : in_band / count", "in_band", "order"),
    Mutant("last_tile_too_long", TASKS, "entry.count - (number - entry.first_tile) * tokens", "entry.count", "order"),
    Mutant("run_of_two_tiles", TASKS, "min_of(num_rows - row, place.num_rows - place.idx)", "num_rows - row", "order"),
    Mutant("runs_that_overlap", TASKS, "row += (num_blocks - 1) * kRun", "row += num_blocks - 1", "order"),
    Mutant("run_that_ends_early", TASKS, "min_of(kRun - row % kRun, min_of(", "min_of(1u, min_of(", "order"),
    Mutant("all_ranks_begin_with_the_first", CHUNKS, "(rank + block / Config::kNumChunks) % Config::kNumRanks",
           "block / Config::kNumChunks", "order"),
    Mutant("row_of_the_wrong_tile", TASKS, "min_of(tokens, entry.count - tile * tokens)", "tokens", "order"),
    # Signals and failures.
    Mutant("signal_of_the_call_before", WAIT, "return got >= epoch;", "return got + 1 >= epoch;", "races", (RACE, WRONG)),
    Mutant("sender_and_receiver_swapped", WAIT, "symm.at<Signal>(peer, symm.rank, 0), value", "symm.at<Signal>(symm.rank, peer, 0), value",
           "calls"),
    Mutant("aborts_not_looked_at", WAIT, "if (has_aborted(sender)) return true;", "static_cast<void>(sender);", "aborts"),
    Mutant("deadline_ignored", WAIT, "> calls.timeout_ns;", "> ~0ull - 1;", "never_stages", (HANG,)),
    Mutant("abort_to_oneself_only", WAIT, "if (r != symm.rank) post_to_peer", "if (r == symm.rank) post_to_peer", "loses_row"),
    Mutant("refusal_lasts", WAIT, "calls.fail(abort.is_refusal() ? epoch : calls.kUntilReset,", "calls.fail(calls.kUntilReset,", "refuses"),
    Mutant("refusal_of_any_call", WAIT, "word >> 16 == epoch", "word >> 16 != 0", "refuses"),
    Mutant("refusal_not_seen", WAIT, "word >> 16 == epoch", "word >> 16 == epoch + 1", "refuses"),
    Mutant("abort_lasts_one_call", WAIT, "calls.fail(abort.is_refusal() ? epoch : calls.kUntilReset,", "calls.fail(epoch,", "aborts"),
    Mutant("timeout_lasts_one_call", WAIT, "calls.fail(calls.kUntilReset, epoch, phase, WaitFailure::kTimeout",
           "calls.fail(epoch, epoch, phase, WaitFailure::kTimeout", "never_stages"),
    Mutant("mark_before_abort_words", WAIT, "if (!is_late) return false;",
           "if (!is_late) return false;\n    calls.fail(calls.kUntilReset, epoch, phase, WaitFailure::kTimeout, peer, got);",
           "loses_row_aborts_slow"),
    Mutant("every_failure_reports", CALLS, "(words + 1, until) >= until)", "(words + 1, until) > until)",
           "silent_before_combine"),
    Mutant("mark_of_later_calls_only", CALLS, ">= epoch; }", "> epoch; }", "refuses"),
    # What the roles owe to it.
    Mutant("rows_kept_back", ROLES, "flow_.is_free(place.tile) ? kPullBuffers - 1 : 0", "kPullBuffers - 1", "calls"),
    Mutant("published_before_all_warpgroups_are_done", ROLES, "(n / kTaskSlots + 1) * kWarpgroups",
           "(n / kTaskSlots + 1) * kWarpgroups - 1", "races", (RACE, WRONG)),
    Mutant("published_for_one_warpgroup", ROLES, "std::min(kWarpgroups, end - first)", "1u", "calls", (WRONG, HANG)),
    Mutant("published_for_rows_that_are_not_there", ROLES, "std::min(kWarpgroups, end - first)", "kWarpgroups", "races", (RACE, WRONG)),
    Mutant("every_block_of_a_cluster_claims", ROLES, "if (rank_ > 0) return cluster_.tickets.take(n);", "", "clusters", (WRONG, HANG)),
    Mutant("one_row_tile_for_a_cluster", ROLES, "task.row_tile * cluster_.num_blocks + rank_", "task.row_tile * cluster_.num_blocks",
           "clusters", (WRONG, HANG)),
    Mutant("tokens_of_a_cluster_kept", ROLES, "cluster_.blocks[b]->parts_[rank_].put(n, part);",
           "if (b == rank_) parts_[rank_].put(n, part);", "clusters", (HANG,)),
    Mutant("call_ended_before_all_is_published", ROLES, "while (!is_published_) {", "while (false) {", "calls", (WRONG, HANG)),
    Mutant("nothing_published_while_waiting", ROLES, "block.poll_publisher();", "", "calls", (WRONG, HANG)),
    Mutant("combine_without_abort_words", ROLES, "&& !w.has_aborted(r);", ";", "loses_row_combine_late"),
    Mutant("combine_without_its_own_failure", ROLES, "is_good = is_good && !call_.calls.is_failed(w.epoch);", "", "loses_row_combine_late"),
)
