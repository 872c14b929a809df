"""UE8M0: one byte e is the scale 2^(e-127); 255 is NaN and is refused wherever scales are loaded.

Scales are rounded up with integer arithmetic on FP32 bits: torch's own e8m0 cast rounds half up, and a division by a constant may
round differently on CPU and GPU.
"""

import struct

import torch
from torch import Tensor

NAN = 255
MAX = 254
_MANTISSA_MASK = (1 << 23) - 1
_BITS_OF_MIN = 1 << 22  # 2^-127 as FP32, a denormal


def encode_ceil(values: Tensor, largest: float = 1.0) -> Tensor:
    """The smallest scale s, a power of two, with values <= s * largest, exactly.

    Args:
        values: [...] float32, finite and >= 0. Zero takes the smallest scale.
        largest: largest value of the element format that will be scaled (448, 6), >= 1.

    Returns:
        [...] uint8 in 0..254; saturates at both ends.
    """
    bits = values.view(torch.int32)
    (largest_bits,) = struct.unpack("<i", struct.pack("<f", largest))
    # Positive floats are ordered like their bits, so this is a division by 2^23 rounded up: the mantissa's excess carries once.
    exponent = 127 + ((bits - largest_bits + _MANTISSA_MASK) >> 23)
    return exponent.masked_fill(bits <= _BITS_OF_MIN, 0).clamp(0, MAX).to(torch.uint8)


def decode(scales: Tensor) -> Tensor:
    """Values of scale bytes: [...] uint8 -> [...] float32, exact; 255 gives NaN."""
    return scales.view(torch.float8_e8m0fnu).float()


def decode_reciprocal(scales: Tensor) -> Tensor:
    """1 / scale, exact: [...] uint8 in 0..254 -> [...] float32."""
    return decode(MAX - scales)
