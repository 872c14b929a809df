"""FP8Weight: E4M3 codes with one scale per 128 x 128 block, UE8M0 (our quantiser) or FP32 (as DeepSeek-V3 ships them).

Shapes: `N` output rows, `K` input channels; leading dims are experts. Blocks at the right and lower edge may be short.
"""

from dataclasses import InitVar, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.formats import fp8, ue8m0
from megamoe.formats.checks import matrices, require, require_no_nan_scale, require_weights
from megamoe.formats.scaled_weight import ScaledWeight

BLOCK = 128


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK)


@dataclass(frozen=True, eq=False)
class FP8Weight(ScaledWeight):
    """FP8 weights [..., N, K]: value = E4M3 * scale of the 128 x 128 block.

    Args:
        codes: [..., N, K] float8_e4m3fn.
        scales: [..., ceil(N/128), ceil(K/128)] uint8 (UE8M0; float8_e8m0fnu is viewed as uint8) or float32.
        check_nan: refuse NaN and Inf scales (reads the device). Off only where the scales are part of a weight already checked.

    Raises:
        FormatError: a dtype or shape is wrong, or a scale is NaN or Inf.
    """

    codes: Tensor
    scales: Tensor
    check_nan: InitVar[bool] = True

    def __post_init__(self, check_nan: bool):
        op = "FP8Weight"
        codes, scales = self.codes, self.scales
        require(codes.dtype == torch.float8_e4m3fn, op, "codes dtype", torch.float8_e4m3fn, codes.dtype, "quantise with quantize_fp8")
        require(codes.dim() >= 2, op, "codes", "[..., N, K]", list(codes.shape), "pass at least one matrix")
        if scales.dtype == torch.float8_e8m0fnu:
            scales = scales.view(torch.uint8)
            object.__setattr__(self, "scales", scales)
        require(scales.dtype in (torch.uint8, torch.float32), op, "scales dtype", "uint8 (UE8M0) or float32", scales.dtype, "cast them")
        *lead, n, k = codes.shape
        expected = [*lead, _num_blocks(n), _num_blocks(k)]
        require(list(scales.shape) == expected, op, "scales shape", expected, list(scales.shape), "pass one scale per 128 x 128 block")
        require(scales.device == codes.device, op, "scales device", codes.device, scales.device, "move both to one device")
        if check_nan:
            _require_finite(scales)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [..., N, K] of `dtype`, computed in float32."""
        scales = ue8m0.decode(self.scales) if self.scales.dtype == torch.uint8 else self.scales
        return (self.codes.float() * _expand(scales, self.shape)).to(dtype)


def _require_finite(scales: Tensor) -> None:
    if scales.dtype == torch.uint8:
        require_no_nan_scale("FP8Weight", scales)
    else:
        require(bool(scales.isfinite().all()), "FP8Weight", "scales", "finite", "NaN or Inf", "repair the checkpoint")


def _expand(scales: Tensor, shape: torch.Size) -> Tensor:
    """One scale per block -> one per element of `shape` [..., N, K]."""
    n, k = shape[-2:]
    return scales.repeat_interleave(BLOCK, dim=-2)[..., :n, :].repeat_interleave(BLOCK, dim=-1)[..., :k]


def quantize_fp8(w: Tensor) -> FP8Weight:
    """Quantise weights to E4M3, each 128 x 128 block with the smallest power-of-two scale that keeps it below 448.

    Args:
        w: [..., N, K] bfloat16, float16 or float32, finite.

    Returns:
        FP8Weight with UE8M0 scales; scale = 2^ceil(log2(amax / 448)), codes rounded to nearest even.

    Raises:
        FormatError: a weight is NaN or Inf, or the dtype or shape is wrong.

    Sync: reads the device.
    """
    require_weights("quantize_fp8", w)
    *lead, n, k = w.shape
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty(*lead, _num_blocks(n), _num_blocks(k), dtype=torch.uint8, device=w.device)
    for matrix, codes_out, scales_out in zip(matrices(w), matrices(codes), matrices(scales), strict=True):
        matrix = matrix.float()
        blocks = F.pad(matrix, (0, -k % BLOCK, 0, -n % BLOCK)).unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))  # [n, 128, k, 128]
        scale = ue8m0.encode_ceil(blocks.abs().amax(dim=(-3, -1)), fp8.E4M3_MAX)
        codes_out.copy_(fp8.encode_e4m3(matrix * _expand(ue8m0.decode_reciprocal(scale), matrix.shape)))
        scales_out.copy_(scale)
    return FP8Weight(codes, scales, check_nan=False)
