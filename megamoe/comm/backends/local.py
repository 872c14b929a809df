"""The backend of a world of one: plain memory."""

import torch
import torch.distributed as dist

from megamoe.comm.topology import Topology


def why_not(topology: Topology, device: torch.device) -> str | None:
    if topology.num_ranks > 1:
        return f"it serves one rank and the group has {topology.num_ranks}; use 'auto'"
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no CUDA device was found; use device='cpu'"
    return None


def create(topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device) -> "LocalBackend":
    return LocalBackend(num_bytes, device)


class LocalBackend:
    name = "local"
    words = None

    def __init__(self, num_bytes: int, device: torch.device):
        self.local = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.peer_ptrs = (self.local.data_ptr(),)

    def peer(self, rank: int) -> torch.Tensor:
        return self.local

    def barrier(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """Free the memory once no view of it is left."""
        self.local = torch.empty(0, dtype=torch.uint8)
