"""DeviceCalls: reports as kernels write them, decoded into the messages that a waiting host would have given."""

import re

import pytest
import torch

from megamoe.comm.abort import Abort, AbortReason
from megamoe.comm.calls import Calls
from megamoe.comm.device_calls import CallStateParams, DeviceCalls
from megamoe.errors import PeerTimeoutError

DISPATCH, COMBINE, EXPERTS = 0, 1, 2
TIMEOUT, ABORTED = 1, 2


@pytest.fixture
def calls() -> DeviceCalls:
    return DeviceCalls(torch.device("cpu"), rank=0, num_ranks=3, timeout_s=0.05)


def report(calls: DeviceCalls, epoch: int, phase: int, kind: int, peer: int, got: int, refused: bool = False) -> None:
    """What CallStateParams::fail of call_state.cuh writes."""
    at = 0 if refused else 2
    calls._reports[at:at + 2] = torch.tensor([epoch << 16 | phase << 12 | kind << 8 | peer, got])


class SilentWords:
    """Signals of peers of which none ever posts; `abort_words` are there."""

    def __init__(self, **abort_words: int):
        self.abort_words = abort_words

    def post(self, peer, signal, value):
        pass

    def poll(self, signal, src):
        return self.abort_words.get(f"rank{src}", 0) if signal == "abort" else 4


def host_error(words: SilentWords, phase: str, signal: str) -> PeerTimeoutError:
    """What Calls raises when rank 0 waits for rank 2 in call 5."""
    host = Calls(words, 0, 3, 0.05)
    host.epoch = 5
    with pytest.raises(PeerTimeoutError) as raised:
        host.wait(signal, 2, 5, phase)
    return raised.value


def test_nothing_reported(calls):
    assert calls.failure() is None and calls.routing_error() is None and calls.epoch() == 0


def test_params_point_at_the_state(calls):
    params = calls.params()
    assert isinstance(params, CallStateParams)
    assert (params.words, params.timeout_ns) == (calls.state.data_ptr(), 50_000_000)
    assert params.reports == calls._reports.data_ptr()


@pytest.mark.parametrize("phase, name, signal", [(DISPATCH, "dispatch", "inputs_ready"), (COMBINE, "combine", "combine_ready")])
def test_timeout_says_what_the_host_says(calls, phase, name, signal):
    report(calls, 5, phase, TIMEOUT, 2, 4)
    expected = host_error(SilentWords(), name, signal)
    got = calls.failure()
    error = got.error(0, calls.timeout_s)
    assert str(error) == str(expected) == (f"rank 0: no {signal} from rank 2 within 0.1 s in {name} (expected epoch 5, got 4); rank 2 is "
                                           "silent: see its log, then restart it or call reset() on every rank")
    assert (error.peer, error.phase) == (expected.peer, expected.phase) == (2, name)
    assert not got.is_refusal and calls.failure() == got, "it stays until start_over"


@pytest.mark.parametrize("reason, culprit", [(AbortReason.REFUSED, 1), (AbortReason.FAILED, 1), (AbortReason.PEER_TIMEOUT, 2),
                                             (AbortReason.PEER_TIMEOUT, 0)])
def test_abort_says_what_the_host_says(calls, reason, culprit):
    word = Abort(5, reason, culprit).to_word()
    report(calls, 5, COMBINE, ABORTED, 1, word, refused=reason == AbortReason.REFUSED)
    expected = host_error(SilentWords(rank1=word), "combine", "combine_ready")
    error = calls.failure().error(0, calls.timeout_s)
    assert (str(error), error.peer, error.phase) == (str(expected), expected.peer, expected.phase)


@pytest.mark.parametrize("phase, name", [(EXPERTS, "experts"), (COMBINE, "combine")])
def test_timeout_inside_the_own_kernel(calls, phase, name):
    """In combine blocks without a task wait for the others of their rank too."""
    report(calls, 5, phase, TIMEOUT, 0, 17)
    failure = calls.failure()
    error = failure.error(0, calls.timeout_s)
    assert str(error) == (f"rank 0: its own kernels made no progress within 0.1 s in {name} (a counter stood at 17); call reset() on every "
                          "rank, and report it if it happens again")
    assert (error.peer, error.phase, failure.is_refusal) == (0, name, False)


@pytest.mark.parametrize("phase, name", [(EXPERTS, "experts"), (COMBINE, "combine")])
def test_abort_of_a_peer_that_blames_itself(calls, phase, name):
    report(calls, 5, phase, ABORTED, 2, Abort(5, AbortReason.PEER_TIMEOUT, 2).to_word())
    error = calls.failure().error(0, calls.timeout_s)
    assert str(error) == (f"rank 0: rank 2 aborted (its own kernel made no progress) while this rank was in {name}; see the error of rank "
                          "2, then call reset() on every rank")
    assert (error.peer, error.phase) == (2, name)


def test_start_over_zeroes_what_kernels_count_in(calls):
    counters = torch.ones(6, dtype=torch.int32)
    calls.clear_at_start_over(counters)
    calls.start_over()
    assert counters.tolist() == [0] * 6


def test_a_refusal_is_told_once_and_the_next_one_too(calls):
    for epoch in (3, 4):
        report(calls, epoch, DISPATCH, ABORTED, 1, Abort(epoch, AbortReason.REFUSED, 1).to_word(), refused=True)
        failure = calls.failure()
        assert (failure.is_refusal, failure.epoch, failure.culprit(0)) == (True, epoch, 1)
        assert calls.failure() is None


def test_a_failure_until_reset_comes_before_a_refusal(calls):
    report(calls, 3, DISPATCH, ABORTED, 1, Abort(3, AbortReason.REFUSED, 1).to_word(), refused=True)
    report(calls, 4, COMBINE, TIMEOUT, 2, 3)
    assert calls.failure().phase == "combine"
    calls.start_over()
    assert calls.failure() is None


def test_routing_error_is_told_once(calls):
    calls._reports[4:] = torch.tensor([7, 3 << 32 | 1, -(2**40), 9, 7])
    assert calls.routing_error() == (3, 1, -(2**40), 9)
    assert calls.routing_error() is None
    calls._reports[4:] = torch.tensor([8, 0, 384, 1, 7])
    assert calls.routing_error() is None, "the device is still writing it"
    calls._reports[8] = 8
    assert calls.routing_error() == (0, 0, 384, 1)


def test_epoch(calls):
    calls.advance()
    calls.advance()
    calls.state[1] = 2
    assert calls.epoch() == 2
    calls.start_over()
    assert calls.state.tolist() == [0, 0, -1, 0]


def test_too_many_ranks():
    message = "DeviceCalls: num_ranks must be at most 72, got 73; use a group inside one NVLink domain"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        DeviceCalls(torch.device("cpu"), 0, 73, 1.0)
