"""Plain-torch twin of megamoe.k_grouped_gemm. Inputs are checked in kernels/k_grouped_gemm.py."""

import torch


def k_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """See megamoe.k_grouped_gemm."""
    bounds = offsets.tolist()
    if out is None:
        out = a.new_empty(len(bounds) - 1, a.shape[1], b.shape[1], dtype=torch.float32)
    if not accumulate:
        out.zero_()
    for group, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        out[group] += a[begin:end].float().T @ b[begin:end].float()
    return out
