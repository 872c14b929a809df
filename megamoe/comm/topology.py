"""Topology: who this rank is in its expert-parallel group, and which ranks' memory it can load from and store to."""

import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamoe.comm.agreement import gather, rank_and_size


@dataclass(frozen=True)
class Topology:
    """Place of one rank in its group.

    Args:
        rank: this rank in the group.
        num_ranks: size W of the group.
        nvlink_ranks: ranks in load/store reach of each other, this one included, ascending. On the CPU: the ranks of this host.
    """

    rank: int
    num_ranks: int
    nvlink_ranks: tuple[int, ...]

    @property
    def is_one_domain(self) -> bool:
        """Whether all ranks reach each other's memory; every rank has the same answer."""
        return len(self.nvlink_ranks) == self.num_ranks

    @classmethod
    def from_group(cls, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> "Topology":
        """Find this rank's neighbours.

        Args:
            group: the EP group; None is the default group, or a world of one where torch.distributed is not initialised.
            device: where this rank's arena lives.
        Sync: collective over the group.
        """
        rank, num_ranks = rank_and_size(group)
        device = torch.device(device)
        homes = gather(group, (socket.gethostname(), _uuid(device)))
        host = homes[rank][0]
        reachable = tuple(r for r, (peer_host, uuid) in enumerate(homes) if peer_host == host and (r == rank or _can_access(device, uuid)))
        # Reach need not be mutual, as far as each rank can tell: a domain is what its members agree on.
        domains = gather(group, reachable)
        return cls(rank, num_ranks, tuple(r for r in reachable if domains[r] == reachable))


def _uuid(device: torch.device) -> str | None:
    """Identity of a GPU that holds whatever CUDA_VISIBLE_DEVICES hides; None on the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" and torch.cuda.is_available() else None


def _can_access(device: torch.device, peer_uuid: str | None) -> bool:
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    visible = {_uuid(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    if peer_uuid not in visible:
        # NOTE: hidden by CUDA_VISIBLE_DEVICES, so nothing can be asked about it here; the rendezvous finds out.
        return True
    own, peer = visible[_uuid(device)], visible[peer_uuid]
    return own == peer or torch.cuda.can_device_access_peer(own, peer)
