"""Plain-torch twins of megamoe.permute_tokens and unpermute_tokens. Inputs are checked in kernels/permute.py.

Legend: T tokens, K top-k slots, M source rows, R rows in expert order, H hidden.
"""

import torch


def permute_tokens(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """See megamoe.permute_tokens."""
    as_bytes = rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows  # there is no indexing of FP8 on some versions
    if not len(rows):
        return rows.new_zeros(len(index), rows.shape[1])
    picked = as_bytes[index.clamp(min=0)].masked_fill(index[:, None] < 0, 0)  # [R, H]
    return picked.view(rows.dtype)


def unpermute_tokens(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """See megamoe.unpermute_tokens. Slots are added in order, each product rounded before it is added."""
    sums = torch.zeros(len(index), rows.shape[1], dtype=torch.float32, device=rows.device)  # [T, H]
    for slot in range(index.shape[1] if len(rows) else 0):
        row = index[:, slot]
        terms = rows[row.clamp(min=0)].float()
        if weights is not None:
            terms = terms * weights[:, slot, None]
        sums += terms.masked_fill(row[:, None] < 0, 0.0)
    return sums.to(rows.dtype)
