"""Number formats and weight layouts: pure tensor code, on any device, that knows nothing of ranks, engines or kernels."""

from megamoe.formats import e2m1, fp8, layout_sm90, layout_sm100, ue8m0
from megamoe.formats.expert_weights import ExpertWeights
from megamoe.formats.fp4_weight import FP4Weight, quantize_fp4
from megamoe.formats.fp8_weight import FP8Weight, quantize_fp8
from megamoe.formats.layout_sm90 import Sm90Weight
from megamoe.formats.layout_sm100 import Sm100Weight
from megamoe.formats.tokens import QuantizedTokens, quantize_tokens

__all__ = [
    "ExpertWeights", "FP4Weight", "FP8Weight", "QuantizedTokens", "Sm90Weight", "Sm100Weight",
    "e2m1", "fp8", "layout_sm90", "layout_sm100", "quantize_fp4", "quantize_fp8", "quantize_tokens", "ue8m0",
]
