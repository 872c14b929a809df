"""Transports of the unfused engine: how token rows reach the ranks of their experts, and how the results come back."""

from megamoe.comm import Arena
from megamoe.config import MoEConfig
from megamoe.engines.transports.arena import ArenaTransport
from megamoe.engines.transports.base import ReceivedRows, Transport
from megamoe.engines.transports.deep_ep import DeepEPTransport
from megamoe.engines.transports.nccl import NcclTransport
from megamoe.errors import EngineUnavailableError

__all__ = ["ArenaTransport", "DeepEPTransport", "NcclTransport", "ReceivedRows", "Transport", "create_transport"]


def create_transport(name: str, cfg: MoEConfig, arena: Arena) -> Transport:
    """The transport `name` of `arena`, shared by its layers. "auto" is "arena" where peers are mapped, else "nccl".

    Raises:
        EngineUnavailableError: the transport cannot run over this arena or group.
    """
    if not arena.is_mapped:
        if name not in ("auto", "nccl"):
            raise EngineUnavailableError(f"MegaMoE: transport {name!r} cannot run here: it loads and stores the memory of peers, which "
                                         f"backend {arena.backend!r} does not map; unset MEGAMOE_TRANSPORT")
        name = "nccl"
    if name == "nccl":
        return arena.shared("nccl transport", lambda: NcclTransport(cfg, arena))
    if name == "deep_ep":
        return arena.shared("deep_ep transport", lambda: DeepEPTransport(cfg, arena))
    return arena.shared("arena transport", lambda: ArenaTransport(arena))
