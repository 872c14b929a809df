"""MegaMoE on real rank processes against the FP64 oracle: the edge grid, random layers, repeatability, NaN isolation."""

import random

import pytest
import torch

from megamoe import MoEConfig
from megamoe.testing.compare import relative_error
from megamoe.testing.inputs import ROUTINGS, LayerCase, rank_inputs
from megamoe.testing.layer_run import assert_case_accepted, build_layer, oracle_output

PRECISIONS = ("fp8xfp4", "fp8xfp8", "bf16", "fp32")


def small_case(*, num_ranks: int = 2, tokens: tuple[int, ...] | None = None, seed: int = 0, routing: str = "uniform",
               has_bias: bool = False, arena_bytes: int | None = None, nan_tokens: tuple[int, ...] = (), **cfg) -> LayerCase:
    sizes = {"hidden": 96, "intermediate": 64, "num_experts": 8, "num_topk": 3, "max_tokens_per_rank": 24, **cfg}
    return LayerCase(cfg=MoEConfig(**sizes), tokens_per_rank=tokens or (17,) * num_ranks, seed=seed, routing=routing, has_bias=has_bias,
                     arena_bytes=arena_bytes, nan_tokens=nan_tokens)


def run_case(rank: int, num_ranks: int, case: LayerCase) -> dict:
    """On a rank: run the case, judge it, and return what the tests look at."""
    x, topk_idx, topk_weights = rank_inputs(case, rank)
    with build_layer(case, rank) as layer:
        layer.arena.view("partials").view(torch.uint8).fill_(0xFF)
        y = layer(x, topk_idx, topk_weights)
        load = layer.expert_load()
        again = layer(x, topk_idx, topk_weights)
        assert torch.equal(y.view(torch.uint8), again.view(torch.uint8)), f"two runs differ on rank {rank} of {case}"
        report = assert_case_accepted(case, rank, y, layer.engine.act_group)
        return {"y": y.float().tolist(), "load": load.tolist(), "median": report.median, "pool_rows": layer.arena.dims.pool_rows}


def run_cases(rank: int, num_ranks: int, cases: list[LayerCase]) -> list[dict]:
    return [run_case(rank, num_ranks, case) for case in cases]


EDGES = {
    "zero tokens on one rank": small_case(tokens=(0, 17)),
    "zero tokens on every rank": small_case(tokens=(0, 0)),
    "one token": small_case(tokens=(1, 0)),
    "capacity": small_case(tokens=(24, 24)),
    "ragged": small_case(tokens=(24, 3, 11, 1)),
    "all tokens to one expert": small_case(routing="one-expert"),
    "all tokens to one rank": small_case(routing="one-rank"),
    "empty experts": small_case(routing="empty-experts"),
    "skipped slots": small_case(routing="skips"),
    "zipf": small_case(routing="zipf"),
    "top-1": small_case(num_topk=1),
    "top-32": small_case(num_topk=32, num_experts=32, tokens=(5, 9)),
    "three ranks": small_case(num_experts=9, tokens=(7, 8, 9)),
    "one rank": small_case(num_ranks=1),
    "biases": small_case(has_bias=True),
    "swiglu limit": small_case(swiglu_limit=0.5),
    "gpt-oss gate": small_case(has_bias=True, swiglu_alpha=1.702, swiglu_up_bias=1.0, swiglu_limit=7.0),
    "gpt-oss sizes": small_case(hidden=2880, intermediate=2880, num_experts=2, num_topk=2, tokens=(3, 2)),
    "short last act group": small_case(intermediate=160),
    "pool smaller than the rows": small_case(routing="one-rank", max_tokens_per_rank=80, num_topk=4, tokens=(80, 70), arena_bytes=130_000),
}


