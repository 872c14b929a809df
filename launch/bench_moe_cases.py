"""The MoE benchmark as data: models, routings, goals, and what a layer call has to move and compute. Touches no GPU.

Legend: T tokens of one rank, K top-k slots, E experts, e local experts, W ranks, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch

from megamoe.config import MoEConfig
from megamoe.kernels.shipped import MODELS as SHIPPED_MODELS
from megamoe.testing.bench import FLOOR_BYTES_PER_S, FLOOR_FLOP_PER_S

MODELS = {**SHIPPED_MODELS, "tiny": (128, 64, 8, 2)}  # tiny: for the CPU
OPTIONS = {
    "v4-pro": {"swiglu_limit": 10.0},
    "v4-flash": {"swiglu_limit": 10.0},
    "gpt-oss-120b": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_up_bias": 1.0},
}
BIASED_MODELS = ("gpt-oss-120b",)
ROUTINGS = ("uniform", "zipf", "one-rank")
NVLINK_BYTES_PER_S = 450e9  # of one H200, in each direction
MOE_FLOOR_FORMULA = ("floor = max over ranks of max(HBM bytes / 4.2e12 B/s, 6 * rows * H * I / 1.5e15 FLOP/s, "
                     "NVLink bytes of the busier direction / 4.5e11 B/s)")


@dataclass(frozen=True)
class Goal:
    """us of one layer call: the most allowed, and what the best released kernel takes (kernel only, eager), where that was measured."""

    required: float
    best_released: float | None = None


GOAL_RANKS, GOAL_ROUTING = 4, "uniform"
GOALS = {  # by model and engine, then T
    ("v4-pro", "unfused"): {1: Goal(200, 231), 8: Goal(600, 757), 32: Goal(1000, 1433), 128: Goal(1150, 1620), 512: Goal(1400, 1766),
                            2048: Goal(2600, 3200), 8192: Goal(8800, 8476)},
    ("v4-pro", "fused"): {1: Goal(130, 231), 8: Goal(480, 757), 32: Goal(850, 1433), 64: Goal(960, 1629), 128: Goal(990, 1620),
                          256: Goal(1020, 1772), 512: Goal(1120, 1766), 1024: Goal(1350, 2155), 2048: Goal(2000, 3200),
                          4096: Goal(3700, 5803), 8192: Goal(6600, 8476)},
    ("v4-flash", "fused"): {1: Goal(100), 32: Goal(260), 64: Goal(260), 128: Goal(260), 8192: Goal(2500)},
    ("v3", "fused"): {1: Goal(120), 32: Goal(430), 64: Goal(430), 128: Goal(430), 256: Goal(500), 8192: Goal(6000)},
}


def model_config(model: str, max_tokens: int) -> MoEConfig:
    hidden, intermediate, num_experts, num_topk = MODELS[model]
    return MoEConfig(hidden=hidden, intermediate=intermediate, num_experts=num_experts, num_topk=num_topk, max_tokens_per_rank=max_tokens,
                     precision="fp8xfp4", **OPTIONS.get(model, {}))


def generator(*seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for a tuple of integers; the same on every rank and, on the CPU, on every machine."""
    return torch.Generator(device).manual_seed(hash(seed) % 2**63)


def draw_routing(cfg: MoEConfig, routing: str, num_tokens: int, seed: int, rank: int,
                 num_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The routing of one rank's tokens.

    Args:
        cfg: the layer.
        routing: "uniform": K distinct experts at random; "zipf": popularity 1 / place in an order of the experts that `seed` shuffles for
            all ranks; "one-rank": K distinct experts of rank 0.
        num_tokens: T.
        seed: number of the draw.
        rank, num_ranks: whose tokens.

    Returns:
        topk_idx [T, K] int64, -1 where rank 0 has fewer than K experts; topk_weights [T, K] float32, of sum one over the slots.
    """
    g = generator(2, seed, rank)
    log_popularity = torch.zeros(cfg.num_experts)
    if routing == "zipf":
        place = torch.randperm(cfg.num_experts, generator=generator(3, seed))
        log_popularity = -torch.log1p(place.float())
    if routing == "one-rank":
        log_popularity[cfg.num_local_experts(num_ranks):] = -torch.inf
    # Top-k of log popularity + Gumbel noise draws without replacement, each next expert in proportion to its popularity.
    exponential = torch.empty(num_tokens, cfg.num_experts).exponential_(generator=g)
    score, topk_idx = (log_popularity - exponential.clamp_(min=1e-30).log_()).topk(cfg.num_topk, dim=-1)
    topk_idx[score == -torch.inf] = -1
    return topk_idx, torch.randn(num_tokens, cfg.num_topk, generator=g).softmax(-1)


def expert_counts(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Rows that these tokens send to each expert, [E] int64."""
    return torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)


@dataclass(frozen=True)
class LayerWork:
    """Of one call. Means are over ranks; NVLink is the busier direction of the busiest rank."""

    mean_flop: float
    mean_weight_bytes: float
    nvlink_bytes: int
    floor_us: float


def layer_work(cfg: MoEConfig, counts: torch.Tensor, num_tokens: int) -> LayerWork:
    """What a call has to do at least.

    HBM of a rank, each tensor written and read once: FP4 weights of the experts that got rows; per token x read, its codes written and y
    written; per row processed its codes read, the intermediate codes written and read and the BF16 partial written; per row sent its
    partial read. Codes are E4M3 with a scale byte per 32. NVLink per row between two ranks: its codes one way, its partial back.

    Args:
        cfg: the layer, fp8xfp4.
        counts: [W, E] int64, rows that the tokens of each rank send to each expert.
        num_tokens: T of every rank.
    """
    hidden, intermediate, num_ranks = cfg.hidden, cfg.intermediate, counts.shape[0]
    per_expert = counts.unflatten(1, (num_ranks, -1))  # [source, destination, e]
    rows = per_expert.sum(2)  # [source, destination]
    sent, processed = rows.sum(1), rows.sum(0)
    remote = rows - rows.diag().diag()
    remote_sent, remote_processed = remote.sum(1), remote.sum(0)
    x_codes, a_codes, bf16 = hidden + hidden // 32, intermediate + intermediate // 32, 2 * hidden
    flop = 6 * hidden * intermediate * processed
    weight_bytes = (per_expert.sum(0) > 0).sum(1) * (3 * hidden * intermediate * 17 // 32)
    hbm_bytes = weight_bytes + num_tokens * (2 * bf16 + x_codes) + processed * (x_codes + 2 * a_codes + bf16) + sent * bf16
    nvlink_bytes = torch.maximum(x_codes * remote_sent + bf16 * remote_processed, x_codes * remote_processed + bf16 * remote_sent)
    seconds = torch.stack((hbm_bytes / FLOOR_BYTES_PER_S, flop / FLOOR_FLOP_PER_S, nvlink_bytes / NVLINK_BYTES_PER_S))
    return LayerWork(flop.double().mean().item(), weight_bytes.double().mean().item(), nvlink_bytes.max().item(),
                     1e6 * seconds.double().max().item())
