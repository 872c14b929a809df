"""Plain-torch twin of megamoe.swiglu_quantize. Inputs are checked in kernels/swiglu_quantize.py. Legend: M rows, I channels."""

import torch

from megamoe.formats import QuantizedTokens, quantize_tokens
from megamoe.reference.swiglu import swiglu


def swiglu_quantize(
    gate_up: torch.Tensor,
    *,
    row_weight: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    up_bias: float = 0.0,
    group: int | str = 32,
) -> QuantizedTokens:
    """See megamoe.swiglu_quantize."""
    gate, up = gate_up.chunk(2, dim=-1)  # [M, I] each
    act = swiglu(gate, up, limit=limit, alpha=alpha, up_bias=up_bias)
    return quantize_tokens(act if row_weight is None else act * row_weight[:, None], group)
