"""PackedExperts: the local experts of a layer as kernels on Hopper read them, and the gate that a config describes.

Legend: e local experts, H hidden, I intermediate.
"""

import math
from dataclasses import dataclass

import torch

from megamoe.config import MoEConfig
from megamoe.formats import ExpertWeights, Sm90Weight, gate_up, layout_sm90
from megamoe.kernels.mega_moe import MegaExperts

ACT_GROUP = 32  # of the activated rows, before they are folded to one exponent


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The local experts as the kernels read them, and the biases as they were given."""

    gate_up: Sm90Weight  # [e, 2I, H], interleaved
    down: Sm90Weight  # [e, H, I]
    gate_up_bias: torch.Tensor | None  # [e, 2I] canonical, any float dtype
    down_bias: torch.Tensor | None  # [e, H]
    kernel_gate_up_bias: torch.Tensor | None  # [e, 2I] float32, interleaved
    kernel_down_bias: torch.Tensor | None  # [e, H] float32

    @classmethod
    def pack(cls, weights: ExpertWeights, device: torch.device, thread_order: bool = False) -> "PackedExperts":
        """Kernel layout of FP4 experts on `device`, one matrix after the other so that few temporaries live at once. Sync: reads the
        device once per expert."""
        gate_up_bias, down_bias = (None if bias is None else bias.to(device) for bias in (weights.gate_up_bias, weights.down_bias))
        return cls(
            layout_sm90.pack(weights.gate_up.to(device), interleave_gate_up=True, thread_order=thread_order),
            layout_sm90.pack(weights.down.to(device), interleave_gate_up=False, thread_order=thread_order),
            gate_up_bias, down_bias,
            None if gate_up_bias is None else gate_up.interleave(gate_up_bias.float(), dim=1).contiguous(),
            None if down_bias is None else down_bias.float().contiguous())

    def for_mega_moe(self, gate: dict[str, float]) -> MegaExperts:
        """What mega_moe takes; `gate` as `gate_constants` has it."""
        return MegaExperts(self.gate_up, self.down, self.kernel_gate_up_bias, self.kernel_down_bias, **gate)

    def unpack(self) -> ExpertWeights:
        """The canonical form, made anew by each call: nothing holds a second copy."""
        return ExpertWeights(self.gate_up.unpack(), self.down.unpack(), self.gate_up_bias, self.down_bias)


def gate_constants(cfg: MoEConfig) -> dict[str, float]:
    """limit, alpha and up_bias as kernels take them: no limit is +inf, and alpha 1 with up_bias 0 is SiLU."""
    alpha = cfg.swiglu_alpha
    return {"limit": math.inf if cfg.swiglu_limit is None else cfg.swiglu_limit, "alpha": 1.0 if alpha is None else alpha,
            "up_bias": cfg.swiglu_up_bias}
