"""Plain-torch twin of megamoe.grouped_gemm. Inputs are checked in kernels/grouped_gemm.py.

Legend: M rows, G groups, N output features, K input features.
"""

from collections.abc import Iterator

import torch

from megamoe.reference.gemm import Tokens, Weight, result_dtype, token_values, weight_values


def grouped_gemm(
    x: Tokens,
    w: Weight,
    *,
    expert_idx: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """See megamoe.grouped_gemm."""
    values = token_values(x, w)  # [M, K] or [G, Mmax, K] float32
    num_features = w.shape[1]
    if out is None:
        out = values.new_empty(*values.shape[:-1], num_features, dtype=result_dtype(x, w))
    if not accumulate:
        out.zero_()
    flat_values, flat_out = values.flatten(0, -2), out.view(-1, num_features)
    for group, rows in rows_of_groups(expert_idx, offsets, num_rows, values.shape[-2]):
        product = flat_values[rows] @ weight_values(w[group]).T  # [rows, N] float32
        if bias is not None:
            product += bias[group].float()
        flat_out[rows] = (flat_out[rows].float() + product).to(out.dtype)
    return out


def rows_of_groups(
    expert_idx: torch.Tensor | None, offsets: torch.Tensor | None, num_rows: torch.Tensor | None, max_rows: int
) -> Iterator[tuple[int, slice | torch.Tensor]]:
    """Yield (group, its rows) for the groups that have any; masked rows count through as if [G, Mmax] were one dimension."""
    if expert_idx is not None:
        for group in expert_idx[expert_idx >= 0].unique().tolist():
            yield group, torch.where(expert_idx == group)[0]
        return
    if offsets is not None:
        bounds = offsets.tolist()
        spans = zip(bounds, bounds[1:])
    else:
        spans = ((group * max_rows, group * max_rows + count) for group, count in enumerate(num_rows.tolist()))
    for group, (begin, end) in enumerate(spans):
        if begin < end:
            yield group, slice(begin, end)
