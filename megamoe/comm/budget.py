"""How many pool rows an arena gets: the default, or what an explicit byte budget leaves. Pure arithmetic on top of protocol.pack."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from megamoe.comm.protocol import ArenaDims, pack
from megamoe.config import MoEConfig
from megamoe.errors import ArenaBudgetError

POOL_QUANTUM = 64
# With a default pool of at least this many rows, layers with a small capacity take any routing in one pass.
MIN_DEFAULT_ROWS = 16384
TILE_ROWS = 32  # of the pool that the fused engine gives to a token tile when tokens are few


def plan_dims(cfg: MoEConfig, num_ranks: int, arena_bytes: int | None = None) -> ArenaDims:
    """Choose the pool and return the arena's dims.

    Without a budget the pool holds the rows of one rank's full capacity, since that is what balanced routing sends here, and a 32nd more,
    since it does so only on average; but at least 16384 rows. More skewed routing goes through it in several passes. It is never larger
    than the worst case needs, in which every expert that gets rows leaves most of a token tile of 32 empty.

    Args:
        cfg: the layer.
        num_ranks: W.
        arena_bytes: budget of one rank in bytes; None for the default pool.
    Raises:
        ArenaBudgetError: fewer than 64 pool rows fit into arena_bytes.
        ValueError: the experts do not divide evenly among the ranks.
    """
    tokens, topk = cfg.max_tokens_per_rank, cfg.num_topk
    num_experts = cfg.num_local_experts(num_ranks)
    received = num_ranks * tokens * min(topk, num_experts)  # at most
    worst_rows = received + (TILE_ROWS - 1) * min(received, num_experts)
    dims = ArenaDims(num_ranks, tokens, topk, cfg.num_experts, cfg.hidden, cfg.intermediate, cfg.precision, POOL_QUANTUM)
    if arena_bytes is None:
        return replace(dims, pool_rows=_round_up(min(worst_rows, max(tokens * topk * 33 // 32, MIN_DEFAULT_ROWS))))
    blocks = _most(_round_up(worst_rows) // POOL_QUANTUM, arena_bytes, lambda n: _num_bytes(dims, pool_rows=n * POOL_QUANTUM))
    if blocks == 0:
        raise ArenaBudgetError(_explain(dims, arena_bytes))
    return replace(dims, pool_rows=blocks * POOL_QUANTUM)


def _round_up(rows: int) -> int:
    return -(-rows // POOL_QUANTUM) * POOL_QUANTUM


def _num_bytes(dims: ArenaDims, **changes: int) -> int:
    return pack(replace(dims, **changes)).num_bytes


def _most(limit: int, budget: int, cost: Callable[[int], int]) -> int:
    """The largest n in [0, limit] with cost(n) <= budget, where cost grows with n; 0 if even 1 is too dear."""
    return bisect_right(range(1, limit + 1), budget, key=cost)


def _explain(dims: ArenaDims, arena_bytes: int) -> str:
    needed = _num_bytes(dims)
    tokens = _most(dims.max_tokens, arena_bytes, lambda n: _num_bytes(dims, max_tokens=n))
    fewer_tokens = f" or max_tokens_per_rank <= {tokens}" if tokens else ""
    return (f"Arena: arena_bytes must be at least {needed} for {dims.max_tokens} tokens per rank and a pool of {POOL_QUANTUM} rows, "
            f"got {arena_bytes}; pass arena_bytes >= {needed}{fewer_tokens}")
