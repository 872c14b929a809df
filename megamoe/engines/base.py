"""What every engine offers, and which one `engine="auto"` picks."""

from dataclasses import dataclass
from typing import Protocol

import torch

from megamoe.comm import Arena
from megamoe.config import FP8_PRECISIONS
from megamoe.errors import EngineUnavailableError
from megamoe.formats import ExpertWeights

ENGINES = ("reference", "unfused", "fused")
# The engines that "auto" tries, the fastest first.
AUTO_ORDER = ("fused", "unfused", "reference")
_HOPPER = (9, 0)
_NEEDS_MAPPED = "loads and stores the memory of peers, which backend 'unmapped' does not map"


@dataclass
class Traffic:
    """What crossed between ranks since the engine was built; rows and bytes that stayed on their rank do not count."""

    rows_pulled: int = 0
    bytes_pulled: int = 0
    bytes_pushed: int = 0


class Engine(Protocol):
    """Computes one MoE layer for the experts it was given. `forward` is collective over the EP group of the arena.

    `is_synchronous`: when `forward` returns, the result is there and every error has been raised. Otherwise `forward` only enqueues work,
    and what kernels find wrong is reported through `Arena.device_calls`. `traffic` is None in an engine that does not count.
    """

    name: str
    act_group: int | str
    is_synchronous: bool
    traffic: Traffic | None

    @property
    def is_loaded(self) -> bool: ...

    def load(self, weights: ExpertWeights) -> None: ...

    def weights(self) -> ExpertWeights | None:
        """The experts in canonical form, None before `load`. May be made anew by each call."""

    def token_views(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where producers may write the tokens of a call: x [max_tokens_per_rank, H] and, in the fp8 precisions, x_sf [.., H/32]."""

    def forward(self, x: torch.Tensor, x_sf: torch.Tensor | None, topk_idx: torch.Tensor, topk_weights: torch.Tensor,
                expert_load: torch.Tensor) -> torch.Tensor: ...


def arena_token_views(arena: Arena) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The token views of an engine that stages tokens where they lie."""
    return arena.view("x"), arena.view("x_sf") if arena.dims.precision in FP8_PRECISIONS else None


def choose_engine(requested: str, device: torch.device | str, precision: str, is_mapped: bool = True) -> tuple[str, str]:
    """Choose for ranks that run the same layer.

    Args:
        requested: "auto" or an engine.
        device, precision: of the layer.
        is_mapped: whether the ranks reach each other's memory, as `Arena.is_mapped` has it.
    Returns:
        (engine, reason).
    Raises:
        EngineUnavailableError: it cannot run here, or for "auto" none can.
    """
    if requested not in ("auto", *ENGINES):
        raise EngineUnavailableError(f"MegaMoE: engine must be one of {('auto', *ENGINES)}, got {requested!r}; pass engine='auto'")
    device = torch.device(device)
    if requested != "auto":
        if (obstacle := _why_not(requested, device, precision, is_mapped)) is not None:
            raise EngineUnavailableError(f"MegaMoE: engine {requested!r} cannot run here: it {obstacle}; pass engine='auto'")
        return requested, "requested"
    reason = "the fastest one here"
    for name in AUTO_ORDER:
        obstacle = _why_not(name, device, precision, is_mapped)
        if obstacle is None:
            return name, reason
        reason = f"{name} {obstacle}"
    raise EngineUnavailableError(f"MegaMoE: no engine can run here: reference {_NEEDS_MAPPED}, and unfused "
                                 f"{why_not_unfused(device, precision)}; use a group whose ranks are in one NVLink domain, or on the CPU "
                                 "on one host")


def _why_not(name: str, device: torch.device, precision: str, is_mapped: bool) -> str | None:
    if name == "fused":
        return why_not_fused(device, precision, is_mapped)
    if name == "unfused":
        return why_not_unfused(device, precision)
    return None if is_mapped else _NEEDS_MAPPED


def why_not_fused(device: torch.device, precision: str, is_mapped: bool) -> str | None:
    """What the fused engine wants that is not there, None if it can run."""
    obstacle = why_not_unfused(device, precision)
    return _NEEDS_MAPPED if obstacle is None and not is_mapped else obstacle


def why_not_unfused(device: torch.device, precision: str) -> str | None:
    """What the unfused engine wants that is not there, None if it can run."""
    if precision != "fp8xfp4":
        return f"computes fp8xfp4, not {precision}"
    if device.type != "cuda":
        return f"needs a Hopper GPU, not device {device.type}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability == _HOPPER else "needs a Hopper GPU, not sm_{}{}".format(*capability)
