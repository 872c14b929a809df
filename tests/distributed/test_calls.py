"""Calls between real processes: signals order memory, every failure names the rank at fault in time, and a reset makes things good."""

import os
import random
import signal
import time

import pytest

from megamoe.comm import AbortReason, Arena
from megamoe.config import MoEConfig
from megamoe.errors import PeerTimeoutError

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=12, num_topk=2, max_tokens_per_rank=16)
ROUNDS = 200
MODULUS = 2**61 - 1

every_backend = pytest.mark.parametrize("backend", ("shm", "unmapped"))


def payload(rank: int, epoch: int) -> int:
    return (epoch * 7919 + rank * 104729 + 1) % 65537


def fold(value: int, element: int) -> int:
    """Does not commute: a round or a rank out of order changes the result for good."""
    return (value * 1000003 + element) % MODULUS


def run_fold(rank: int, num_ranks: int):
    """Every round each rank publishes a row to all peers, which fold the rows in rank order; random delays on both sides."""
    delays = random.Random(1000 + rank)
    with Arena.create(CFG, timeout_s=10.0) as arena:
        value, torn = 0, 0
        for _ in range(ROUNDS):
            arena.begin_call()
            time.sleep(delays.choice((0, 0, 1e-4, 5e-4)))
            for peer in range(num_ranks):
                arena.peer_view(peer, "topk_idx")[rank:rank + num_ranks * 4:num_ranks] = payload(rank, arena.epoch)
                arena.post(peer, "inputs_ready", arena.epoch)
            for peer in range(num_ranks):
                arena.wait("inputs_ready", peer, arena.epoch, "fold")
                rows = arena.view("topk_idx")[peer:peer + num_ranks * 4:num_ranks]
                torn += int((rows != rows[0, 0]).any())
                value = fold(value, int(rows[0, 0]))
            time.sleep(delays.choice((0, 0, 2e-4)))
            for peer in range(num_ranks):
                arena.post(peer, "combine_ready", arena.epoch)
            for peer in range(num_ranks):
                arena.wait("combine_ready", peer, arena.epoch, "fold")
        return value, torn


def test_signals_order_memory(rank_pool):
    expected = 0
    for epoch in range(1, ROUNDS + 1):
        for rank in range(3):
            expected = fold(expected, payload(rank, epoch))
    assert rank_pool(3).run(run_fold) == [(expected, 0)] * 3


def run_silent(rank: int, num_ranks: int, backend: str):
    """Rank 1 posts epoch 2 and then nothing; rank 0 waits for epoch 3."""
    arena = Arena.create(CFG, backend=backend, timeout_s=0.3)
    if rank == 1:
        arena.post(0, "inputs_ready", 2)
        time.sleep(1.0)
        return None
    begin = time.monotonic()
    try:
        arena.wait("inputs_ready", 1, 3, "dispatch")
    except PeerTimeoutError as error:
        return str(error), error.peer, error.phase, time.monotonic() - begin
    return None


@every_backend
def test_a_silent_peer_is_named(rank_pool, backend):
    message, peer, phase, waited = rank_pool(2).run(run_silent, backend)[0]
    assert message == ("rank 0: no inputs_ready from rank 1 within 0.3 s in dispatch (expected epoch 3, got 2); rank 1 is silent: see its "
                       "log, then restart it or call reset() on every rank")
    assert (peer, phase) == (1, "dispatch") and 0.3 <= waited < 2.0


def one_call(arena: Arena, error_before: Exception | None = None, error_after: Exception | None = None) -> tuple[str, int] | None:
    """A call as a layer makes it, failing before or after its inputs are published. Text and peer of its PeerTimeoutError, if any."""
    arena.begin_call()
    ranks = range(arena.num_ranks)
    try:
        if error_before is not None:
            raise error_before
        for peer in ranks:
            arena.post(peer, "inputs_ready", arena.epoch)
        for peer in ranks:
            arena.wait("inputs_ready", peer, arena.epoch, "dispatch")
        if error_after is not None:
            for peer in ranks:
                if peer != arena.rank:
                    arena.wait("combine_ready", peer, arena.epoch, "combine")  # the peers have left dispatch, so they see the error in combine
            raise error_after
        for peer in ranks:
            arena.post(peer, "combine_ready", arena.epoch)
        for peer in ranks:
            arena.wait("combine_ready", peer, arena.epoch, "combine")
    except PeerTimeoutError as error:
        arena.fail_call(error)
        return str(error), error.peer
    except Exception as error:
        arena.fail_call(error)
    return None


def run_killed(rank: int, num_ranks: int, backend: str):
    arena = Arena.create(CFG, backend=backend, timeout_s=0.5)
    one_call(arena)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    return one_call(arena), time.monotonic() - begin


@every_backend
def test_a_killed_rank_is_named_by_all_survivors(rank_pool, backend):
    survivors = rank_pool(3).run_until_death(run_killed, backend, expected_dead=(1,))
    assert set(survivors) == {0, 2}
    for rank, ((message, peer), waited) in survivors.items():
        assert peer == 1 and message.startswith(f"rank {rank}: ") and "rank 1" in message and "silent" in message
        assert waited < 5.0


def run_refusals(rank: int, num_ranks: int, backend: str):
    """Twenty calls; in every third one some rank refuses its arguments, one rank is always late."""
    with Arena.create(CFG, backend=backend, timeout_s=10.0) as arena:
        outcomes = []
        for call in range(20):
            if call % num_ranks == rank:
                time.sleep(0.002)
            refuses = call % 3 == 0 and rank == call // 3 % num_ranks
            outcomes.append(one_call(arena, error_before=ValueError("bad dtype") if refuses else None))
        return outcomes


