"""nn.Modules: the MoE layer, its routers and shared expert, and the GEMMs it is made of."""

from megamoe.layers.grouped import GroupedFP4Linear, GroupedGemm, KGroupedGemm
from megamoe.layers.linear import FP4Linear
from megamoe.layers.moe import MegaMoE
from megamoe.layers.router import HashRouter, SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter
from megamoe.layers.shared_expert import SharedExpert

__all__ = ["FP4Linear", "GroupedFP4Linear", "GroupedGemm", "HashRouter", "KGroupedGemm", "MegaMoE", "SharedExpert", "SigmoidRouter",
           "SoftmaxRouter", "SqrtSoftplusRouter"]
