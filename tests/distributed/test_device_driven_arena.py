"""How the host enters, fails and leaves calls that kernels drive. The kernels' part is played by writes to their words, on CPU ranks."""

import re

import pytest
import torch

from megamoe import MoEConfig, PeerTimeoutError
from megamoe.comm import Arena
from megamoe.comm.abort import Abort, AbortReason
from megamoe.comm.signals import wait_until

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=4, num_topk=2, max_tokens_per_rank=8)
REFUSED, FATAL = 0, 2  # where device_calls.py keeps the reports
ABORTED = 2  # enum WaitFailure


@pytest.fixture
def arena():
    with Arena.create(CFG, timeout_s=1.0) as arena:
        arena.drive_by_device()
        yield arena


def report(arena: Arena, slot: int, abort: Abort) -> None:
    """What a kernel leaves that saw `abort` of rank 3 in dispatch."""
    words = arena.device_calls._words
    words[slot + 1] = abort.to_word()
    words[slot] = abort.epoch << 16 | ABORTED << 8 | 3


def test_a_refused_call_is_told_once_and_the_next_one_works(arena):
    report(arena, REFUSED, Abort(7, AbortReason.REFUSED, 3))
    arena.begin_call()
    error = arena.take_failure()
    assert isinstance(error, PeerTimeoutError) and (error.peer, error.phase) == (3, "dispatch")
    assert str(error) == ("rank 0: rank 3 aborted (it refused its arguments) while this rank was in dispatch; see the error of rank 3: "
                          "this call is lost, the next one works")
    assert arena.take_failure() is None
    arena.begin_call()


def test_any_other_failure_stops_the_arena_until_reset(arena):
    report(arena, FATAL, Abort(7, AbortReason.PEER_TIMEOUT, 2))
    text = ("rank 0: rank 3 aborted (rank 2 was silent) while this rank was in dispatch; see the log of rank 2, then restart it or call "
            "reset() on every rank")
    with pytest.raises(PeerTimeoutError, match=f"^{re.escape(text)}$") as caught:
        arena.begin_call()
    assert caught.value.peer == 2
    message = f"Arena: it cannot be used after a failed call; call reset() on every rank (the failure: {text})"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        arena.begin_call()
    arena.reset()
    assert arena.take_failure() is None and arena.device_calls.epoch() == 0
    arena.begin_call()


def test_a_local_failure_counts_as_a_call(arena):
    arena.device_calls.state[0] = 41  # most of them replays of a graph
    arena.begin_call()
    arena.fail_call(ValueError("bad argument"))
    assert arena.epoch == arena.device_calls.epoch() == 42
    assert arena.view("combine_ready")[0, 0] == 42
    arena.begin_call()


def test_a_failure_after_publishing_needs_a_reset(arena):
    arena.begin_call()
    arena.device_calls.state[0] = 42  # as moe_stage raised it
    arena.note_published()
    arena.fail_call(ValueError("out of memory"))
    assert arena.epoch == arena.device_calls.epoch() == 42, "the call that runs, not the next one"
    with pytest.raises(RuntimeError, match="the failure: out of memory"):
        arena.begin_call()


def run_refusal(rank: int, num_ranks: int):
    with Arena.create(CFG, timeout_s=5.0) as arena:
        arena.drive_by_device()
        arena.device_calls.state[0] = 9
        arena.begin_call()
        if rank == 0:
            arena.fail_call(ValueError("bad argument"))
            word = 0
        else:
            poll = arena._words.poll
            assert wait_until(lambda: poll("abort", 0) != 0, 5.0), "the peer is told at once"
            word = poll("abort", 0)
            for peer in range(num_ranks):  # as moe_combine does for a call that failed
                arena.post(peer, "combine_ready", 10)
        usable = arena._failure is None
        return word, usable, arena.device_calls.epoch()


def test_a_refusal_reaches_the_peers_and_all_leave_the_call(rank_pool):
    (_, usable, epoch), (word, _, _) = rank_pool(2).run(run_refusal)
    assert Abort.from_word(word) == Abort(10, AbortReason.REFUSED, 0)
    assert usable and epoch == 10


def test_an_unused_device_driver_changes_nothing_for_the_host():
    with Arena.create(CFG) as arena:
        arena.claim("host")
        with pytest.raises(ValueError, match="must be the host, as its first layer has it, got the device"):
            arena.drive_by_device()
        assert arena.device_calls is None
        assert torch.equal(arena.own_bytes[:8], torch.zeros(8, dtype=torch.uint8))
