"""engine="unfused" over DeepEP on 2 and 4 GPUs: edge cases and passes within the acceptance, and equal bits where one rank sums a token."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from device_engines import IS_HOPPER, NUM_GPUS, bits, device_inputs, device_layer, poison, received
from test_moe import small_case

from megamoe.engines import unfused
from megamoe.testing.inputs import LayerCase
from megamoe.testing.layer_run import assert_case_accepted

pytestmark = [
    pytest.mark.skipif(not IS_HOPPER or NUM_GPUS < 2, reason="needs 2 Hopper GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="needs the deep_ep package"),
]
every_world = pytest.mark.parametrize("num_ranks", [n for n in (2, 4) if n <= max(NUM_GPUS, 2)])


def run_deep_ep(rank: int, case: LayerCase, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, int]:
    """Two calls over DeepEP, judged by the oracle. Returns y and the number of passes."""
    arena_env = unfused.env
    try:
        unfused.env = replace(arena_env, transport="deep_ep")
        with device_layer(case, rank) as layer:
            poison(layer)
            y, again = layer(*inputs), layer(*inputs)
            layer.check()
            assert torch.equal(layer.expert_load().cpu(), 2 * received(case, rank)), f"rank {rank} of {case}"
            num_passes = layer.engine._transport.num_passes
    finally:
        unfused.env = arena_env
    assert torch.equal(bits(again), bits(y)), f"two runs differ: rank {rank} of {case}"
    assert_case_accepted(case, rank, y, layer.engine.act_group)
    return y, num_passes


def run_case(rank: int, num_ranks: int, case: LayerCase) -> int:
    torch.cuda.set_device(rank)
    return run_deep_ep(rank, case, device_inputs(case, rank))[1]


def run_beside_arena(rank: int, num_ranks: int, case: LayerCase) -> None:
    torch.cuda.set_device(rank)
    inputs = device_inputs(case, rank)
    y, _ = run_deep_ep(rank, case, inputs)
    with device_layer(case, rank) as layer:
        assert torch.equal(bits(layer(*inputs)), bits(y)), f"rank {rank} of {case}"


# Tokens of even and odd ranks, and the layer. One test each, as each compiles its kernels: a time-out then says which.
EDGES = {
    **{routing: (0, 17, {"routing": routing, "has_bias": True}) for routing in ("uniform", "zipf", "skips", "one-rank", "one-expert")},
    "no tokens": (0, 0, {}),
    "nan": (24, 24, {"swiglu_limit": 0.5, "nan_tokens": (2, 5, 11)}),
    "top-32": (5, 5, {"num_topk": 32, "num_experts": 32}),
    "gpt-oss sizes": (3, 3, {"hidden": 2880, "intermediate": 2880, "num_experts": 4, "num_topk": 2}),
    "qwen3-30b sizes": (300, 300, {"hidden": 2048, "intermediate": 768, "num_experts": 16, "num_topk": 8, "max_tokens_per_rank": 300}),
    "v3 sizes": (64, 64, {"hidden": 7168, "intermediate": 2048, "num_topk": 6, "max_tokens_per_rank": 64}),
}


@every_world
@pytest.mark.parametrize("name", EDGES)
def test_edges_within_the_acceptance(rank_pool, name, num_ranks):
    even, odd, options = EDGES[name]
    case = replace(small_case(tokens=(even, odd) * (num_ranks // 2), **options), weights_device="cuda")
    rank_pool(num_ranks).run(run_case, case, timeout_s=120)


@every_world
@pytest.mark.parametrize("options", ({"num_topk": 1, "has_bias": True}, {"routing": "one-rank"},
                                     {"routing": "one-rank", "hidden": 2048, "num_topk": 2}), ids=str)
def test_tokens_of_one_rank_have_the_bits_of_the_arena(rank_pool, options, num_ranks):
    rank_pool(num_ranks).run(run_beside_arena, small_case(tokens=(17,) * num_ranks, **options), timeout_s=120)


@every_world
def test_passes_within_the_acceptance(rank_pool, num_ranks):
    case = small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000)
    assert max(rank_pool(num_ranks).run(run_case, case, timeout_s=120)) > 1


def run_changing_calls(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    """Calls of one layer whose tokens, routing and sizes change, each equal to the same call of another layer."""
    torch.cuda.set_device(rank)
    arena_env = unfused.env
    try:
        unfused.env = replace(arena_env, transport="deep_ep")
        with device_layer(cases[0], rank) as layer, device_layer(cases[0], rank) as other:
            for case in cases:
                inputs = device_inputs(case, rank)
                assert torch.equal(bits(layer(*inputs)), bits(other(*inputs))), f"rank {rank} of {case}"
                inputs[1].fill_(-1)
                assert not layer(*inputs).any(), "a token without slots is zero"
    finally:
        unfused.env = arena_env


@every_world
def test_changing_calls(rank_pool, num_ranks):
    sizes = ((17, 0, 3, 24), (0, 0, 0, 0), (24, 24, 24, 24), (1, 0, 0, 0), (0, 24, 1, 2), (5, 6, 7, 8))
    cases = [replace(small_case(tokens=tokens[:num_ranks], routing=("uniform", "skips")[i % 2]), seed=i) for i, tokens in enumerate(sizes)]
    rank_pool(num_ranks).run(run_changing_calls, cases, timeout_s=120)
