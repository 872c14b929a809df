"""How the device waits of a MoE call end: silent peers, abort words, and what the next call does. Rank 0 of two is the one that waits."""

from dataclasses import replace

import pytest
import torch
from moe_ranks import DIMS, VirtualRanks, make_inputs, run_and_check

from megamoe.comm.abort import Abort, AbortReason

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90 or later")

PAIR = replace(DIMS, num_ranks=2)


def call_alone(ranks: VirtualRanks, staged: tuple[int, ...] = (0,)) -> torch.Tensor:
    """A call of rank 0 for which only the ranks of `staged` publish their inputs and only rank 0 goes on; returns y."""
    inputs = [make_inputs(PAIR, 17, rank) for rank in range(2)]
    for rank in staged:
        ranks.stage(rank, inputs[rank])
    passes = ranks.run_experts(0)
    y = torch.zeros(17, PAIR.hidden, dtype=torch.bfloat16, device="cuda")
    ranks.ranks[0].combine(y)
    torch.cuda.synchronize()
    if len(staged) == 1:
        assert all(not any(offsets) and not rows for offsets, rows in passes), "no rows to compute"
        assert not ranks.loads[0].any()
    return y.cpu()


@pytest.mark.parametrize("staged, phase, signal", [((0,), "dispatch", "inputs_ready"), ((0, 1), "combine", "combine_ready")])
def test_a_silent_rank(staged, phase, signal):
    ranks = VirtualRanks(PAIR, timeout_s=0.2)
    assert call_alone(ranks, staged).isnan().all()
    failure = ranks.calls[0].failure()
    error = failure.error(0, 0.2)
    assert str(error) == (f"rank 0: no {signal} from rank 1 within 0.2 s in {phase} (expected epoch 1, got 0); rank 1 is silent: see its "
                          "log, then restart it or call reset() on every rank")
    assert (error.peer, error.phase) == (1, phase)
    assert int(ranks.view(1, "abort")[0, 0]) == Abort(1, AbortReason.PEER_TIMEOUT, 1).to_word()
    assert not ranks.view(0, "abort").any(), "nobody aborts itself"
    assert int(ranks.view(1, "combine_ready")[0, 0]) == 1, "a failed call still tells its peers"

    ranks.loads.zero_()
    assert call_alone(ranks).isnan().all(), "every later call fails too"
    assert int(ranks.view(1, "inputs_ready")[0, 0]) == 1, "and publishes nothing"
    assert ranks.calls[0].failure() == failure

    ranks.zero_signals()
    ranks.loads.zero_()
    for calls in ranks.calls:
        calls.start_over()
    run_and_check(ranks, [make_inputs(PAIR, 30, rank) for rank in range(2)])


def test_a_rank_refuses_its_arguments():
    ranks = VirtualRanks(PAIR)
    run_and_check(ranks, [make_inputs(PAIR, 30, rank) for rank in range(2)])
    ranks.loads.zero_()
    ranks.calls[1].advance()
    ranks.view(0, "abort")[1, 0] = Abort(2, AbortReason.REFUSED, 1).to_word()
    assert call_alone(ranks).isnan().all()
    failure = ranks.calls[0].failure()
    assert failure.is_refusal and str(failure.error(0, 20.0)) == (
        "rank 0: rank 1 aborted (it refused its arguments) while this rank was in dispatch; see the error of rank 1: this call is lost, "
        "the next one works")
    assert int(ranks.view(1, "combine_ready")[0, 0]) == 2 and not ranks.view(1, "abort").any()
    run_and_check(ranks, [make_inputs(PAIR, 25, 5 + rank) for rank in range(2)])
    assert [calls.epoch() for calls in ranks.calls] == [3, 3]


def test_a_refusal_of_another_call_ends_nothing():
    ranks = VirtualRanks(PAIR, timeout_s=0.2)
    ranks.view(0, "abort")[1, 0] = Abort(2, AbortReason.REFUSED, 1).to_word()
    run_and_check(ranks, [make_inputs(PAIR, 30, rank) for rank in range(2)])
    ranks.zero_signals()
    for calls in ranks.calls:
        calls.start_over()
    ranks.loads.zero_()
    ranks.view(0, "abort")[1, 0] = Abort(7, AbortReason.REFUSED, 1).to_word()
    assert call_alone(ranks).isnan().all()
    assert ranks.calls[0].failure().abort is None, "it waited until the deadline"


@pytest.mark.parametrize("reason, culprit, peer, text", [
    (AbortReason.FAILED, 1, 1, "rank 0: rank 1 aborted (it failed in mid-call) while this rank was in dispatch; see the error of rank 1, "
                               "then call reset() on every rank"),
    (AbortReason.PEER_TIMEOUT, 0, 1, "rank 0: rank 1 aborted (rank 0 was silent) while this rank was in dispatch; see the log of rank 0, "
                                     "then restart it or call reset() on every rank")])
def test_a_rank_failed(reason, culprit, peer, text):
    ranks = VirtualRanks(PAIR)
    ranks.view(0, "abort")[1, 0] = Abort(9, reason, culprit).to_word()
    assert call_alone(ranks).isnan().all()
    error = ranks.calls[0].failure().error(0, 20.0)
    assert (str(error), error.peer) == (text, peer)
    assert not ranks.view(1, "abort").any(), "only a time-out is told on"
    ranks.loads.zero_()
    assert call_alone(ranks).isnan().all(), "until start_over"


def test_a_rank_that_comes_late_does_not_take_what_is_missing_for_a_result():
    """Its peer gave up on it: every signal of the call is there, the partials are not."""
    ranks = VirtualRanks(PAIR)
    ranks.view(0, "abort")[1, 0] = Abort(1, AbortReason.PEER_TIMEOUT, 0).to_word()
    ranks.view(0, "combine_ready")[1, 0] = 1
    assert call_alone(ranks, staged=(0, 1)).isnan().all()
    error = ranks.calls[0].failure().error(0, 20.0)
    assert (str(error), error.peer, error.phase) == (
        "rank 0: rank 1 aborted (rank 0 was silent) while this rank was in combine; see the log of rank 0, then restart it or call "
        "reset() on every rank", 1, "combine")
