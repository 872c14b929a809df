"""E2M1 (FP4): sign, 2 exponent bits, 1 mantissa bit. Codes 0..7 are 0 .5 1 1.5 2 3 4 6, bit 3 is the sign.

FP4 is held as uint8, two codes per byte, low nibble = even index along K (OCP MX, gpt-oss, DeepSeek).
"""

import torch
from torch import Tensor

from megamoe.formats.checks import require

MAX = 6.0


def _upper_bounds() -> tuple[float, ...]:
    """The largest float32 that still rounds to each of codes 0..6.

    A tie goes to the even code: midpoints above an even code belong to it, those above an odd one start at the next code.
    """
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    midpoints[1::2] = midpoints[1::2].nextafter(torch.zeros(3))
    return tuple(midpoints.tolist())


_UPPER_BOUNDS = _upper_bounds()
# A code shifted into an E5M2 byte (sign to bit 7, magnitude to bits 3..1) is value * 2^-14 exactly, the denormal 0.5 included.
_FROM_E5M2 = 2.0**14


def decode(codes: Tensor) -> Tensor:
    """Values of unpacked E2M1 codes.

    Args:
        codes: [...] uint8, 0..15.

    Returns:
        [...] float32; code 8 is -0.
    """
    e5m2 = (codes & 8) << 4 | (codes & 7) << 1
    return e5m2.view(torch.float8_e5m2).float() * _FROM_E5M2


def encode(values: Tensor) -> Tensor:
    """Codes of the nearest E2M1 values: ties to the even code, magnitudes above 6 to 6.

    Args:
        values: [...] float32, no NaN.

    Returns:
        [...] uint8, 0..15.
    """
    bounds = values.new_tensor(_UPPER_BOUNDS, dtype=torch.float32)
    magnitude = torch.bucketize(values.float().abs(), bounds, out_int32=True).to(torch.uint8)
    return magnitude | values.signbit().to(torch.uint8) << 3


def pack(codes: Tensor) -> Tensor:
    """Two codes per byte: [..., K] uint8 0..15 -> [..., K/2] uint8. Raises FormatError for odd K."""
    require(codes.shape[-1] % 2 == 0, "e2m1.pack", "K", "even", codes.shape[-1], "pad K with zeros to a multiple of 32")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`: [..., K/2] uint8 -> [..., K] uint8, 0..15."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
