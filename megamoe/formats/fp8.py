"""E4M3 (fn: max 448, no Inf) and E5M2 (max 57344) casts that saturate alike in every torch version. NaN stays NaN."""

import torch
from torch import Tensor

E4M3_MAX = 448.0
E5M2_MAX = 57344.0


def encode_e4m3(values: Tensor) -> Tensor:
    """Round [...] float32 to the nearest float8_e4m3fn, ties to even; magnitudes above 448, Inf included, become 448."""
    # torch 2.13 saturates in the cast, 2.11 gives NaN.
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def encode_e5m2(values: Tensor) -> Tensor:
    """Round [...] float32 to the nearest float8_e5m2, ties to even; magnitudes above 57344, Inf included, become 57344."""
    return values.clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2)
