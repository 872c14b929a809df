"""Plain-torch twin of kernels/fold_tokens.py. Legend: K channels."""

import torch

from megamoe.formats import QuantizedTokens, fp8


def fold_tokens(x: QuantizedTokens) -> QuantizedTokens:
    """Give each token [..., K] one scale, the largest of its groups; codes are shifted, rounded to nearest even; NaN stays NaN."""
    if x.group == "token":
        return x
    token_sf = x.sf.amax(dim=-1, keepdim=True)  # [..., 1]
    shift = (token_sf.int() - x.sf.int()).repeat_interleave(x.group, dim=-1)[..., : x.shape[-1]]
    codes = fp8.encode_e4m3(torch.ldexp(x.codes.float(), -shift))
    return QuantizedTokens(codes, token_sf, "token")
