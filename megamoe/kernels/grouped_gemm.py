"""megamoe.grouped_gemm: rows in groups, one weight per group. fp4_gemm for an Sm90Weight on Hopper, else its plain-torch twin.

Legend: M rows, G groups, N output features, K input features.
"""

import torch

from megamoe.errors import check
from megamoe.formats import Sm90Weight
from megamoe.kernels import packed
from megamoe.kernels.library import (
    FLOATS,
    INDICES,
    Operands,
    check_offsets,
    join_tokens,
    join_weight,
    register,
    split_tokens,
    split_weight,
)
from megamoe.reference import grouped_gemm as reference
from megamoe.reference.gemm import Tokens, Weight, result_dtype

OP = "grouped_gemm"


def grouped_gemm(
    x: Tokens,
    w: Weight | Sm90Weight,
    *,
    expert_idx: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    rows_hint: int | None = None,
) -> torch.Tensor:
    """Compute x[row] @ w[g].T + bias[g] for every row of every group g, with FP32 accumulation. Pass exactly one of the three groupings.

    Args:
        x: [M, K], or [G, Mmax, K] with num_rows; BF16, FP32, or QuantizedTokens with group 32, 128 or "token".
        w: [G, N, K] FP4Weight, FP8Weight, BF16 or FP32, or an Sm90Weight that is not interleaved, N a multiple of 32; x is quantised
            against it as in `gemm`. Only an Sm90Weight runs the kernel: pack once with `formats.layout_sm90.pack`.
        expert_idx: [M] int32 or int64, the group of each row; -1 marks a padding row. The kernel needs the rows of a group together, the
            plain-torch twin takes any order.
        offsets: [G+1] int32 or int64 from 0, non-decreasing: group g owns rows offsets[g]:offsets[g+1]; rows past the last are padding.
        num_rows: [G] int32 or int64: group g owns the first num_rows[g] rows of x[g]; the rest are padding.
        bias: [G, N] BF16 or FP32.
        out: [M, N] or [G, Mmax, N] BF16 or FP32 (an Sm90Weight: BF16), takes the result, rounded to its dtype. None: a new tensor, FP32
            if x and w are FP32 tensors, else BF16.
        accumulate: add the result to `out`, rounding once; padding rows keep their values.
        rows_hint: expected rows per group, for the speed of the kernel only. None: the rows of x divided by G.

    Returns:
        [M, N] or [G, Mmax, N], `out` if given. Padding rows are zero, except that the kernel leaves those of offsets and num_rows as they
        are in `out`, undefined in a new tensor.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, is not contiguous or requires grad; none or several groupings are
            given, or one has values out of range (the kernel finds these later: see Sync); or accumulate without out.

    Sync: with an Sm90Weight on Hopper stream-ordered, no host sync, CUDA-graph safe once the kernels are loaded; values of the grouping
    that are out of range are treated as padding and raise at the next op or in `megamoe.check`. Otherwise reads the grouping on the host.
    """
    given = [name for name, value in (("expert_idx", expert_idx), ("offsets", offsets), ("num_rows", num_rows)) if value is not None]
    check(len(given) == 1, OP, "grouping", "exactly one of expert_idx, offsets and num_rows", given or None, "pass one of them")
    rows = "M" if num_rows is None else "G Mmax"
    operands = Operands(OP)
    operands.tokens("x", x, f"{rows} K")
    operands.weight("w", w, "G N K")
    operands.sizes["G+1"] = operands.sizes["G"] + 1
    operands.optional("expert_idx", expert_idx, "M", INDICES)
    operands.optional("offsets", offsets, "G+1", INDICES)
    operands.optional("num_rows", num_rows, "G", INDICES)
    operands.optional("bias", bias, "G N", FLOATS)
    operands.out(out, f"{rows} N", (torch.bfloat16,) if isinstance(w, Sm90Weight) else FLOATS, accumulate)
    check_rows_hint(OP, rows_hint)
    x_values, x_sf, x_group = split_tokens(x)
    w_values, w_scales = split_weight(w)
    if out is None:
        out = x_values.new_empty(*x_values.shape[:-1], operands.sizes["N"], dtype=result_dtype(x, w))
    torch.ops.megamoe.grouped_gemm(
        x_values, x_sf, x_group, w_values, w_scales, expert_idx, offsets, num_rows, bias, out, accumulate, rows_hint)
    return out


def check_rows_hint(op: str, rows_hint: int | None) -> None:
    check(rows_hint is None or rows_hint >= 0, op, "rows_hint", "at least 0", rows_hint, "pass the expected rows per group")


def _launch(x, x_sf, x_group, w, w_scales, expert_idx, offsets, num_rows, bias, out, accumulate, rows_hint=None) -> None:
    tokens, grouping = join_tokens(x, x_sf, x_group), {"expert_idx": expert_idx, "offsets": offsets, "num_rows": num_rows}
    if not packed.is_packed(w):
        weight = join_weight(w, w_scales)
    else:
        weight = Sm90Weight(w, w_scales, torch.Size((w.shape[0], out.shape[-1], x.shape[-1])), interleaved=False)
        if packed.runs_kernel(x.device):
            epilogue = "accumulate" if accumulate else "store"
            return packed.multiply(OP, tokens, weight, epilogue, **grouping, rows_hint=rows_hint, out=out, bias=bias)
        tokens, weight = packed.twin_operands(tokens, weight)
    # Values are checked here and not in the public function: they are data, which a compiled graph cannot branch on.
    check_grouping(OP, **grouping, num_groups=w.shape[0], max_rows=x.shape[-2])
    reference.grouped_gemm(tokens, weight, **grouping, bias=bias, out=out, accumulate=accumulate)


def check_grouping(
    op: str, *, expert_idx: torch.Tensor | None, offsets: torch.Tensor | None, num_rows: torch.Tensor | None, num_groups: int, max_rows: int
) -> None:
    """Raise ValueError for values out of range. Sync: reads the grouping on the host."""
    if offsets is not None:
        return check_offsets(op, offsets, max_rows)
    if expert_idx is not None:
        what, values, smallest, largest, fix = "expert_idx", expert_idx, -1, num_groups - 1, "-1 marks a padding row"
    else:
        what, values, smallest, largest, fix = "num_rows", num_rows, 0, max_rows, "a group has at most Mmax rows"
    wrong = torch.where((values < smallest) | (values > largest))[0].tolist()
    if wrong:
        check(False, op, f"{what}[{wrong[0]}]", f"in [{smallest}, {largest}]", values[wrong[0]].item(), fix)


register(
    "grouped_gemm(Tensor x, Tensor? x_sf, int x_group, Tensor w, Tensor? w_scales, Tensor? expert_idx, Tensor? offsets, Tensor? num_rows, "
    "Tensor? bias, Tensor(a!) out, bool accumulate, int? rows_hint=None) -> ()",
    _launch,
)
