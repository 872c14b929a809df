"""One file per op: checks and launch. No torch.distributed here."""

from megamoe.kernels.gemm import gemm
from megamoe.kernels.grouped_gemm import grouped_gemm
from megamoe.kernels.grouped_gemm_swiglu import grouped_gemm_swiglu
from megamoe.kernels.k_grouped_gemm import k_grouped_gemm

__all__ = ["gemm", "grouped_gemm", "grouped_gemm_swiglu", "k_grouped_gemm"]
