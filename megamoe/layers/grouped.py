"""The grouped GEMMs as modules: one weight per group, BF16 or FP4, and the k-grouped product. For inference; there is no training yet.

Legend: M rows, G groups, N out_features, K in_features.
"""

import torch
from torch import nn

from megamoe.formats import quantize_fp4
from megamoe.kernels import grouped_gemm, k_grouped_gemm
from megamoe.layers.fp4_state import FP4State


class _Grouped(nn.Module):
    """What both weight formats share; subclasses hold the sizes, `weight` and `bias`."""

    def forward(
        self,
        x: torch.Tensor,
        *,
        expert_idx: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [M, K] or [G, Mmax, K] -> [M, N] or [G, Mmax, N] BF16; the groupings and errors are those of `megamoe.grouped_gemm`."""
        return grouped_gemm(x, self.weight, expert_idx=expert_idx, offsets=offsets, num_rows=num_rows, bias=self.bias)

    def extra_repr(self) -> str:
        sizes = f"num_groups={self.num_groups}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


class GroupedGemm(_Grouped):
    """y[row] = x[row] @ weight[g].T + bias[g] for every row of every group g, in BF16.

    Args:
        num_groups: G.
        in_features: K.
        out_features: N.
        bias: have a `bias` [G, N].
        device: where the parameters live.
    """

    def __init__(
        self, num_groups: int, in_features: int, out_features: int, bias: bool = False, device: torch.device | str | None = None
    ):
        super().__init__()
        self.num_groups = num_groups
        self.in_features = in_features
        self.out_features = out_features
        # No gradient until training exists: with one, the op would refuse every forward outside no_grad.
        weight = torch.empty(num_groups, out_features, in_features, dtype=torch.bfloat16, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)
        bias_values = torch.zeros(num_groups, out_features, dtype=torch.bfloat16, device=device)
        self.bias = nn.Parameter(bias_values, requires_grad=False) if bias else None


class GroupedFP4Linear(_Grouped, FP4State):
    """GroupedGemm with FP4 weights; x is quantised to FP8 per 32 channels, on Hopper per token.

    The weights are buffers `codes` [G, N, K/2] and `scales` [G, N, K/32], so a state_dict holds them as stored; they start as zeros.
    On Hopper the first forward brings them into kernel layout.

    Args:
        num_groups: G.
        in_features: K, a multiple of 32.
        out_features: N.
        bias: have a `bias` [G, N], BF16.
        device: where the buffers live.

    Raises:
        ValueError: in_features is not a multiple of 32.
    """

    def __init__(
        self, num_groups: int, in_features: int, out_features: int, bias: bool = False, device: torch.device | str | None = None
    ):
        super().__init__((num_groups, out_features, in_features), device)
        self.num_groups = num_groups
        self.in_features = in_features
        self.out_features = out_features
        rows = (num_groups, out_features)
        self.register_buffer("bias", torch.zeros(rows, dtype=torch.bfloat16, device=device) if bias else None)

    @classmethod
    def from_tensor(cls, w: torch.Tensor, bias: torch.Tensor | None = None) -> "GroupedFP4Linear":
        """Quantise w [G, N, K]; bias [G, N]. Raises FormatError if a weight is NaN or Inf. Sync: reads the device."""
        quantized = quantize_fp4(w.detach())
        num_groups, out_features, in_features = w.shape
        layer = cls(num_groups, in_features, out_features, bias=bias is not None, device=w.device)
        layer.codes, layer.scales = quantized.codes, quantized.scales
        if bias is not None:
            layer.bias = bias.detach().bfloat16()
        return layer


class KGroupedGemm(nn.Module):
    """out[g] = a[rows of g].T @ b[rows of g] in FP32, the weight gradient of a grouped linear; has no parameters."""

    def forward(self, a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """a [R, M], b [R, N] BF16 or FP32, offsets [G+1] -> [G, M, N] float32; errors are those of `megamoe.k_grouped_gemm`."""
        return k_grouped_gemm(a, b, offsets)
