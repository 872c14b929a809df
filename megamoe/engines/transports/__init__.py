"""Transports of the unfused engine: how token rows reach the ranks of their experts, and how the results come back."""

from megamoe.comm import Arena
from megamoe.config import MoEConfig
from megamoe.engines.transports.arena import ArenaTransport
from megamoe.engines.transports.base import ReceivedRows, Transport
from megamoe.engines.transports.nccl import NcclTransport

__all__ = ["ArenaTransport", "NcclTransport", "ReceivedRows", "Transport", "create_transport"]


def create_transport(name: str, cfg: MoEConfig, arena: Arena) -> Transport:
    """The transport `name` of `arena`, shared by its layers. "auto" is "arena": an arena has all its peers in load/store reach."""
    if name == "nccl":
        return arena.shared("nccl transport", lambda: NcclTransport(cfg, arena))
    return arena.shared("arena transport", lambda: ArenaTransport(arena))
