"""Signal words: 64-bit words that one peer writes and one reads, and that only ever grow. Release on write, acquire on read.

One class per place where they can be: memory that CPU ranks share, GPU memory, or a store. What the words mean is the protocol's business,
deadlines are the arena's.
"""

import ctypes
import ctypes.util
import functools
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megamoe.comm.protocol import SIGNALS, Layout
from megamoe.errors import ArenaError

T = TypeVar("T")

_ACQUIRE, _RELEASE = 2, 3  # __ATOMIC_* of the C++ ABI
_SPINS = 50
_SLEEP_S, _LONGEST_SLEEP_S = 50e-6, 1e-3


class Words(Protocol):
    """The words that this rank writes to every rank and reads from every rank, itself included."""

    def post(self, peer: int, signal: str, value: int) -> None: ...

    def poll(self, signal: str, src: int) -> int: ...

    def clear(self) -> None:
        """Zero what this rank reads, but for the `reset` words."""


class MappedWords:
    """Words in the arenas: this rank writes its row in every peer's arena and reads every row of its own."""

    def __init__(self, layout: Layout, arenas: Sequence[torch.Tensor], rank: int):
        self._own = [layout.view(signal, arenas[rank]) for signal in SIGNALS if signal != "reset"]
        views = {signal: [layout.view(signal, arena) for arena in arenas] for signal in SIGNALS}
        self._outbox = {signal: [view[rank, 0] for view in views[signal]] for signal in SIGNALS}
        self._inbox = {signal: list(views[signal][rank][:, 0]) for signal in SIGNALS}

    def clear(self) -> None:
        for view in self._own:
            view.zero_()


class HostWords(MappedWords):
    """Words in memory that CPU ranks share."""

    def __init__(self, layout: Layout, arenas: Sequence[torch.Tensor], rank: int):
        super().__init__(layout, arenas, rank)
        self._store, self._load = host_atomics()

    def post(self, peer: int, signal: str, value: int) -> None:
        self._store(self._outbox[signal][peer].data_ptr(), value)

    def poll(self, signal: str, src: int) -> int:
        return self._load(self._inbox[signal][src].data_ptr())


class DeviceWords(MappedWords):
    """Words in GPU memory, for a host that drives the exchange.

    A post is a fill on the current stream: it starts after the kernels before it have completed, which is when their writes to peer memory
    are visible there. A poll copies the word to the host, so kernels launched afterwards see what was published before it.
    """

    def post(self, peer: int, signal: str, value: int) -> None:
        self._outbox[signal][peer].fill_(value)

    def poll(self, signal: str, src: int) -> int:
        return int(self._inbox[signal][src].item())


class StoreWords:
    """Words in the store of a process group, for ranks that cannot reach each other's memory: key "<signal>/<source>/<reader>".

    One request brings every word that this rank reads, and each is handed out once before the next request. Since words only grow, one
    that is older than its poll is only seen a poll later. What is polled after a post is newer than the post.

    Args:
        store: seen by the ranks of this arena only. The caller meets the other ranks before the first poll or post.
        rank, num_ranks: of the EP group.
    """

    def __init__(self, store: dist.Store, rank: int, num_ranks: int):
        self._store, self._rank = store, rank
        self._inbox = {(signal, src): f"{signal}/{src}/{rank}" for signal in SIGNALS for src in range(num_ranks)}
        self._fetched: dict[tuple[str, int], int] = {}
        self._zero(self._inbox.values())

    def limit(self, timeout_s: float) -> None:
        """How long a request may take when the store does not answer, in seconds."""
        self._store.set_timeout(timedelta(seconds=timeout_s))

    def post(self, peer: int, signal: str, value: int) -> None:
        self._fetched.clear()
        self._request(self._store.set, f"{signal}/{self._rank}/{peer}", str(value))

    def poll(self, signal: str, src: int) -> int:
        if (signal, src) not in self._fetched:
            values = self._request(self._store.multi_get, list(self._inbox.values()))
            self._fetched = dict(zip(self._inbox, map(int, values), strict=True))
        return self._fetched.pop((signal, src))

    def clear(self) -> None:
        self._fetched.clear()
        self._zero(key for (signal, _), key in self._inbox.items() if signal != "reset")

    def close(self) -> None:
        """Delete what this rank reads. No other rank does, so none has to be waited for."""
        try:
            for key in self._inbox.values():
                self._store.delete_key(key)
        except dist.DistError:
            pass  # the process that held the store has ended, and the words with it

    def _zero(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._request(self._store.set, key, "0")

    def _request(self, request: Callable[..., T], *args: object) -> T:
        try:
            return request(*args)
        except dist.DistError as error:
            got = str(error).partition("\n")[0]
            raise ArenaError(f"Arena: the store of the process group must answer, got: {got}; restart all ranks, since the process that "
                             "holds it has ended or cannot be reached") from error


def wait_until(ready: Callable[[], bool], timeout_s: float) -> bool:
    """Poll `ready` until it holds or the deadline passes; False on the deadline. `ready` may raise."""
    deadline = time.monotonic() + timeout_s
    for _ in range(_SPINS):
        if ready():
            return True
    # NOTE: ranks outnumber cores on small machines, so a waiting rank must give its core to the one it waits for.
    pause_s = _SLEEP_S
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_SLEEP_S)
    return True


@functools.cache
def host_atomics() -> tuple[Callable[[int, int], None], Callable[[int], int]]:
    """(store-release, load-acquire) of an aligned 64-bit word at an address.

    Raises:
        OSError: there is no libatomic, and plain accesses are not enough on this machine.
    """
    path = ctypes.util.find_library("atomic")
    if path is not None:
        return _libatomic(ctypes.CDLL(path))
    if platform.machine() == "x86_64":
        return _plain_store, _plain_load
    raise OSError(f"libatomic was not found, which {platform.machine()} needs for ordered shared memory; install libatomic1")


def _libatomic(library: ctypes.CDLL) -> tuple[Callable[[int, int], None], Callable[[int], int]]:
    store, load = library.__atomic_store_8, library.__atomic_load_8
    store.argtypes, store.restype = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int), None
    load.argtypes, load.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_uint64
    return lambda address, value: store(address, value, _RELEASE), lambda address: load(address, _ACQUIRE)


# NOTE: x86-64 keeps stores in order and loads in order, and an aligned 8-byte access is one access: release and acquire come for free.
def _plain_store(address: int, value: int) -> None:
    ctypes.c_uint64.from_address(address).value = value


def _plain_load(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value
