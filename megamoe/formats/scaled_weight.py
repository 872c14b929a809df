"""ScaledWeight: what FP4Weight and FP8Weight share, two tensors `codes` and `scales` that are moved and indexed together.

The subclass is a frozen dataclass of (codes, scales, check_nan) and defines the logical `shape` [..., N, K].
"""

from typing import Self

import torch
from torch import Tensor

from megamoe.formats.checks import require


class ScaledWeight:
    codes: Tensor
    scales: Tensor

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def __getitem__(self, index: int | slice | Tensor) -> Self:
        """The weights of one or several experts (views, where indexing a tensor gives views)."""
        op = type(self).__name__
        require(self.codes.dim() > 2, op, "an indexed weight", "[E, N, K]", list(self.shape), "slice rows after dequantize()")
        return type(self)(self.codes[index], self.scales[index], check_nan=False)

    def to(self, device: torch.device | str) -> Self:
        return type(self)(self.codes.to(device), self.scales.to(device), check_nan=False)
