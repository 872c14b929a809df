"""megamoe.gemm: one dense GEMM on plain or quantised operands. Runs its plain-torch twin on every device.

Legend: M rows, N output features, K input features.
"""

import torch

from megamoe.kernels.library import FLOATS, Operands, join_tokens, join_weight, register, split_tokens, split_weight
from megamoe.reference import gemm as reference
from megamoe.reference.gemm import Tokens, Weight, result_dtype


def gemm(
    x: Tokens,
    w: Weight,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Compute x @ w.T + bias with FP32 accumulation.

    Args:
        x: [M, K] BF16 or FP32, or QuantizedTokens with group 32, 128 or "token".
        w: [N, K] FP4Weight, FP8Weight, BF16 or FP32. A plain x is quantised per 32 channels against an FP4Weight, per 128 against an
            FP8Weight.
        bias: [N] BF16 or FP32.
        out: [M, N] BF16 or FP32, takes the result, rounded to its dtype. None: a new tensor, FP32 if x and w are FP32 tensors, else BF16.
        accumulate: add the result to `out`, rounding once.

    Returns:
        [M, N], `out` if given.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, is not contiguous or requires grad; or accumulate without out.

    Sync: stream-ordered, no host sync.
    """
    operands = Operands("gemm")
    operands.tokens("x", x, "M K")
    operands.weight("w", w, "N K")
    operands.optional("bias", bias, "N", FLOATS)
    operands.out(out, "M N", FLOATS, accumulate)
    x_values, x_sf, x_group = split_tokens(x)
    w_values, w_scales = split_weight(w)
    if out is None:
        out = x_values.new_empty(x_values.shape[0], w_values.shape[0], dtype=result_dtype(x, w))
    torch.ops.megamoe.gemm(x_values, x_sf, x_group, w_values, w_scales, bias, out, accumulate)
    return out


def _launch(x, x_sf, x_group, w, w_scales, bias, out, accumulate) -> None:
    reference.gemm(join_tokens(x, x_sf, x_group), join_weight(w, w_scales), bias=bias, out=out, accumulate=accumulate)


register(
    "gemm(Tensor x, Tensor? x_sf, int x_group, Tensor w, Tensor? w_scales, Tensor? bias, Tensor(a!) out, bool accumulate) -> ()", _launch
)
