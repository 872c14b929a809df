"""Calls that kernels drive: epoch and failure mark on the device, reports in host memory that csrc/.../comm/call_state.cuh writes.

The words that ranks exchange are those of `Calls`; here is what one rank's kernels keep to themselves and what they tell the host.
"""

import ctypes
from dataclasses import dataclass

import torch

from megamoe.comm.abort import Abort, AbortReason
from megamoe.comm.calls import describe_timeout
from megamoe.errors import PeerTimeoutError, check

MAX_RANKS = 72  # Symm::kMaxRanks
# In the order of enum CallPhase: phase and the signal that it waits for. "experts" are the waits of mega_moe's roles for each other.
_PHASES = (("dispatch", "inputs_ready"), ("combine", "combine_ready"), ("experts", None))
_TIMEOUT = 1  # of enum WaitFailure; the other one is an abort word
_INITIAL_STATE = (0, 0, -1, 0)
# Where the reports begin, in words.
_REFUSED, _FATAL, _BAD_INDEX, _NUM_WORDS = 0, 2, 4, 9


class CallStateParams(ctypes.Structure):
    """The struct of the same name in call_state.cuh."""

    _fields_ = [("words", ctypes.c_void_p), ("reports", ctypes.c_void_p), ("timeout_ns", ctypes.c_uint64)]


@dataclass(frozen=True)
class DeviceFailure:
    """Why a call failed on the device.

    Args:
        phase: "dispatch", "combine", or "experts", in which no rank waits for another one.
        peer: the rank that was silent, in "experts" this one, in "combine" perhaps; or the one whose abort word ended the call.
        epoch: of the call.
        got: the signal, in "experts" the counter, that was there at the deadline; meaningless with `abort`.
        abort: the abort word; None for a time-out.
    """

    phase: str
    peer: int
    epoch: int
    got: int
    abort: Abort | None

    @property
    def is_refusal(self) -> bool:
        """Whether only this one call is lost; otherwise the arena needs a reset."""
        return self.abort is not None and self.abort.reason == AbortReason.REFUSED

    def culprit(self, rank: int) -> int:
        """The rank at fault, as `rank` names it."""
        if self.abort is None or self.is_refusal or self.abort.culprit == rank:
            return self.peer
        return self.abort.culprit

    def describe(self, rank: int, timeout_s: float) -> str:
        """The message for `rank`: what a host that waited itself would have said."""
        if self.abort is not None:
            return self.abort.describe(rank, self.peer, self.phase)
        signal = dict(_PHASES)[self.phase]
        if signal is None or self.peer == rank:
            return (f"rank {rank}: its own kernels made no progress within {timeout_s:.1f} s in {self.phase} (a counter stood at "
                    f"{self.got}); call reset() on every rank, and report it if it happens again")
        return describe_timeout(rank, signal, self.peer, timeout_s, self.phase, self.epoch, self.got)

    def error(self, rank: int, timeout_s: float) -> PeerTimeoutError:
        """The exception to raise on `rank`."""
        return PeerTimeoutError(self.describe(rank, timeout_s), peer=self.culprit(rank), phase=self.phase)


class DeviceCalls:
    """Device-driven calls over an arena: epoch and failure mark on the device, reports in host memory.

    Args:
        device: of the kernels.
        rank, num_ranks: of the EP group.
        timeout_s: deadline of every wait.
    """

    def __init__(self, device: torch.device, rank: int, num_ranks: int, timeout_s: float):
        check(num_ranks <= MAX_RANKS, "DeviceCalls", "num_ranks", f"at most {MAX_RANKS}", num_ranks, "use a group inside one NVLink domain")
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        self.state = torch.tensor(_INITIAL_STATE, dtype=torch.int64, device=device)  # [4] epoch, failed until, first bad index, number
        self._initial_state = self.state.clone()
        # Pinned: its address is also the device's.
        self._reports = torch.zeros(_NUM_WORDS, dtype=torch.int64, pin_memory=self.state.is_cuda)
        self._words = (ctypes.c_int64 * _NUM_WORDS).from_address(self._reports.data_ptr())
        self._seen_refusal = self._seen_bad_index = 0
        self._cleared: list[torch.Tensor] = []

    def clear_at_start_over(self, tensor: torch.Tensor) -> None:
        """Have `start_over` zero `tensor`: what kernels count in, which a failed call may leave anyhow."""
        self._cleared.append(tensor)

    def params(self) -> CallStateParams:
        """The struct that kernels take. Valid as long as this object lives."""
        return CallStateParams(self.state.data_ptr(), self._reports.data_ptr(), round(self.timeout_s * 1e9))

    def failure(self) -> DeviceFailure | None:
        """What ended a call, as far as the device has got; None if nothing did.

        A refused call is told once, since the next one works; any other failure at every call until `start_over`. Sync: none.
        """
        head = self._words[_FATAL]
        if head:
            return _decode(head, self._words[_FATAL + 1])
        head = self._words[_REFUSED]
        if head in (0, self._seen_refusal):
            return None
        self._seen_refusal = head
        failure = _decode(head, self._words[_REFUSED + 1])
        # A later refusal may have overwritten the word by now, but all that a refusal says is in the head.
        return DeviceFailure(failure.phase, failure.peer, failure.epoch, 0, Abort(failure.epoch, AbortReason.REFUSED, failure.peer))

    def routing_error(self) -> tuple[int, int, int, int] | None:
        """(token, slot, value, number) of the first topk_idx out of range in the latest call that had one, and how many it had; told once.

        Sync: none.
        """
        begin, first, value, number, end = self._words[_BAD_INDEX:]
        # The device writes `begin` first and `end` last: a second look that finds the same has not met it in between.
        if begin != end or begin == self._seen_bad_index or self._words[_BAD_INDEX:] != [begin, first, value, number, end]:
            return None
        self._seen_bad_index = begin
        return first >> 32, first & 0xFFFFFFFF, value, number

    def epoch(self) -> int:
        """Number of the current call. Sync: waits for the current stream."""
        return int(self.state[0])

    def advance(self) -> None:
        """Count a call that this rank refused, and in which it launches nothing. Sync: stream-ordered."""
        self.state[0] += 1

    def start_over(self) -> None:
        """Epoch 0, nothing failed, nothing reported. For a reset, when no kernel of the arena runs. Sync: stream-ordered."""
        self.state.copy_(self._initial_state)
        for tensor in self._cleared:
            tensor.zero_()
        self._reports.zero_()
        self._seen_refusal = self._seen_bad_index = 0


def _decode(head: int, got: int) -> DeviceFailure:
    """A report: epoch << 16 | phase << 12 | kind << 8 | peer, and the word that was read last."""
    phase, _ = _PHASES[head >> 12 & 0xF]
    abort = None if head >> 8 & 0xF == _TIMEOUT else Abort.from_word(got)
    return DeviceFailure(phase, head & 0xFF, head >> 16, got, abort)
