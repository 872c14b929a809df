"""What every engine offers, and which one `engine="auto"` picks."""

from dataclasses import dataclass
from typing import Protocol

import torch

from megamoe.errors import EngineUnavailableError
from megamoe.formats import ExpertWeights

ENGINES = ("reference",)


@dataclass
class Traffic:
    """What crossed between ranks since the engine was built; rows and bytes that stayed on their rank do not count."""

    rows_pulled: int = 0
    bytes_pulled: int = 0
    bytes_pushed: int = 0


class Engine(Protocol):
    """Computes one MoE layer for the experts it was given. `forward` is collective over the EP group of the arena."""

    name: str
    act_group: int | str
    is_synchronous: bool
    traffic: Traffic

    def load(self, weights: ExpertWeights) -> None: ...

    def weights(self) -> ExpertWeights | None:
        """The experts in canonical form, None before `load`."""

    def forward(self, x: torch.Tensor, x_sf: torch.Tensor | None, topk_idx: torch.Tensor, topk_weights: torch.Tensor,
                expert_load: torch.Tensor) -> torch.Tensor: ...


def choose_engine(requested: str, device: torch.device | str, precision: str) -> tuple[str, str]:
    """Return (engine, reason) for `requested`. Raises EngineUnavailableError for one that cannot run here."""
    if requested in ENGINES:
        return requested, "requested"
    if requested == "auto":
        return "reference", f"the only engine for {precision} on {torch.device(device).type} so far"
    raise EngineUnavailableError(f"MegaMoE: engine must be one of {('auto', *ENGINES)}, got {requested!r}; pass engine='auto'")
