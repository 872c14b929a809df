"""What a rank tells its peers when it leaves a call early: one signal word with the epoch, the reason and the rank at fault."""

from dataclasses import dataclass
from enum import IntEnum


class AbortReason(IntEnum):
    REFUSED = 1
    """It published nothing, e.g. because of a bad argument: the call is lost on every rank, the next one may go on."""
    FAILED = 2
    """It failed after it had published: nobody knows who has read what, so the arena needs a reset."""
    PEER_TIMEOUT = 3
    """It waited for `culprit` until the deadline, or, if that is itself, for its own kernel: the arena needs a reset."""


@dataclass(frozen=True)
class Abort:
    """An abort word: 47 bits of epoch, 8 of reason, 8 of the rank at fault."""

    epoch: int
    reason: AbortReason
    culprit: int

    def to_word(self) -> int:
        return self.epoch << 16 | self.reason << 8 | self.culprit

    @classmethod
    def from_word(cls, word: int) -> "Abort":
        return cls(word >> 16, AbortReason(word >> 8 & 0xFF), word & 0xFF)

    def ends(self, epoch: int) -> bool:
        """Whether a call in `epoch` must stop. A refusal concerns its own call only."""
        return self.reason != AbortReason.REFUSED or self.epoch == epoch

    def describe(self, rank: int, sender: int, phase: str) -> str:
        """The message for `rank`, which was in `phase` when it saw the word of `sender`."""
        if self.reason == AbortReason.REFUSED:
            return (f"rank {rank}: rank {sender} aborted (it refused its arguments) while this rank was in {phase}; see the error of rank "
                    f"{sender}: this call is lost, the next one works")
        if self.reason == AbortReason.FAILED:
            return (f"rank {rank}: rank {sender} aborted (it failed in mid-call) while this rank was in {phase}; see the error of rank "
                    f"{sender}, then call reset() on every rank")
        if self.culprit == sender:
            return (f"rank {rank}: rank {sender} aborted (its own kernel made no progress) while this rank was in {phase}; see the error "
                    f"of rank {sender}, then call reset() on every rank")
        return (f"rank {rank}: rank {sender} aborted (rank {self.culprit} was silent) while this rank was in {phase}; see the log of rank "
                f"{self.culprit}, then restart it or call reset() on every rank")
