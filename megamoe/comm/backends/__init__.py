"""Backends: who provides the bytes of the arena. Each one gives local memory and the peers' memory, and knows nothing of what is in it."""

from typing import Protocol

import torch
import torch.distributed as dist

from megamoe.comm.backends import local, nvshmem, shm, torch_symm, unmapped
from megamoe.comm.protocol import Layout
from megamoe.comm.signals import DeviceWords, HostWords, StoreWords, Words
from megamoe.comm.topology import Topology
from megamoe.errors import EngineUnavailableError

_MODULES = {"local": local, "shm": shm, "torch": torch_symm, "nvshmem": nvshmem, "unmapped": unmapped}
NAMES = tuple(_MODULES)


class Backend(Protocol):
    """Memory of one arena on all ranks of a group, zeroed at creation.

    `local` is [num_bytes] uint8; `peer(rank)` the same bytes of that rank, ours included; `peer_ptrs` their addresses as this rank
    loads and stores them. Where peers cannot be reached, their `peer` is None, their address 0, and signals go through `words`; else
    `words` is None.
    """

    name: str
    local: torch.Tensor
    peer_ptrs: tuple[int, ...]
    words: StoreWords | None

    def peer(self, rank: int) -> torch.Tensor | None: ...

    def barrier(self) -> None: ...

    def close(self) -> None: ...


def choose(name: str, topology: Topology, device: torch.device) -> str:
    """Resolve "auto" and refuse what cannot run.

    Raises:
        EngineUnavailableError: the backend is unknown or cannot run here; the text has the reason.
    """
    if name == "auto":
        name = _pick(topology, device)
    if name not in _MODULES:
        raise EngineUnavailableError(f"Arena: backend must be one of {('auto', *NAMES)}, got {name!r}; pick one of them")
    reason = _MODULES[name].why_not(topology, device)
    if reason is not None:
        raise EngineUnavailableError(f"Arena: backend {name!r} cannot run here: {reason}")
    return name


def _pick(topology: Topology, device: torch.device) -> str:
    if topology.num_ranks == 1:
        return "local"
    if device.type == "cpu":
        return "shm"
    return "torch" if topology.is_one_domain else "unmapped"


def create(name: str, topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device) -> Backend:
    """Allocate `num_bytes` on every rank and map the peers' memory, where the backend does. Sync: collective over the group."""
    return _MODULES[name].create(topology, group, num_bytes, device)


def signal_words(memory: Backend, topology: Topology, layout: Layout, timeout_s: float) -> Words:
    """The words through which the ranks of an arena signal: in its memory, or what the backend has instead."""
    if memory.words is not None:
        memory.words.limit(timeout_s)
        return memory.words
    arenas = [memory.peer(peer) for peer in range(topology.num_ranks)]
    return (HostWords if memory.local.device.type == "cpu" else DeviceWords)(layout, arenas, topology.rank)
