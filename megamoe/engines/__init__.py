"""Engines: one meaning of the layer, several ways to compute it."""

from megamoe.engines.base import ENGINES, Engine, Traffic, choose_engine
from megamoe.engines.fused import FusedEngine
from megamoe.engines.reference import ReferenceEngine
from megamoe.engines.unfused import UnfusedEngine

__all__ = ["ENGINES", "Engine", "FusedEngine", "ReferenceEngine", "Traffic", "UnfusedEngine", "choose_engine", "create_engine"]

_CLASSES = {"reference": ReferenceEngine, "unfused": UnfusedEngine, "fused": FusedEngine}


def create_engine(name: str, cfg, arena) -> Engine:
    """Build the engine `name` (as returned by `choose_engine`) for `cfg` over `arena`."""
    return _CLASSES[name](cfg, arena)
