"""FP4 weights as the sm_100 block-scaled MMA reads them: canonical FP4Weight [E, N, K] <-> Sm100Weight."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.formats import gate_up
from megamoe.formats.checks import require
from megamoe.formats.fp4_weight import GROUP, FP4Weight

SCALES_PER_WORD = 4
ROW_ALIGNMENT = 4  # int32 rows of 16 bytes, as TMA asks


@dataclass(frozen=True, eq=False)
class Sm100Weight:
    """FP4 weights with packed scales.

    Args:
        codes: [E, N, K/2] uint8, low nibble = even index along K, kernel row order.
        scales: [E, ceil(K/128), N_aligned4] int32: four UE8M0 bytes along K per word, lowest K group in the low byte; consecutive words
            are consecutive rows. Padding is 0.
        interleaved: kernel rows are slabs of 8 gate rows and the 8 matching up rows.
    """

    codes: Tensor
    scales: Tensor
    interleaved: bool

    @property
    def shape(self) -> torch.Size:
        """The logical shape (E, N, K)."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device | str) -> "Sm100Weight":
        return Sm100Weight(self.codes.to(device), self.scales.to(device), self.interleaved)

    def unpack(self) -> FP4Weight:
        """The canonical weight, exactly."""
        _, n, k = self.shape
        scales = self.scales.transpose(1, 2).contiguous().view(torch.uint8)[:, :n, : k // GROUP]  # [E, N, K/32]
        if not self.interleaved:
            return FP4Weight(self.codes, scales.contiguous(), check_nan=False)
        return FP4Weight(gate_up.deinterleave(self.codes, dim=1), gate_up.deinterleave(scales, dim=1), check_nan=False)


def pack(weight: FP4Weight, interleave_gate_up: bool) -> Sm100Weight:
    """Bring weights into the order of the sm_100 main loop.

    Args:
        weight: [E, N, K].
        interleave_gate_up: N = 2I rows are I gate rows, then I up rows, and are interleaved by 8.

    Returns:
        Sm100Weight on the same device; `unpack()` is the inverse.

    Raises:
        FormatError: the shape does not fit.
    """
    op = "layout_sm100.pack"
    require(len(weight.shape) == 3, op, "weight", "[E, N, K]", list(weight.shape), "add a leading expert dim")
    codes, scales = weight.codes, weight.scales
    if interleave_gate_up:
        gate_up.require_rows(op, weight.shape[1])
        codes, scales = gate_up.interleave(codes, dim=1), gate_up.interleave(scales, dim=1)
    num_rows, num_groups = scales.shape[1:]
    scales = F.pad(scales, (0, -num_groups % SCALES_PER_WORD, 0, -num_rows % ROW_ALIGNMENT)).contiguous()
    words = scales.view(torch.int32).transpose(1, 2).contiguous()  # [E, ceil(K/128), N_aligned4]
    return Sm100Weight(codes, words, interleave_gate_up)
