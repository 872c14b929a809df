"""Plain-torch twin of megamoe.gemm, and what quantised operands are worth in FP32. Inputs are checked in kernels/gemm.py.

Legend: M rows, N output features, K input features.
"""

import torch

from megamoe.formats import FP4Weight, FP8Weight, QuantizedTokens, quantize_tokens

Tokens = torch.Tensor | QuantizedTokens
Weight = torch.Tensor | FP4Weight | FP8Weight


def gemm(
    x: Tokens,
    w: Weight,
    *,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """See megamoe.gemm."""
    product = token_values(x, w) @ weight_values(w).T  # [M, N] float32
    if bias is not None:
        product += bias.float()
    if out is None:
        return product.to(result_dtype(x, w))
    return out.copy_(product + out.float() if accumulate else product)


def token_values(x: Tokens, w: Weight) -> torch.Tensor:
    """x [..., K] float32 as the GEMM reads it: against a quantised weight plain tokens are quantised first."""
    if isinstance(x, QuantizedTokens):
        return x.dequantize()
    if isinstance(w, FP4Weight):
        return quantize_tokens(x, group=32).dequantize()
    if isinstance(w, FP8Weight):
        return quantize_tokens(x, group=128).dequantize()
    return x.float()


def weight_values(w: Weight) -> torch.Tensor:
    """w [..., N, K] float32."""
    return w.float() if isinstance(w, torch.Tensor) else w.dequantize()


def result_dtype(x: Tokens, w: Weight) -> torch.dtype:
    """FP32 if both operands are FP32 tensors, else BF16."""
    are_fp32 = all(isinstance(operand, torch.Tensor) and operand.dtype == torch.float32 for operand in (x, w))
    return torch.float32 if are_fp32 else torch.bfloat16
