"""FP4Weight: E2M1 codes with one UE8M0 scale per 32 weights along K (MXFP4), and the quantiser that makes them.

Shapes: `N` output rows, `K` input channels; leading dims are experts.
"""

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from megamoe.formats import e2m1, ue8m0
from megamoe.formats.checks import matrices, require, require_no_nan_scale, require_weights
from megamoe.formats.scaled_weight import ScaledWeight

GROUP = 32
ZERO_GROUP_SCALE = 0  # the one scale byte of an all-zero group: what the quantiser writes and every layout inverse restores

_NVFP4_FIX = "convert NVFP4 to MXFP4 first (dequantise with its scale per tensor, then quantize_fp4)"


@dataclass(frozen=True, eq=False)
class FP4Weight(ScaledWeight):
    """FP4 weights [..., N, K]: value = E2M1 * 2^(scale - 127) of the group of 32 along K.

    Args:
        codes: [..., N, K/2] uint8, two codes per byte, low nibble = even index along K; int8 and float4_e2m1fn_x2 are viewed as uint8.
        scales: [..., N, K/32] uint8, UE8M0; float8_e8m0fnu is viewed as uint8.
        check_nan: refuse scales of 255 (reads the device). Off only where the scales are part of a weight already checked.

    Raises:
        FormatError: a dtype or shape is wrong, K is not a multiple of 32, a scale is NaN, or the input looks like NVFP4.
    """

    codes: Tensor
    scales: Tensor
    check_nan: InitVar[bool] = True

    def __post_init__(self, check_nan: bool):
        _check_dtypes(self.codes, self.scales)
        object.__setattr__(self, "codes", self.codes.view(torch.uint8))
        object.__setattr__(self, "scales", self.scales.view(torch.uint8))
        _check_shapes(self.codes, self.scales)
        if check_nan:
            require_no_nan_scale("FP4Weight", self.scales)

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., N, K]."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [..., N, K] of `dtype`; exact in float32 and bfloat16 up to their overflow."""
        values = e2m1.decode(e2m1.unpack(self.codes)).unflatten(-1, (-1, GROUP))  # [..., N, K/32, 32]
        return (values * ue8m0.decode(self.scales).unsqueeze(-1)).flatten(-2).to(dtype)


def _check_dtypes(codes: Tensor, scales: Tensor) -> None:
    op = "FP4Weight"
    require(scales.dtype != torch.float8_e4m3fn, op, "scales", "UE8M0 bytes per 32 weights",
            "float8_e4m3fn, which looks like NVFP4", _NVFP4_FIX)
    require(codes.dtype in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2), op, "codes dtype", "uint8", codes.dtype,
            "pass packed codes, or quantise with quantize_fp4")
    require(scales.dtype in (torch.uint8, torch.float8_e8m0fnu), op, "scales dtype", "uint8", scales.dtype,
            "pass UE8M0 bytes, or quantise with quantize_fp4")


def _check_shapes(codes: Tensor, scales: Tensor) -> None:
    op, k = "FP4Weight", 2 * codes.shape[-1]
    require(codes.dim() >= 2, op, "codes", "[..., N, K/2]", list(codes.shape), "pass at least one matrix")
    require(k > 0 and k % GROUP == 0, op, "K", f"a positive multiple of {GROUP}", k, "pad K with zeros")
    got, expected = list(scales.shape), [*codes.shape[:-1], k // GROUP]
    require(got != [*codes.shape[:-1], k // 16], op, "scales shape", expected,
            f"{got}, one per 16 weights, which looks like NVFP4", _NVFP4_FIX)
    require(got == expected, op, "scales shape", expected, got, "pass one scale per row and 32 weights")
    require(scales.device == codes.device, op, "scales device", codes.device, scales.device, "move both to one device")


def quantize_fp4(w: Tensor) -> FP4Weight:
    """Quantise weights to FP4, each group of 32 along K with the smallest power-of-two scale that keeps it below 6.

    Args:
        w: [..., N, K] bfloat16, float16 or float32, finite, K a multiple of 32.

    Returns:
        FP4Weight; scale = 2^ceil(log2(amax / 6)), codes rounded to nearest, ties to the even code.

    Raises:
        FormatError: a weight is NaN or Inf, or the dtype or shape is wrong.

    Sync: reads the device.
    """
    require_weights("quantize_fp4", w)
    *rows, k = w.shape
    require(k > 0 and k % GROUP == 0, "quantize_fp4", "K", f"a positive multiple of {GROUP}", k, "pad K with zeros")
    codes = torch.empty(*rows, k // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*rows, k // GROUP, dtype=torch.uint8, device=w.device)
    for matrix, codes_out, scales_out in zip(matrices(w), matrices(codes), matrices(scales), strict=True):
        groups = matrix.float().unflatten(-1, (-1, GROUP))  # [N, K/32, 32]
        scale = ue8m0.encode_ceil(groups.abs().amax(dim=-1), e2m1.MAX)
        scaled = groups * ue8m0.decode_reciprocal(scale).unsqueeze(-1)
        codes_out.copy_(e2m1.pack(e2m1.encode(scaled).flatten(-2)))
        scales_out.copy_(scale)
    return FP4Weight(codes, scales, check_nan=False)
