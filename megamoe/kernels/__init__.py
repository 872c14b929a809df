"""One file per op: checks and launch. No torch.distributed here."""

from megamoe.kernels.gemm import gemm
from megamoe.kernels.grouped_gemm import grouped_gemm
from megamoe.kernels.grouped_gemm_swiglu import grouped_gemm_swiglu
from megamoe.kernels.k_grouped_gemm import k_grouped_gemm
from megamoe.kernels.permute import permute_tokens, unpermute_tokens
from megamoe.kernels.quantize_tokens import quantize_tokens
from megamoe.kernels.swiglu_quantize import swiglu_quantize

__all__ = [
    "gemm", "grouped_gemm", "grouped_gemm_swiglu", "k_grouped_gemm", "permute_tokens", "quantize_tokens", "swiglu_quantize",
    "unpermute_tokens",
]
