"""Which mega_moe config a layer runs with on sm_90a, by a small cost model of both linears. Pure: no torch, no CUDA.

Legend: n weight rows, k input channels of a linear; rows: tokens of one expert.
"""

import functools
import math
from typing import NamedTuple

from megamoe.errors import check
from megamoe.kernels.fp4_gemm_config import BLOCK_K, UNIT_BYTES
from megamoe.kernels.mega_moe_config import OP, MegaMoeConfig, table_capacity, with_most_stages
from megamoe.kernels.tuning.moe_shape import MoEShape, token_bucket
from megamoe.kernels.tuning.sm90 import DEVIATIONS, HBM_BYTES_PER_US, OVERLAP_POWER, TILE_US, stage_us, token_tiles


class Candidate(NamedTuple):
    """What a config is made of beside the layer's sizes. A list of token tiles serves any count up to its last entry with one tile."""

    num_math_warpgroups: int
    token_tiles: tuple[int, ...]
    cluster_blocks: int = 1  # where the card's blocks can be grouped so


# Of equal predictions the first is taken, since fewer warpgroups cut the work finer.
CANDIDATES = (
    Candidate(2, (8, 16, 24, 32)),
    Candidate(2, (80, 96, 112, 128)),
    Candidate(2, (112, 128, 144, 160)),
    Candidate(2, (128, 144, 160, 176), cluster_blocks=2),
    Candidate(3, (8, 16, 24, 32)),
    Candidate(3, (32, 40, 48, 56, 64)),
    Candidate(3, (56, 64, 72, 80, 88)),
    Candidate(3, (88, 96, 104)),
    Candidate(4, (8, 16, 24, 32, 48)),
)

LONG_RING = 8  # stages; more hide nothing more
FEW_ROUNDS = 3  # of the card in a linear: below it blocks work off its tasks in whole rounds


@functools.lru_cache(maxsize=4096)
def choose_mega(shape: MoEShape, num_tokens: int, pool_rows: int | None = None) -> MegaMoeConfig:
    """The config for calls with about `num_tokens` tokens on each rank, routed evenly. Correct for any call, fast for these.

    Args:
        shape: of the layer.
        num_tokens: of one rank.
        pool_rows: of the arena, of which a token tile is a part; None: enough for every tile.

    Raises:
        ValueError: the pool does not hold the largest token tile of any candidate, or shared memory does not hold a token.
    """
    fitting = [candidate for candidate in CANDIDATES if pool_rows is None or candidate.token_tiles[-1] <= pool_rows]
    smallest = min(candidate.token_tiles[-1] for candidate in CANDIDATES)
    check(bool(fitting), OP, "pool_rows", f"at least {smallest}, one token tile", pool_rows, "raise arena_bytes")
    configs = [_config(shape, candidate) for candidate in fitting]
    num_tokens = token_bucket(num_tokens)
    return min(configs, key=lambda config: predict_us(config, shape, num_tokens))


def all_mega(shape: MoEShape, max_tokens: int, pool_rows: int | None = None) -> dict[int, MegaMoeConfig]:
    """By `token_bucket`, the configs of every call with up to `max_tokens` tokens."""
    buckets = (1 << i for i in range(token_bucket(max_tokens).bit_length()))
    return {bucket: choose_mega(shape, bucket, pool_rows) for bucket in buckets}


def _config(shape: MoEShape, candidate: Candidate) -> MegaMoeConfig:
    """With one row in flight per block instead of two where that gives a short ring another stage: even at 2.7 us per row the blocks fetch
    350 GB/s together, more than NVLink gives them."""
    if shape.num_sms % candidate.cluster_blocks:  # a block would be left over
        candidate = candidate._replace(cluster_blocks=1)
    shapes = (with_most_stages(**candidate._asdict(), pull_buffers=pull_buffers,
                               max_groups=table_capacity(shape.num_experts // shape.num_ranks), has_down_bias=shape.has_down_bias,
                               hidden=shape.hidden, intermediate=shape.intermediate) for pull_buffers in (2, 1))
    return max(shapes, key=lambda config: min(config.num_stages, LONG_RING))


def predict_us(config: MegaMoeConfig, shape: MoEShape, num_tokens: int) -> float:
    """What the cost model says for one call, reading weights against multiplying. Made to rank configs, not to promise times."""
    num_entries = num_tokens * shape.num_ranks * shape.num_topk
    # Experts that get rows, and how many these get: with few tokens most experts get none, which costs nothing.
    hit = 1 - (1 - 1 / shape.num_experts) ** num_entries
    num_groups, rows = shape.num_experts / shape.num_ranks * hit, num_entries / shape.num_experts / hit
    cuts = [token_tiles(config, max(1, round(rows + z * math.sqrt(rows - 1)))) for z in DEVIATIONS]
    path_us = rounds_us = num_bytes = 0.0
    are_few = False
    for n, k in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        k_blocks, row_tiles = -(-k // BLOCK_K), -(-n // config.tile_rows)
        task_us = [k_blocks * stage_us(config.num_math_warpgroups, tokens) + TILE_US for _, tokens in cuts]
        rounds = num_groups * row_tiles * sum(number for number, _ in cuts) / len(cuts) / shape.num_sms
        are_few |= rounds < FEW_ROUNDS
        mean_us = sum(number * us for (number, _), us in zip(cuts, task_us)) / sum(number for number, _ in cuts)
        rounds_us += (math.ceil(rounds) if are_few else rounds) * mean_us
        path_us += max(task_us)
        num_bytes += num_groups * -(-n // 64) * k_blocks * UNIT_BYTES
    # Blocks claim tasks one by one: when the last of many are claimed, half a task of linear 2 is left on average.
    multiply_us = max(path_us, rounds_us + (0 if are_few else max(task_us) / 2))
    return (multiply_us**OVERLAP_POWER + (num_bytes / HBM_BYTES_PER_US) ** OVERLAP_POWER) ** (1 / OVERLAP_POWER)
