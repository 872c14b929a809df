"""One expert on a block of rows, in plain torch: the numerics contract's steps 2 to 5, literally."""

import torch

from megamoe.config import MoEConfig
from megamoe.formats import quantize_tokens
from megamoe.reference.swiglu import swiglu

PARTIAL_DTYPE = {"fp8xfp4": torch.bfloat16, "fp8xfp8": torch.bfloat16, "bf16": torch.bfloat16, "fp32": torch.float32}


def requantize(a: torch.Tensor, precision: str, act_group: int | str) -> torch.Tensor:
    """Round the intermediate [r, I] float32 to what linear 2 reads, returned in float32."""
    if precision == "fp32":
        return a
    if precision == "bf16":
        return a.bfloat16().float()
    return quantize_tokens(a, group=act_group).dequantize()


def expert_mlp(
    x: torch.Tensor,  # [r, H] float32, already on the values that linear 1 reads
    weight: torch.Tensor,  # [r] float32, the slot's top-k weight
    gate_up: torch.Tensor,  # [2I, H] float32: gate rows, then up rows
    down: torch.Tensor,  # [H, I] float32
    gate_up_bias: torch.Tensor | None,  # [2I]
    down_bias: torch.Tensor | None,  # [H]
    cfg: MoEConfig,
    act_group: int | str,
) -> torch.Tensor:
    """Return the rows' partial results [r, H], weighted: BF16, or float32 for precision "fp32"."""
    h = x @ gate_up.T
    if gate_up_bias is not None:
        h = h + gate_up_bias.float()
    gate, up = h.chunk(2, dim=-1)
    a = swiglu(gate, up, limit=cfg.swiglu_limit, alpha=cfg.swiglu_alpha, up_bias=cfg.swiglu_up_bias)
    a = requantize(a * weight[:, None], cfg.precision, act_group)
    y = a @ down.T
    if down_bias is not None:
        y = y + weight[:, None] * down_bias.float()
    return y.to(PARTIAL_DTYPE[cfg.precision])
