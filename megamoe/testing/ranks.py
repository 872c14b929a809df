"""RankPool: a world of CPU ranks that runs functions for tests. Starting one costs a fork, so a pool serves a whole session.

Ranks are children of a fork server that has torch imported; they find each other through a file, not a port, and die with the parent.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

_START_TIMEOUT_S = 120.0
_STACK_TIMEOUT_S = 2.0


class RankLostError(RuntimeError):
    """A rank of the pool died or did not answer in time."""


class RankFailures(RuntimeError):
    """Some ranks failed.

    `errors` maps each failed rank to its exception, `results` each other rank to what it returned. The text holds every traceback.
    """

    def __init__(self, errors: dict[int, BaseException], results: dict[int, object], tracebacks: dict[int, str]):
        self.errors, self.results = errors, results
        texts = (f"--- rank {rank} ---\n{tracebacks.get(rank, error)}" for rank, error in sorted(errors.items()))
        super().__init__(f"{len(errors)} of {len(errors) + len(results)} ranks failed\n" + "\n".join(texts))


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """Type and text of what `call` raises, for a job to return; empty if it returns."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


class RankPool:
    """`num_ranks` processes in one gloo group. They start at the first use, and again after any failure.

    Args:
        num_ranks: size of the world.
    """

    def __init__(self, num_ranks: int):
        self.num_ranks = num_ranks
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed"])
        self._ranks: list[tuple[multiprocessing.Process, Connection]] = []
        self._store: tempfile.TemporaryDirectory | None = None

    def run(self, fn: Callable, *args: object, timeout_s: float = 60.0) -> list:
        """`[fn(rank, num_ranks, *args) for each rank]`, each in its own process. `fn` must be importable: defined at module level.

        Raises:
            RankFailures: fn raised on some rank, a rank died, or did not answer within timeout_s seconds.
        """
        self.start(fn, *args)
        return self.finish(timeout_s)

    def start(self, fn: Callable, *args: object) -> None:
        """Begin `run` and return; `finish` has the results."""
        if not self._ranks:
            self._launch()
        job = pickle.dumps((fn, args))
        for _, connection in self._ranks:
            connection.send((sys.path, job))

    def finish(self, timeout_s: float = 60.0) -> list:
        """Results of the last `start`."""
        replies, silent = self._collect(timeout_s)
        errors: dict[int, BaseException] = dict(silent)
        results, tracebacks = {}, {}
        for rank, (succeeded, payload, text) in replies.items():
            if succeeded:
                results[rank] = pickle.loads(payload)
            else:
                errors[rank], tracebacks[rank] = pickle.loads(payload), text
        if errors:
            # NOTE: after a failure the group's collectives may be out of step, so the next user gets new ranks.
            self.close()
            raise RankFailures(errors, results, tracebacks)
        return [results[rank] for rank in range(self.num_ranks)]

    def run_until_death(self, fn: Callable, *args: object, expected_dead: tuple[int, ...], timeout_s: float = 60.0) -> dict[int, object]:
        """`run` for a function that kills the ranks `expected_dead`; what the survivors returned. Any other failure is raised."""
        try:
            self.run(fn, *args, timeout_s=timeout_s)
        except RankFailures as failures:
            if set(failures.errors) == set(expected_dead) and all(isinstance(e, RankLostError) for e in failures.errors.values()):
                return failures.results
            raise
        raise AssertionError(f"ranks {expected_dead} must die, but all {self.num_ranks} ranks answered")

    def kill(self, rank: int) -> None:
        """SIGKILL one rank, as the kernel's out-of-memory killer would."""
        self._ranks[rank][0].kill()

    def close(self) -> None:
        """End all ranks. The pool can be used again."""
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []
        if self._store is not None:
            self._store.cleanup()
            self._store = None

    def _launch(self) -> None:
        self._store = tempfile.TemporaryDirectory(prefix="megamoe-ranks-")
        store = Path(self._store.name) / "store"
        for rank in range(self.num_ranks):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_rank_main, args=(rank, self.num_ranks, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        _, silent = self._collect(_START_TIMEOUT_S)
        if silent:
            self.close()
            raise RankFailures(silent, {}, {})

    def _collect(self, timeout_s: float) -> tuple[dict[int, tuple], dict[int, RankLostError]]:
        """One reply of each rank, and an error for each rank that has none."""
        replies, lost = {}, {}
        pending = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout_s
        while pending:
            readable = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not readable:
                lost |= {rank: RankLostError(f"rank {rank} did not answer within {timeout_s:.1f} s; its threads were at\n"
                                             f"{self._stack_of(rank)}") for rank in pending.values()}
                break
            for connection in readable:
                rank = pending.pop(connection)
                try:
                    replies[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    process = self._ranks[rank][0]
                    process.join()
                    lost[rank] = RankLostError(f"rank {rank} died with exit code {process.exitcode}")
        return replies, lost

    def _stack_of(self, rank: int) -> str:
        """Where a rank is, in its own words; it can tell even from inside a call that holds the interpreter."""
        path = _stack_path(self._store.name, rank)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._ranks[rank][0].pid, signal.SIGUSR1)
        deadline, text = time.monotonic() + _STACK_TIMEOUT_S, None
        while time.monotonic() < deadline:
            time.sleep(0.05)
            before, text = text, path.read_text() if path.exists() else ""
            if text and text == before:
                return text
        return "(no answer)"


def _stack_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"stack-{rank}"


def _rank_main(rank: int, num_ranks: int, store: str, connection: Connection) -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us
    stack = open(_stack_path(os.path.dirname(store), rank), "w")  # lives as long as we do: the handler writes to its descriptor
    faulthandler.register(signal.SIGUSR1, stack)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, num_ranks), rank=rank, world_size=num_ranks)
    connection.send("ready")
    while True:
        try:
            sys.path[:], job = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(_run_job(job, rank, num_ranks))


def _run_job(job: bytes, rank: int, num_ranks: int) -> tuple[bool, bytes, str]:
    """(succeeded, pickled result or exception, traceback). Plain pickle copies tensors; torch's own would share them by descriptor."""
    try:
        fn, args = pickle.loads(job)
        return True, pickle.dumps(fn(rank, num_ranks, *args)), ""
    except Exception as error:
        return False, _pickle_error(error), traceback.format_exc()


def _pickle_error(error: Exception) -> bytes:
    try:
        payload = pickle.dumps(error)
        pickle.loads(payload)
        return payload
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _die_with_parent() -> None:
    # NOTE: the parent process of a rank is the fork server, which outlives the test run while a rank lives; so no PR_SET_PDEATHSIG.
    multiprocessing.parent_process().join()
    os._exit(1)
