"""Run a LayerCase on a rank and judge it against the FP64 oracle."""

import torch

from megamoe.formats import FP4Weight, FP8Weight
from megamoe.layers import MegaMoE
from megamoe.reference.oracle import moe_oracle
from megamoe.testing.compare import ErrorReport, assert_accepted
from megamoe.testing.inputs import LayerCase, global_weights, local_weights, rank_inputs


def build_layer(case: LayerCase, rank: int, **options) -> MegaMoE:
    """The layer of `case` with this rank's experts loaded. Collective."""
    layer = MegaMoE(case.cfg, arena_bytes=case.arena_bytes, **options)
    weights = local_weights(case, rank)
    layer.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return layer


def oracle_output(case: LayerCase, rank: int, act_group: int | str, device="cpu", quantized: bool = True) -> torch.Tensor:
    """What `rank` should get: FP64 [T, H]."""
    weights = global_weights(case).to(device)
    raw = [(w.codes, w.scales) if isinstance(w, (FP4Weight, FP8Weight)) else w for w in (weights.gate_up, weights.down)]
    x, topk_idx, topk_weights = (t.to(device) for t in rank_inputs(case, rank))
    cfg = case.cfg
    return moe_oracle(x, topk_idx, topk_weights, *raw, gate_up_bias=weights.gate_up_bias, down_bias=weights.down_bias,
                      precision=cfg.precision, act_group=act_group, swiglu_limit=cfg.swiglu_limit, swiglu_alpha=cfg.swiglu_alpha,
                      swiglu_up_bias=cfg.swiglu_up_bias, quantized=quantized)


def assert_case_accepted(case: LayerCase, rank: int, y: torch.Tensor, act_group: int | str) -> ErrorReport:
    """Judge `y` by the acceptance of the numerics contract; a failure names the case, so that it can be repeated."""
    return assert_accepted(y, oracle_output(case, rank, act_group, y.device), context=f"rank {rank} of {case}")
