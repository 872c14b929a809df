"""Arenas of ranks that cannot load or store each other's memory, as on several hosts: local memory, and signals in the store.

What crosses ranks is the business of a transport that sends and receives.
"""

import uuid

import torch
import torch.distributed as dist

from megamoe.comm.agreement import agree, gather
from megamoe.comm.signals import StoreWords
from megamoe.comm.topology import Topology

MAX_RANKS = 256  # that an abort word can name


def why_not(topology: Topology, device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device was found; use device='cpu'"
    if topology.num_ranks == 1:
        return "it needs a group of at least two ranks; use 'local'"
    if topology.num_ranks > MAX_RANKS:
        return f"it serves at most {MAX_RANKS} ranks and the group has {topology.num_ranks}; use a smaller group"
    return None


def create(topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device) -> "UnmappedBackend":
    return UnmappedBackend(topology, group, num_bytes, device)


class UnmappedBackend:
    name = "unmapped"

    def __init__(self, topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device):
        self._group, self._rank = group, topology.rank
        error = None
        try:
            self.local = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        except RuntimeError as caught:
            error = caught
        agree(group, "Arena", {}, error)
        self.peer_ptrs = tuple(self.local.data_ptr() if rank == topology.rank else 0 for rank in range(topology.num_ranks))
        prefix = f"megamoe/{gather(group, uuid.uuid4().hex)[0]}"
        self.words = StoreWords(dist.PrefixStore(prefix, _group_store(group)), topology.rank, topology.num_ranks)
        self.barrier()

    def peer(self, rank: int) -> torch.Tensor | None:
        return self.local if rank == self._rank else None

    def barrier(self) -> None:
        agree(self._group, "Arena", {})

    def close(self) -> None:
        """Delete the words and free the memory once no view of it is left."""
        self.words.close()
        self.local = torch.empty(0, dtype=torch.uint8)


def _group_store(group: dist.ProcessGroup | None) -> dist.Store:
    """A connection of our own: a request must not wait for one that a collective library makes from another thread."""
    # NOTE: torch keeps the store of a group private, but has no other way to reach what the ranks have in common.
    return dist.distributed_c10d._get_process_group_store(group if group is not None else dist.group.WORLD).clone()