@every_backend
def test_a_refused_call_costs_that_call_only(rank_pool, backend):
    for rank, outcomes in enumerate(rank_pool(3).run(run_refusals, backend)):
        for call, outcome in enumerate(outcomes):
            refuser = call // 3 % 3 if call % 3 == 0 else None
            if refuser in (None, rank):
                assert outcome is None
            else:
                assert outcome == (f"rank {rank}: rank {refuser} aborted (it refused its arguments) while this rank was in dispatch; see "
                                   f"the error of rank {refuser}: this call is lost, the next one works", refuser)


def run_failure_and_reset(rank: int, num_ranks: int, backend: str):
    with Arena.create(CFG, backend=backend, timeout_s=10.0) as arena:
        one_call(arena)
        begin = time.monotonic()
        failed = one_call(arena, error_after=RuntimeError("out of memory") if rank == 1 else None)
        waited = time.monotonic() - begin
        with pytest.raises(RuntimeError) as unusable:
            arena.begin_call()
        arena.reset()
        words_are_zero = not any(arena._words.poll(name, src) for name in ("inputs_ready", "combine_ready", "abort")
                                 for src in range(num_ranks))
        arena.barrier()
        epoch = arena.epoch
        works = [one_call(arena) for _ in range(5)] == [None] * 5
        arena.barrier()
        return failed, waited, str(unusable.value), words_are_zero, epoch, works


@every_backend
def test_a_failed_call_needs_a_reset(rank_pool, backend):
    for rank, (failed, waited, unusable, words_are_zero, epoch, works) in enumerate(rank_pool(3).run(run_failure_and_reset, backend)):
        text = (f"rank {rank}: rank 1 aborted (it failed in mid-call) while this rank was in combine; see the error of rank 1, then call "
                "reset() on every rank")
        assert failed == (None if rank == 1 else (text, 1))
        assert waited < 2.0, "an abort does not wait for the deadline"
        cause = "out of memory" if rank == 1 else text
        assert unusable == f"Arena: it cannot be used after a failed call; call reset() on every rank (the failure: {cause})"
        assert words_are_zero and epoch == 0 and works


def run_late_reset(rank: int, num_ranks: int, backend: str):
    """Rank 1 joins the reset so late that rank 0's first attempt times out; its second one completes the same reset."""
    arena = Arena.create(CFG, backend=backend, timeout_s=0.2)
    one_call(arena)
    attempts = []
    if rank == 1:
        time.sleep(0.8)
    for _ in range(10):
        try:
            arena.reset()
            break
        except PeerTimeoutError as error:
            attempts.append((str(error), error.peer))
    arena.timeout_s = 10.0
    works = [one_call(arena) for _ in range(3)] == [None] * 3
    return attempts, works


@every_backend
def test_a_reset_can_be_repeated(rank_pool, backend):
    (first, works0), (_, works1) = rank_pool(2).run(run_late_reset, backend)
    assert first[0] == ("rank 0: no reset from rank 1 within 0.4 s in reset (expected epoch 1, got 0); rank 1 is silent: see its log, then "
                        "restart it or call reset() on every rank", 1)
    assert works0 and works1


def run_reset_that_stalls_halfway(rank: int, num_ranks: int, backend: str):
    """Rank 1 joins a reset, zeroes its words and stalls; rank 0 has zeroed its own by then and must not do so again."""
    arena = Arena.create(CFG, backend=backend, timeout_s=0.2)
    one_call(arena)
    meet, num_meetings = arena._meet_for_reset, []

    def stall_at_the_second() -> None:
        num_meetings.append(1)
        if rank == 1 and len(num_meetings) == 2:
            time.sleep(0.6)
        meet()

    arena._meet_for_reset = stall_at_the_second
    num_attempts = 0
    while True:
        num_attempts += 1
        try:
            arena.reset()
            break
        except PeerTimeoutError as error:
            assert error.peer == 1 - rank
    arena.timeout_s = 10.0
    return num_attempts, [one_call(arena) for _ in range(3)], arena.epoch


@every_backend
def test_a_reset_resumes_where_it_stopped(rank_pool, backend):
    (attempts, *works), (_, *peer_works) = rank_pool(2).run(run_reset_that_stalls_halfway, backend)
    assert attempts > 1 and works == peer_works == [[None] * 3, 3]


def run_abort(rank: int, num_ranks: int, backend: str):
    with Arena.create(CFG, backend=backend, timeout_s=10.0) as arena:
        arena.barrier()
        if rank == 2:
            for peer in (0, 1):
                arena.wait("combine_ready", peer, 1, "test")  # both have left the barrier, in which they would see the abort too
            arena.post_abort(AbortReason.PEER_TIMEOUT, culprit=1)
            return None
        arena.post(2, "combine_ready", 1)
        begin = time.monotonic()
        with pytest.raises(PeerTimeoutError) as caught:
            arena.wait("inputs_ready", 2, 1, "dispatch")
        return str(caught.value), caught.value.peer, time.monotonic() - begin


@every_backend
def test_an_abort_names_the_rank_at_fault(rank_pool, backend):
    (message, peer, waited), (_, accused_blames, _), _ = rank_pool(3).run(run_abort, backend)
    assert message == ("rank 0: rank 2 aborted (rank 1 was silent) while this rank was in dispatch; see the log of rank 1, then restart it "
                       "or call reset() on every rank")
    assert peer == 1 and accused_blames == 2 and waited < 2.0
