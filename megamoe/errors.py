"""Exception types and the one form of a failed check. Every message names the value expected and the value got."""


class CollectiveMismatchError(RuntimeError):
    """Two ranks called a collective constructor with different arguments. Raised on every rank."""


class ArenaError(RuntimeError):
    """The symmetric memory could not be created, e.g. because /dev/shm is too small."""


class ArenaBudgetError(ValueError):
    """A config does not fit the arena's byte budget."""


class EngineUnavailableError(RuntimeError):
    """The engine or backend asked for cannot run here; the message says why."""


class FormatError(ValueError):
    """Weights or scales are not in the number format they were passed as, or leave the window a kernel folds exactly."""


class CheckpointError(ValueError):
    """A checkpoint misses a tensor, has one too many, or one of the wrong shape or dtype."""


class PeerTimeoutError(RuntimeError):
    """A peer stayed silent past the deadline, or aborted. `peer` is its rank in the EP group, `phase` what was awaited."""

    def __init__(self, message: str, *, peer: int, phase: str):
        super().__init__(message)
        self.peer = peer
        self.phase = phase

    def __reduce__(self):
        return _rebuild_peer_timeout, (str(self), self.peer, self.phase)


def _rebuild_peer_timeout(message: str, peer: int, phase: str) -> PeerTimeoutError:
    return PeerTimeoutError(message, peer=peer, phase=phase)


def check(condition: bool, op: str, what: str, expected: object, got: object, fix: str) -> None:
    """Raise `ValueError("<op>: <what> must be <expected>, got <got>; <fix>")` unless `condition` holds."""
    if not condition:
        raise ValueError(f"{op}: {what} must be {expected}, got {got}; {fix}")
