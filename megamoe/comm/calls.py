"""Calls over an arena: signals with deadlines, and how the ranks of a group enter, fail and leave a call without one waiting for ever."""

from collections.abc import Callable

from megamoe.comm.abort import Abort, AbortReason
from megamoe.comm.signals import Words, wait_until
from megamoe.errors import ArenaError, PeerTimeoutError


class Calls:
    """The signalling half of an arena.

    `epoch` is the number of the current call, equal on all ranks; `begin_call` raises it.
    """

    def __init__(self, words: Words, rank: int, num_ranks: int, timeout_s: float):
        self.rank, self.num_ranks, self.timeout_s = rank, num_ranks, timeout_s
        self._words: Words | None = words
        self._num_reset_steps = 0
        self._start_over()

    def _start_over(self) -> None:
        self.epoch = 0
        self._published_epoch = self._num_barriers = 0
        self._failure: str | None = None

    def begin_call(self) -> None:
        """Start the next call on this rank. Raises RuntimeError if the last one left the arena in need of a reset."""
        self._check_open()
        if self._failure is not None:
            raise RuntimeError(f"Arena: it cannot be used after a failed call; call reset() on every rank (the failure: {self._failure})")
        self.epoch += 1

    def fail_call(self, error: BaseException) -> None:
        """Leave the current call because of `error`, and let no peer wait for what this rank will not do.

        If nobody can have read this rank's inputs yet, the ranks leave the call together and the next one works; otherwise `begin_call`
        raises until `reset`. Sync: blocks the host until every peer has left the call too, or timeout_s.
        """
        if isinstance(error, PeerTimeoutError):
            if self._failure is None:
                self._leave_together()
        elif isinstance(error, Exception) and self._published_epoch < self.epoch:
            self.post_abort(AbortReason.REFUSED)
            self._leave_together()
        else:
            self._failure = str(error)
            self.post_abort(AbortReason.FAILED)

    def post(self, peer: int, signal: str, value: int) -> None:
        """Publish `value` to `peer` (release): who sees it sees everything this rank wrote before.

        Sync: on CUDA ordered on the current stream, no host synchronisation.
        """
        self._check_open()
        if signal == "inputs_ready":
            self._published_epoch = value
        self._words.post(peer, signal, value)

    def wait(self, signal: str, peer: int, value: int, phase: str) -> None:
        """Wait until `peer` has posted at least `value` to this rank (acquire).

        Args:
            phase: what this rank is doing, for the message.
        Raises:
            PeerTimeoutError: the deadline passed, or some peer aborted; `peer` names the rank at fault.
        Sync: blocks the host; on CUDA synchronises with the current stream.
        """
        self._check_open()

        def ready() -> bool:
            if self._words.poll(signal, peer) >= value:
                return True
            self.raise_if_aborted(phase)
            return False

        self._wait(ready, signal, peer, value, phase, self.timeout_s)

    def raise_if_aborted(self, phase: str) -> None:
        """Raise PeerTimeoutError if a peer has aborted the current call. For a rank that goes where no peer can wake it. Sync: as `wait`.
        """
        for peer in range(self.num_ranks):
            word = self._words.poll("abort", peer)
            if word == 0 or not (abort := Abort.from_word(word)).ends(self.epoch):
                continue
            text = abort.describe(self.rank, peer, phase)
            if abort.reason == AbortReason.REFUSED:
                raise PeerTimeoutError(text, peer=peer, phase=phase)
            self._fail(text, peer if abort.culprit == self.rank else abort.culprit, phase)

    def post_abort(self, reason: AbortReason = AbortReason.FAILED, culprit: int | None = None) -> None:
        """Make the waits of every peer fail. `culprit` is the rank at fault, this one by default."""
        word = Abort(self.epoch, reason, self.rank if culprit is None else culprit).to_word()
        for peer in range(self.num_ranks):
            if peer != self.rank:
                self.post(peer, "abort", word)

    def barrier(self) -> None:
        """Wait until every rank of the group is here. Raises PeerTimeoutError. Sync: collective, blocks the host."""
        self._num_barriers += 1
        self._post_all("barrier", self._num_barriers)
        for peer in range(self.num_ranks):
            self.wait("barrier", peer, self._num_barriers, "barrier")

    def _check_open(self) -> None:
        if self._words is None:
            raise ArenaError("Arena: it is closed; create another one")

    def _post_all(self, signal: str, value: int) -> None:
        self._check_open()
        for peer in range(self.num_ranks):
            self._words.post(peer, signal, value)

    def _meet(self, signal: str, value: int, deadline_s: float) -> None:
        """Post to everybody and wait for everybody, whatever the abort words say."""
        self._post_all(signal, value)
        for peer in range(self.num_ranks):
            self._wait(lambda peer=peer: self._words.poll(signal, peer) >= value, signal, peer, value, signal, deadline_s)

    def _leave_together(self) -> None:
        """End a call that some rank refused. A rank that went on alone could overtake a peer that has not noticed yet."""
        try:
            self._meet("combine_ready", self.epoch, self.timeout_s)
        except PeerTimeoutError:
            # NOTE: `_wait` has noted the failure; the caller raises the error that brought it here, which comes first.
            pass

    def _wait(self, ready: Callable[[], bool], signal: str, peer: int, value: int, phase: str, deadline_s: float) -> None:
        if not wait_until(ready, deadline_s):
            got = self._words.poll(signal, peer)
            if signal != "reset":  # a peer that has joined may have cleared its abort words already
                self.post_abort(AbortReason.PEER_TIMEOUT, peer)
            self._fail(describe_timeout(self.rank, signal, peer, deadline_s, phase, value, got), peer, phase)

    def _fail(self, text: str, peer: int, phase: str) -> None:
        self._failure = text
        raise PeerTimeoutError(text, peer=peer, phase=phase)


def describe_timeout(rank: int, signal: str, peer: int, deadline_s: float, phase: str, expected: int, got: int) -> str:
    """The message for `rank`, which waited in `phase` for `peer` to raise `signal` to the epoch `expected`."""
    return (f"rank {rank}: no {signal} from rank {peer} within {deadline_s:.1f} s in {phase} (expected epoch {expected}, got {got}); rank "
            f"{peer} is silent: see its log, then restart it or call reset() on every rank")
