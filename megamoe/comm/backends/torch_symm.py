"""Arenas in GPU memory through torch symmetric memory: the default on CUDA, for ranks of one NVLink domain."""

import os

import torch
import torch.distributed as dist

from megamoe.comm.agreement import agree
from megamoe.comm.topology import Topology
from megamoe.errors import EngineUnavailableError

_NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


def why_not(topology: Topology, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it holds GPU memory and the device is {device}; use 'shm'"
    if not torch.cuda.is_available():
        return "no CUDA device was found; use device='cpu'"
    if topology.num_ranks == 1:
        return "it needs a group of at least two ranks; use 'local'"
    if not topology.is_one_domain:
        return f"only the GPUs of ranks {topology.nvlink_ranks} are in load/store reach of rank {topology.rank}; use 'unmapped'"
    if os.environ.get(_NO_MULTICAST, "1") != "1":
        return f"{_NO_MULTICAST} must be 1, got {os.environ[_NO_MULTICAST]!r}; unset it"
    return None


def create(topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device) -> "TorchBackend":
    # NOTE: a rendezvous creates a multicast object over all ranks' memory unless told not to. Nothing here uses one, and one that is left
    # behind by a killed rank can wedge the driver.
    os.environ[_NO_MULTICAST] = "1"
    return TorchBackend(topology.rank, group, num_bytes, device)


class TorchBackend:
    name = "torch"
    words = None

    def __init__(self, rank: int, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device):
        import torch.distributed._symmetric_memory as symm_mem

        self._group = group if group is not None else dist.group.WORLD
        error = None
        try:
            # NOTE: not symm_mem.empty: that takes from an implicit pool, where ranks can pair up different allocations.
            self.local = torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device).zero_()
            torch.cuda.synchronize(device)
        except RuntimeError as caught:
            error = caught
        agree(group, "Arena", {}, error)
        self._handle = symm_mem.rendezvous(self.local, self._group)
        offset = self._handle.offset  # of our tensor in its block; buffer_ptrs are those of the blocks
        num_ranks = self._handle.world_size
        self._peers = [self._handle.get_buffer(peer, (num_bytes,), torch.uint8, storage_offset=offset) for peer in range(num_ranks)]
        self.peer_ptrs = tuple(pointer + offset for pointer in self._handle.buffer_ptrs)
        self._verify(rank)
        self.barrier()

    def _verify(self, rank: int) -> None:
        """Hold torch to what this file relies on, on all ranks alike."""
        error, by = None, f"Arena: backend 'torch': torch {torch.__version__}"
        if tuple(peer.data_ptr() for peer in self._peers) != self.peer_ptrs or self.local.data_ptr() != self.peer_ptrs[rank]:
            error = EngineUnavailableError(f"{by} maps symmetric memory at unexpected addresses")
        elif self._handle.multicast_ptr != 0:
            error = EngineUnavailableError(f"{by} ignores {_NO_MULTICAST}=1")
        agree(self._group, "Arena", {}, error)

    def peer(self, rank: int) -> torch.Tensor:
        return self._peers[rank]

    def barrier(self) -> None:
        torch.cuda.synchronize(self.local.device)
        agree(self._group, "Arena", {})

    def close(self) -> None:
        """Drop the mappings; the memory of a rank is freed when it and every peer have dropped theirs."""
        self._peers, self._handle, self.local = [], None, torch.empty(0, dtype=torch.uint8)
