"""megamoe: distributed Mixture-of-Experts layers for PyTorch. Public names only; see docs/architecture.md for the map."""

from megamoe.comm import Arena, Topology
from megamoe.config import MoEConfig
from megamoe.errors import (
    ArenaBudgetError,
    ArenaError,
    CheckpointError,
    CollectiveMismatchError,
    EngineUnavailableError,
    FormatError,
    PeerTimeoutError,
)
from megamoe.formats import ExpertWeights, FP4Weight, FP8Weight, QuantizedTokens, quantize_fp4, quantize_fp8
from megamoe.kernels import (
    gemm,
    grouped_gemm,
    grouped_gemm_swiglu,
    k_grouped_gemm,
    permute_tokens,
    quantize_tokens,
    swiglu_quantize,
    unpermute_tokens,
)
from megamoe.kernels.device_errors import check
from megamoe.layers import MegaMoE

__version__ = "0.1.0"

__all__ = [
    "Arena", "ArenaBudgetError", "ArenaError", "CheckpointError", "CollectiveMismatchError", "EngineUnavailableError", "ExpertWeights",
    "FP4Weight", "FP8Weight", "FormatError", "MegaMoE", "MoEConfig", "PeerTimeoutError", "QuantizedTokens", "Topology", "check", "gemm",
    "grouped_gemm", "grouped_gemm_swiglu", "k_grouped_gemm", "permute_tokens", "quantize_fp4", "quantize_fp8", "quantize_tokens",
    "swiglu_quantize", "unpermute_tokens",
]
