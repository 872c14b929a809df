"""FP4State: the weight of an FP4 module, canonical wherever it is stored, in kernel layout where the kernel runs. Never both on one device.

Legend: N output rows, K input channels; leading dims are groups.
"""

import torch
from torch import nn

from megamoe.errors import check
from megamoe.formats import FP4Weight, Sm90Weight, layout_sm90
from megamoe.formats.fp4_weight import GROUP
from megamoe.kernels import packed


class FP4State(nn.Module):
    """Base of modules with one FP4 weight [N, K] or [G, N, K]: buffers `codes` and `scales`, or once packed `blocks` and `row_base`.

    On Hopper the first forward packs the weight and frees the canonical buffers, which are None from then on. state_dict always has `codes`
    and `scales`; loading one restores them. Under torch.compile the plain-torch twin runs unless a forward or `pack_weight` came before.

    Args:
        shape: [N, K] or [G, N, K], K a multiple of 32.
        device: where the buffers live.

    Raises:
        ValueError: K is not a multiple of 32.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str | None):
        super().__init__()
        *rows, k = shape
        check(k % GROUP == 0, type(self).__name__, "in_features", f"a multiple of {GROUP}", k, "pad it with zeros")
        self._shape = torch.Size(shape)
        self.register_buffer("codes", torch.zeros(*rows, k // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(*rows, k // GROUP, dtype=torch.uint8, device=device))
        self.register_buffer("blocks", None, persistent=False)
        self.register_buffer("row_base", None, persistent=False)

    @property
    def weight(self) -> FP4Weight | Sm90Weight:
        """What the GEMM takes. Sync: the first use on Hopper packs, which reads the device."""
        may_pack = self.blocks is None and not torch.compiler.is_compiling() and self._shape[-2] % 32 == 0
        if may_pack and packed.runs_kernel(self.codes.device):
            self.pack_weight()
        if self.blocks is None:
            return FP4Weight(self.codes, self.scales, check_nan=False)
        return Sm90Weight(self.blocks, self.row_base, torch.Size((1, *self._shape)[-3:]), interleaved=False)

    def pack_weight(self) -> None:
        """Replace the canonical buffers by the kernel layout; nothing if that was done. Raises FormatError as `layout_sm90.pack` does."""
        if self.blocks is None:
            codes, scales = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (self.codes, self.scales))
            canonical = FP4Weight(codes, scales, check_nan=False)
            weight = layout_sm90.pack(canonical, interleave_gate_up=False)
            self.blocks, self.row_base, self.codes, self.scales = weight.blocks, weight.row_base, None, None

    def _canonical(self) -> FP4Weight:
        if self.blocks is None:
            return FP4Weight(self.codes, self.scales, check_nan=False)
        weight = self.weight.unpack()
        return FP4Weight(weight.codes.view(*self._shape[:-1], -1), weight.scales.view(*self._shape[:-1], -1), check_nan=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.blocks is not None:
            weight = self._canonical()
            destination[prefix + "codes"], destination[prefix + "scales"] = weight.codes, weight.scales

    def _load_from_state_dict(self, *args):
        if self.blocks is not None:
            # With the values they had, so that a state_dict that lacks one of them changes nothing else.
            weight = self._canonical()
            self.codes, self.scales, self.blocks, self.row_base = weight.codes, weight.scales, None, None
        super()._load_from_state_dict(*args)
