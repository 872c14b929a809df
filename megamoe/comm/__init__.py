"""Communication: topology, the arena and its protocol. Everything that crosses ranks goes through here."""

from megamoe.comm.abort import AbortReason
from megamoe.comm.agreement import agree
from megamoe.comm.arena import Arena
from megamoe.comm.topology import Topology

__all__ = ["AbortReason", "Arena", "Topology", "agree"]
