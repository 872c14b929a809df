"""megamoe.gemm: one dense GEMM on plain or quantised operands. fp4_gemm for an Sm90Weight on Hopper, else its plain-torch twin.

Legend: M rows, N output features, K input features.
"""

import torch

from megamoe.formats import Sm90Weight
from megamoe.kernels import packed
from megamoe.kernels.library import FLOATS, Operands, join_tokens, join_weight, register, split_tokens, split_weight
from megamoe.reference import gemm as reference
from megamoe.reference.gemm import Tokens, Weight, result_dtype


def gemm(
    x: Tokens,
    w: Weight | Sm90Weight,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Compute x @ w.T + bias with FP32 accumulation.

    Args:
        x: [M, K] BF16 or FP32, or QuantizedTokens with group 32, 128 or "token".
        w: [N, K] FP4Weight, FP8Weight, BF16 or FP32, or an Sm90Weight [1, N, K] that is not interleaved, N a multiple of 32. A plain x is
            quantised per 32 channels against an FP4Weight, per 128 against an FP8Weight, per token against an Sm90Weight, for which the
            scales of a quantised x are folded to one per token too. Only an Sm90Weight runs the kernel: `formats.layout_sm90.pack` once.
        bias: [N] BF16 or FP32.
        out: [M, N] BF16 or FP32 (an Sm90Weight: BF16), takes the result, rounded to its dtype. None: a new tensor, FP32 if x and w are FP32
            tensors, else BF16.
        accumulate: add the result to `out`, rounding once.

    Returns:
        [M, N], `out` if given.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, is not contiguous or requires grad; or accumulate without out.

    Sync: stream-ordered, no host sync. CUDA-graph safe once the kernel is loaded.
    """
    operands = Operands("gemm")
    operands.tokens("x", x, "M K")
    operands.weight("w", w, "N K")
    operands.optional("bias", bias, "N", FLOATS)
    operands.out(out, "M N", (torch.bfloat16,) if isinstance(w, Sm90Weight) else FLOATS, accumulate)
    x_values, x_sf, x_group = split_tokens(x)
    w_values, w_scales = split_weight(w)
    if out is None:
        out = x_values.new_empty(x_values.shape[0], operands.sizes["N"], dtype=result_dtype(x, w))
    torch.ops.megamoe.gemm(x_values, x_sf, x_group, w_values, w_scales, bias, out, accumulate)
    return out


def _launch(x, x_sf, x_group, w, w_scales, bias, out, accumulate) -> None:
    tokens = join_tokens(x, x_sf, x_group)
    if not packed.is_packed(w):
        weight = join_weight(w, w_scales)
    else:
        weight = Sm90Weight(w, w_scales, torch.Size((1, out.shape[-1], x.shape[-1])), interleaved=False)
        if packed.runs_kernel(x.device):
            return packed.multiply("gemm", tokens, weight, "accumulate" if accumulate else "store", out=out, bias=bias)
        tokens, canonical = packed.twin_operands(tokens, weight)
        weight = canonical[0]
    reference.gemm(tokens, weight, bias=bias, out=out, accumulate=accumulate)


register(
    "gemm(Tensor x, Tensor? x_sf, int x_group, Tensor w, Tensor? w_scales, Tensor? bias, Tensor(a!) out, bool accumulate) -> ()", _launch
)
