"""Signal words: 64-bit words in the arena that one peer writes and only ever raises. Release on write, acquire on read.

One class per kind of memory with the same two methods, `post` and `poll`. What the words mean is the protocol's business, deadlines are the
arena's.
"""

import ctypes
import ctypes.util
import functools
import platform
import time
from collections.abc import Callable, Sequence

import torch

from megamoe.comm.protocol import SIGNALS, Layout

_ACQUIRE, _RELEASE = 2, 3  # __ATOMIC_* of the C++ ABI
_SPINS = 50
_SLEEP_S, _LONGEST_SLEEP_S = 50e-6, 1e-3


class Words:
    """The words this rank writes (its row in every peer's arena) and reads (every row of its own arena)."""

    def __init__(self, layout: Layout, arenas: Sequence[torch.Tensor], rank: int):
        views = {signal: [layout.view(signal, arena) for arena in arenas] for signal in SIGNALS}
        self._outbox = {signal: [view[rank, 0] for view in views[signal]] for signal in SIGNALS}
        self._inbox = {signal: list(views[signal][rank][:, 0]) for signal in SIGNALS}


class HostWords(Words):
    """Words in memory that CPU ranks share."""

    def __init__(self, layout: Layout, arenas: Sequence[torch.Tensor], rank: int):
        super().__init__(layout, arenas, rank)
        self._store, self._load = host_atomics()

    def post(self, peer: int, signal: str, value: int) -> None:
        self._store(self._outbox[signal][peer].data_ptr(), value)

    def poll(self, signal: str, src: int) -> int:
        return self._load(self._inbox[signal][src].data_ptr())


class DeviceWords(Words):
    """Words in GPU memory, for a host that drives the exchange.

    A post is a fill on the current stream: it starts after the kernels before it have completed, which is when their writes to peer memory
    are visible there. A poll copies the word to the host, so kernels launched afterwards see what was published before it.
    """

    def post(self, peer: int, signal: str, value: int) -> None:
        self._outbox[signal][peer].fill_(value)

    def poll(self, signal: str, src: int) -> int:
        return int(self._inbox[signal][src].item())


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