@pytest.mark.parametrize("name", EDGES)
def test_edge_grid(rank_pool, name):
    case = EDGES[name]
    results = rank_pool(case.num_ranks).run(run_case, case)
    routed = sum(int(((idx := rank_inputs(case, rank)[1]) >= 0).sum()) for rank in range(case.num_ranks))
    assert sum(sum(result["load"]) for result in results) == routed
    if name.startswith("pool"):
        assert results[0]["pool_rows"] < sum(results[0]["load"]), "the case must overflow the pool to mean anything"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_precisions_and_routings(rank_pool, precision, routing):
    rank_pool(2).run(run_case, small_case(precision=precision, routing=routing, has_bias=True, swiglu_limit=2.0, tokens=(9, 13)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("limit", (None, 0.5))
def test_a_bad_token_stays_alone(rank_pool, precision, limit):
    case = small_case(precision=precision, nan_tokens=(2, 5, 11), swiglu_limit=limit)
    results = rank_pool(2).run(run_case, case)
    for rank, result in enumerate(results):
        is_nan = torch.tensor(result["y"]).isnan()
        assert torch.where(is_nan.any(1))[0].tolist() == ([2, 5, 11] if rank == 0 else [])
        assert torch.equal(is_nan.any(1), is_nan.all(1))


def random_case(index: int) -> LayerCase:
    r = random.Random(index)
    num_ranks = r.randint(1, 4)
    num_experts = num_ranks * r.randint(1, 6)
    max_tokens = r.choice((1, 5, 24, 40))
    cfg = MoEConfig(
        hidden=32 * r.randint(1, 8), intermediate=32 * r.randint(1, 6), num_experts=num_experts,
        num_topk=min(num_experts, r.choice((1, 2, 3, 6, 8, 16))), max_tokens_per_rank=max_tokens, precision=r.choice(PRECISIONS[:3]),
        swiglu_limit=r.choice((None, None, 1.0, 10.0)), **r.choice(({}, {"swiglu_alpha": 1.702, "swiglu_up_bias": 1.0})))
    tokens = tuple(r.choice((0, r.randint(0, max_tokens), max_tokens)) for _ in range(num_ranks))
    return LayerCase(cfg=cfg, tokens_per_rank=tokens, seed=index, routing=r.choice(ROUTINGS), has_bias=r.random() < 0.5)


NUM_RANDOM = 500


@pytest.mark.parametrize("num_ranks", (1, 2, 3, 4))
def test_random_layers(rank_pool, num_ranks):
    """500 layers over the four worlds; each is judged against the oracle and run twice."""
    cases = [case for case in map(random_case, range(NUM_RANDOM)) if case.num_ranks == num_ranks]
    assert len(cases) > NUM_RANDOM // 8
    results = rank_pool(num_ranks).run(run_cases, cases, timeout_s=240)
    medians = [result["median"] for rank in results for result in rank]
    assert max(medians) > 0, "an oracle equal to the engine to the last bit compares nothing"


def run_with_dropped_slot(rank: int, num_ranks: int, case: LayerCase):
    x, topk_idx, topk_weights = rank_inputs(case, rank)
    dropped = topk_idx.clone()
    if rank == 1:
        dropped[4, 1] = -1
    with build_layer(case, rank) as layer:
        y = layer(x, dropped, topk_weights)
        oracle = oracle_output(case, rank, layer.engine.act_group)
        try:
            assert_case_accepted(case, rank, y, layer.engine.act_group)
        except AssertionError as error:
            return str(error), relative_error(y[4], oracle[4])
        return None, relative_error(y, oracle)


def test_a_dropped_slot_is_seen(rank_pool):
    results = rank_pool(2).run(run_with_dropped_slot, small_case(num_topk=6))
    assert results[0][0] is None
    assert "token 4" in results[1][0] and results[1][1] > 0.08


def run_changing_calls(rank: int, num_ranks: int, case: LayerCase) -> None:
    """Eight back-to-back calls with changing routing and token counts on one arena, then each alone on a fresh one: equal bit for bit."""
    calls = [LayerCase(cfg=case.cfg, tokens_per_rank=tuple((7 * i + 5 * r) % 25 for r in range(num_ranks)), seed=case.seed,
                       routing=ROUTINGS[i % len(ROUTINGS)]) for i in range(8)]
    with build_layer(case, rank) as layer:
        together = [layer(*rank_inputs(call, rank)) for call in calls]
    for call, y in zip(calls, together):
        with build_layer(case, rank) as layer:
            assert torch.equal(layer(*rank_inputs(call, rank)), y)


def test_back_to_back_calls_equal_separate_ones(rank_pool):
    rank_pool(3).run(run_changing_calls, small_case(num_experts=9, tokens=(24, 24, 24)))
