"""megamoe.grouped_gemm_swiglu: linear 1 of the experts with its activation. fp4_gemm for an Sm90Weight on Hopper, else its twin.

Legend: M rows, G groups, I intermediate features (w has 2I rows), K input features.
"""

import math

import torch

from megamoe.errors import check
from megamoe.formats import FP4Weight, QuantizedTokens, Sm90Weight, gate_up
from megamoe.kernels import packed
from megamoe.kernels.grouped_gemm import check_grouping, check_rows_hint
from megamoe.kernels.library import FLOATS, INDICES, Operands, join_tokens, join_weight, register, split_tokens, split_weight
from megamoe.reference import grouped_gemm_swiglu as reference
from megamoe.reference.gemm import Tokens

OP = "grouped_gemm_swiglu"
ACT_GROUP = reference.ACT_GROUP


def grouped_gemm_swiglu(
    x: Tokens,
    w: FP4Weight | Sm90Weight,
    *,
    expert_idx: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    row_weight: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    up_bias: float = 0.0,
    rows_hint: int | None = None,
) -> QuantizedTokens:
    """Compute gate, up = x[row] @ w[g].T + bias[g], activate, weight the row, and quantise. Pass exactly one of the three groupings.

    Args:
        x: [M, K], or [G, Mmax, K] with num_rows; as in `grouped_gemm`.
        w: [G, 2I, K], I a multiple of 32: FP4Weight with I gate rows, then I up rows; or the Sm90Weight of it, interleaved, which runs the
            kernel.
        expert_idx, offsets, num_rows, rows_hint: as in `grouped_gemm`.
        bias: [G, 2I] BF16 or FP32, gate first, whatever the order of w.
        row_weight: [M] or [G, Mmax] FP32, multiplies the activated row, e.g. the top-k weight of its slot.
        limit: c in gate <= c, -c <= up <= c. None: no clamp.
        alpha, up_bias: None and 0: silu(gate) * up. Otherwise gate * sigmoid(alpha * gate) * (up + up_bias).

    Returns:
        QuantizedTokens [M, I] or [G, Mmax, I] with group 32. Padding rows are zero, except that the kernel leaves those of offsets and
        num_rows undefined.

    Raises:
        ValueError: as `grouped_gemm` does; or limit is not positive, or up_bias is given without alpha.

    Sync: as `grouped_gemm`.
    """
    given = [name for name, value in (("expert_idx", expert_idx), ("offsets", offsets), ("num_rows", num_rows)) if value is not None]
    check(len(given) == 1, OP, "grouping", "exactly one of expert_idx, offsets and num_rows", given or None, "pass one of them")
    check(isinstance(w, (FP4Weight, Sm90Weight)), OP, "w", "an FP4Weight or Sm90Weight", type(w).__name__, "quantise it with quantize_fp4")
    rows = "M" if num_rows is None else "G Mmax"
    operands = Operands(OP)
    operands.tokens("x", x, f"{rows} K")
    if isinstance(w, Sm90Weight):
        operands.packed_weight("w", w, "G 2I K", interleaved=True)
    else:
        operands.weight("w", w, "G 2I K")
    num_features = operands.sizes["2I"] // 2
    check(operands.sizes["2I"] % (2 * ACT_GROUP) == 0, OP, "2I", f"a multiple of {2 * ACT_GROUP}", operands.sizes["2I"], "pad I with zeros")
    operands.sizes["G+1"] = operands.sizes["G"] + 1
    operands.optional("expert_idx", expert_idx, "M", INDICES)
    operands.optional("offsets", offsets, "G+1", INDICES)
    operands.optional("num_rows", num_rows, "G", INDICES)
    operands.optional("bias", bias, "G 2I", FLOATS)
    operands.optional("row_weight", row_weight, rows, (torch.float32,))
    check(limit is None or limit > 0, OP, "limit", "positive or None", limit, "None does not clamp")
    check(alpha is not None or up_bias == 0, OP, "up_bias", "0 without alpha", up_bias, "pass alpha too")
    check_rows_hint(OP, rows_hint)
    x_values, x_sf, x_group = split_tokens(x)
    codes = x_values.new_empty(*x_values.shape[:-1], num_features, dtype=torch.float8_e4m3fn)
    sf = x_values.new_empty(*x_values.shape[:-1], num_features // ACT_GROUP, dtype=torch.uint8)
    torch.ops.megamoe.grouped_gemm_swiglu(
        x_values, x_sf, x_group, *split_weight(w), expert_idx, offsets, num_rows, bias, row_weight, limit, alpha, up_bias, rows_hint,
        codes, sf)
    return QuantizedTokens(codes, sf, ACT_GROUP)


def _launch(x, x_sf, x_group, w, w_scales, expert_idx, offsets, num_rows, bias, row_weight, limit, alpha, up_bias, rows_hint, codes,
            sf) -> None:
    tokens, grouping = join_tokens(x, x_sf, x_group), {"expert_idx": expert_idx, "offsets": offsets, "num_rows": num_rows}
    act = QuantizedTokens(codes, sf, ACT_GROUP)
    if not packed.is_packed(w):
        weight = join_weight(w, w_scales)
    else:
        weight = Sm90Weight(w, w_scales, torch.Size((w.shape[0], 2 * codes.shape[-1], x.shape[-1])), interleaved=True)
        if packed.runs_kernel(x.device):
            bias = None if bias is None else gate_up.interleave(bias.float(), dim=1)
            return packed.multiply(
                OP, tokens, weight, "swiglu", **grouping, rows_hint=rows_hint, act=act, bias=bias,
                row_weight=None if row_weight is None else row_weight.flatten(), limit=math.inf if limit is None else limit,
                alpha=1.0 if alpha is None else alpha, up_bias=up_bias)
        tokens, weight = packed.twin_operands(tokens, weight)
    check_grouping(OP, **grouping, num_groups=w.shape[0], max_rows=x.shape[-2])
    reference.grouped_gemm_swiglu(
        tokens, weight, **grouping, bias=bias, row_weight=row_weight, limit=limit, alpha=alpha, up_bias=up_bias, out=act)


register(
    "grouped_gemm_swiglu(Tensor x, Tensor? x_sf, int x_group, Tensor w, Tensor w_scales, Tensor? expert_idx, Tensor? offsets, "
    "Tensor? num_rows, Tensor? bias, Tensor? row_weight, float? limit, float? alpha, float up_bias, int? rows_hint, "
    "Tensor(a!) codes, Tensor(b!) sf) -> ()",
    _launch,
)
