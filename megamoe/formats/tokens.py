"""FP8 activations: E4M3 codes with one UE8M0 scale per group of channels, or per token.

Shapes: `K` channels of a token; the last group of a token may be short.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.errors import check
from megamoe.formats import fp8, ue8m0

GROUPS = (32, 64, 96, 128, "token")
MIN_AMAX = 1e-4  # keeps the scale of a zero or tiny group in a range whose reciprocal every kernel can hold


def num_groups(num_channels: int, group: int | str) -> int:
    """Scales per token of `num_channels` channels. Raises ValueError for a group not in GROUPS."""
    check(group in GROUPS, "quantize_tokens", "group", f"one of {GROUPS}", repr(group), "pick one of them")
    return 1 if group == "token" else -(-num_channels // group)


@dataclass(frozen=True, eq=False)
class QuantizedTokens:
    """Quantised tokens: value = codes * 2^(sf - 127) of the channel's group.

    Args:
        codes: [..., K] float8_e4m3fn.
        sf: [..., ceil(K/group)] uint8, UE8M0.
        group: channels per scale, or "token" for one scale per token.

    Raises:
        ValueError: a dtype, the shape of `sf` or the group is wrong.
    """

    codes: Tensor
    sf: Tensor
    group: int | str

    def __post_init__(self):
        sf_shape = [*self.codes.shape[:-1], num_groups(self.codes.shape[-1], self.group)]
        for what, tensor, dtype in (("codes", self.codes, torch.float8_e4m3fn), ("sf", self.sf, torch.uint8)):
            check(tensor.dtype == dtype, "QuantizedTokens", f"{what} dtype", dtype, tensor.dtype, "use quantize_tokens")
        check(list(self.sf.shape) == sf_shape, "QuantizedTokens", "sf shape", sf_shape, list(self.sf.shape), "use quantize_tokens")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self) -> Tensor:
        """The values, [..., K] float32, exact."""
        width = self.shape[-1] if self.group == "token" else self.group
        scale = ue8m0.decode(self.sf).repeat_interleave(width, dim=-1)[..., : self.shape[-1]]
        return self.codes.float() * scale


def quantize_tokens(x: Tensor, group: int | str = 32) -> QuantizedTokens:
    """Quantise tokens to E4M3, each group with the smallest power-of-two scale that keeps it below 448.

    A NaN or Inf channel becomes NaN and leaves every other channel as it would be without it. Zero rows stay exact zeros.

    Args:
        x: [..., K] bfloat16, float16 or float32.
        group: channels per scale: 32, 64, 96, 128 or "token".

    Returns:
        QuantizedTokens; scale = 2^ceil(log2(max(amax, 1e-4) / 448)), codes rounded to nearest even.

    Raises:
        ValueError: `group` is none of these.
    """
    num_channels, count = x.shape[-1], num_groups(x.shape[-1], group)
    width = num_channels if group == "token" else group
    grouped = F.pad(x.float(), (0, count * width - num_channels)).unflatten(-1, (count, width))  # [..., groups, width]
    finite = grouped.isfinite()
    amax = grouped.abs().masked_fill(~finite, 0.0).amax(dim=-1).clamp(min=MIN_AMAX)
    sf = ue8m0.encode_ceil(amax, fp8.E4M3_MAX)  # [..., groups]
    # E4M3fn has no Inf: as NaN it cannot pass for 448.
    scaled = (grouped * ue8m0.decode_reciprocal(sf).unsqueeze(-1)).masked_fill(~finite, torch.nan)
    return QuantizedTokens(fp8.encode_e4m3(scaled).flatten(-2)[..., :num_channels].contiguous(), sf, group)
