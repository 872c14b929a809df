"""Seeded layers and routings for tests and benchmarks: every rank builds the same global case and takes its part.

Legend: T tokens of one rank, K top-k slots, E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from megamoe.config import MoEConfig
from megamoe.formats import ExpertWeights, quantize_fp4, quantize_fp8

ROUTINGS = ("uniform", "zipf", "one-expert", "one-rank", "empty-experts", "skips")


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """One layer, its weights and the tokens of every rank, all determined by the fields."""

    cfg: MoEConfig
    tokens_per_rank: tuple[int, ...]
    seed: int = 0
    routing: str = "uniform"
    has_bias: bool = False
    arena_bytes: int | None = None
    nan_tokens: tuple[int, ...] = field(default=())  # tokens of rank 0 that get a NaN or an Inf
    weights_device: str = "cpu"  # where they are drawn and kept; "cuda" draws other values, equal on GPUs of one kind

    @property
    def num_ranks(self) -> int:
        return len(self.tokens_per_rank)

    def with_seed(self, seed: int) -> "LayerCase":
        return replace(self, seed=seed)


def _generator(*seed: int, device: str = "cpu") -> torch.Generator:
    current = torch.empty(0, device=device).device  # with its index, which a generator needs
    return torch.Generator(current).manual_seed(hash(seed) % 2**63)


# A rank takes its slice for the layer and the whole for the oracle: large cases should be drawn and quantised once.
@lru_cache(maxsize=1)
def global_weights(case: LayerCase) -> ExpertWeights:
    """All E experts in the precision of the config (FP4Weight, FP8Weight, BF16 or FP32), values of order one after each linear."""
    cfg, g = case.cfg, _generator(case.seed, 1, device=case.weights_device)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=case.weights_device)

    gate_up = randn(cfg.num_experts, 2 * cfg.intermediate, cfg.hidden).div_(cfg.hidden**0.5)
    down = randn(cfg.num_experts, cfg.hidden, cfg.intermediate).div_(cfg.intermediate**0.5)
    gate_up_bias = randn(*gate_up.shape[:2]) * 0.5 if case.has_bias else None
    down_bias = randn(*down.shape[:2]) * 0.5 if case.has_bias else None
    convert = {"fp8xfp4": quantize_fp4, "fp8xfp8": quantize_fp8, "bf16": torch.Tensor.bfloat16, "fp32": torch.Tensor.float}[cfg.precision]
    return ExpertWeights(convert(gate_up), convert(down), gate_up_bias, down_bias)


def local_weights(case: LayerCase, rank: int) -> ExpertWeights:
    """The slice of `global_weights` that lives on `rank`."""
    weights, e = global_weights(case), case.cfg.num_local_experts(case.num_ranks)
    mine = slice(rank * e, (rank + 1) * e)
    biases = (None if bias is None else bias[mine] for bias in (weights.gate_up_bias, weights.down_bias))
    return ExpertWeights(weights.gate_up[mine], weights.down[mine], *biases)


def _route(case: LayerCase, num_tokens: int, g: torch.Generator) -> torch.Tensor:
    """topk_idx [T, K] int64, distinct experts per token; -1 where the routing has fewer candidates than K."""
    cfg = case.cfg
    popularity = torch.zeros(cfg.num_experts)
    if case.routing == "zipf":
        popularity = -torch.log(torch.arange(1, cfg.num_experts + 1).float())
    num_candidates = {"one-expert": 1, "one-rank": cfg.num_experts // case.num_ranks, "empty-experts": max(1, cfg.num_experts // 2)}
    popularity[num_candidates.get(case.routing, cfg.num_experts):] = -torch.inf
    gumbel = -torch.log(-torch.log(torch.rand(num_tokens, cfg.num_experts, generator=g).clamp(1e-9, 1 - 1e-7)))
    score, topk_idx = (popularity + gumbel).topk(cfg.num_topk, dim=-1)
    topk_idx[score == -torch.inf] = -1
    if case.routing == "skips":
        topk_idx[torch.rand(topk_idx.shape, generator=g) < 0.3] = -1
    return topk_idx


def rank_inputs(case: LayerCase, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x [T, H] BF16 (FP32 for precision "fp32"), topk_idx [T, K] int64, topk_weights [T, K] float32 of `rank`."""
    g, cfg, num_tokens = _generator(case.seed, 2, rank), case.cfg, case.tokens_per_rank[rank]
    x = torch.randn(num_tokens, cfg.hidden, generator=g)
    if rank == 0:
        for i, token in enumerate(case.nan_tokens):
            x[token, (7 * i) % cfg.hidden] = (torch.nan, torch.inf, -torch.inf)[i % 3]
    topk_idx = _route(case, num_tokens, g)
    topk_weights = torch.rand(num_tokens, cfg.num_topk, generator=g) + 0.1
    return x if cfg.precision == "fp32" else x.bfloat16(), topk_idx, topk_weights / topk_weights.sum(-1, keepdim=True)
