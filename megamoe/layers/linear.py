"""FP4Linear: nn.Linear with FP4 weights, for inference. Legend: N out_features, K in_features."""

import torch
from torch import nn

from megamoe.formats import quantize_fp4
from megamoe.kernels import gemm
from megamoe.layers.fp4_state import FP4State


class FP4Linear(FP4State):
    """y = x @ w.T + bias with w in FP4 and x quantised to FP8 per 32 channels, on Hopper per token.

    The weights are buffers `codes` [N, K/2] and `scales` [N, K/32], so a state_dict holds them as stored; they start as zeros. On Hopper
    the first forward brings them into kernel layout. There is no training yet.

    Args:
        in_features: K, a multiple of 32.
        out_features: N.
        bias: have a `bias` [N], BF16.
        device: where the buffers live.

    Raises:
        ValueError: in_features is not a multiple of 32.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, device: torch.device | str | None = None):
        super().__init__((out_features, in_features), device)
        self.in_features = in_features
        self.out_features = out_features
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.bfloat16, device=device) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "FP4Linear":
        """Quantise the weights of `linear`. Raises FormatError if one is NaN or Inf. Sync: reads the device."""
        w = quantize_fp4(linear.weight.detach())
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device=w.device)
        layer.codes, layer.scales = w.codes, w.scales
        if linear.bias is not None:
            layer.bias = linear.bias.detach().bfloat16()
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] BF16 or FP32 -> [..., N] BF16. Raises ValueError as `megamoe.gemm` does."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # [M, K]
        return gemm(rows, self.weight, bias=self.bias).reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
