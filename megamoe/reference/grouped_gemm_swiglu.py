"""Plain-torch twin of megamoe.grouped_gemm_swiglu. Inputs are checked in kernels/grouped_gemm_swiglu.py.

Legend: M rows, G groups, I intermediate features, K input features.
"""

import torch

from megamoe.formats import FP4Weight, QuantizedTokens, quantize_tokens
from megamoe.reference.gemm import Tokens, token_values
from megamoe.reference.grouped_gemm import rows_of_groups
from megamoe.reference.swiglu import swiglu

ACT_GROUP = 32


def grouped_gemm_swiglu(
    x: Tokens,
    w: FP4Weight,
    *,
    expert_idx: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    up_bias: float = 0.0,
    out: QuantizedTokens | None = None,
) -> QuantizedTokens:
    """See megamoe.grouped_gemm_swiglu. `out` takes the result if it is given."""
    values = token_values(x, w)  # [M, K] or [G, Mmax, K] float32
    act = values.new_zeros(*values.shape[:-1], w.shape[1] // 2)
    flat_values, flat_act = values.flatten(0, -2), act.view(-1, act.shape[-1])
    for group, rows in rows_of_groups(expert_idx, offsets, num_rows, values.shape[-2]):
        product = flat_values[rows] @ w[group].dequantize().T  # [rows, 2I] float32
        if bias is not None:
            product += bias[group].float()
        gate, up = product.chunk(2, dim=-1)
        activated = swiglu(gate, up, limit=limit, alpha=alpha, up_bias=up_bias)
        flat_act[rows] = activated if row_weight is None else activated * row_weight.flatten()[rows, None]
    quantized = quantize_tokens(act, group=ACT_GROUP)
    if out is None:
        return quantized
    out.codes.copy_(quantized.codes)
    out.sf.copy_(quantized.sf)
    return out
