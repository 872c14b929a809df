"""The protocol of mega_moe without a GPU: its headers compiled for the host, blocks and ranks as threads, plain memory between them.

A run is right if every value of y is, if ThreadSanitizer finds no access that the protocol leaves unordered, if every atomic has the scope
that its word needs, and if every thread comes back.
"""

import pytest

import programs
from programs import Run

PATIENT = {"patience_ms": 30_000, "limit_s": 100}
FAILURE = {"hasty_ms": 1000, "patience_ms": 20_000, "limit_s": 60}
SCENARIOS = ("never_stages", "aborts", "refuses", "silent_before_combine", "loses_row", "loses_row_combine_late", "loses_row_aborts_slow")


@pytest.mark.parametrize("ranks, blocks, cluster", [(1, 4, 1), (1, 4, 2), (2, 3, 1), (2, 2, 2), (3, 2, 1), (3, 2, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_calls_have_no_race(program, seed, ranks, blocks, cluster):
    done = programs.run(program("calls", sanitized=True), seed=seed, calls=40, ranks=ranks, blocks=blocks, cluster=cluster, **PATIENT)
    assert done == Run(0, "ok\n")


@pytest.mark.parametrize("ranks, blocks, cluster", [(1, 6, 1), (1, 6, 2), (2, 1, 1), (2, 4, 1), (2, 4, 2), (3, 3, 1)])
def test_many_calls_are_right(program, ranks, blocks, cluster):
    done = programs.run(program("calls"), seed=1000, calls=600, ranks=ranks, blocks=blocks, cluster=cluster, **PATIENT)
    assert done == Run(0, "ok\n")


@pytest.mark.parametrize("seed, cluster", [(0, 1), (1, 2)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_failures_end_every_wait_and_name_the_rank_at_fault(program, scenario, seed, cluster):
    done = programs.run(program("failures"), scenario=scenario, seed=seed, blocks=4, cluster=cluster, **FAILURE)
    assert done == Run(0, "ok\n")


@pytest.mark.parametrize("scenario", ["never_stages", "aborts", "silent_before_combine"])
def test_failures_before_any_garbage_have_no_race(program, scenario):
    """Roles that run to the end over rows that never came do race, and so does a refused call with the next one: nobody uses what they
    read."""
    done = programs.run(program("failures", sanitized=True), scenario=scenario, seed=5, blocks=2, cluster=1, **FAILURE)
    assert done == Run(0, "ok\n")


def test_every_task_comes_once_and_after_those_it_needs(program):
    assert programs.run(program("order")) == Run(0, "ok: 45000 shapes\n")


def test_no_interleaving_is_stuck_or_reads_a_row_that_is_not_ready(program):
    done = programs.run(program("explore"), missing_slots=0, holds_rows=0)
    assert done.code == 0
    assert int(done.output.removeprefix("ok: ").removesuffix(" states\n")) > 400_000


@pytest.mark.parametrize("missing_slots, holds_rows", [(1, 0), (0, 1)])
def test_a_smaller_ring_and_rows_kept_back_can_get_stuck(program, missing_slots, holds_rows):
    """The bound on the ring is tight, a pull must land its rows before it waits for a slot, and the search can tell."""
    done = programs.run(program("explore"), missing_slots=missing_slots, holds_rows=holds_rows)
    assert done.code == 2 and done.output.startswith("stuck: ")
