"""engine="unfused" over DeepEP on 2 and 4 GPUs: edge cases and passes within the acceptance, and equal bits where one rank sums a token."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from test_moe import small_case
from test_unfused_cuda import IS_HOPPER, NUM_GPUS, bits, device_inputs, poison, received, unfused_layer

from megamoe.engines import unfused
from megamoe.testing.inputs import LayerCase
from megamoe.testing.layer_run import assert_case_accepted

pytestmark = [
    pytest.mark.skipif(not IS_HOPPER or NUM_GPUS < 2, reason="needs 2 Hopper GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("deep_ep") is None, reason="needs the deep_ep package"),
]
every_world = pytest.mark.parametrize("num_ranks", [n for n in (2, 4) if n <= max(NUM_GPUS, 2)])


def run_cases(rank: int, num_ranks: int, cases: list[LayerCase], is_bitwise: bool) -> list[int]:
    """Each case twice over DeepEP, judged by the oracle and, if `is_bitwise`, by the arena transport. Returns the passes of each."""
    torch.cuda.set_device(rank)
    arena_env, passes = unfused.env, []
    for case in cases:
        inputs = device_inputs(case, rank)
        with unfused_layer(case, rank) as layer:
            of_arena = layer(*inputs)
            layer.check()
        try:
            unfused.env = replace(arena_env, transport="deep_ep")
            with unfused_layer(case, rank) as layer:
                poison(layer)
                y, again = layer(*inputs), layer(*inputs)
                layer.check()
                assert torch.equal(layer.expert_load().cpu(), 2 * received(case, rank)), f"rank {rank} of {case}"
                passes.append(layer.engine._transport.num_passes)
        finally:
            unfused.env = arena_env
        assert torch.equal(bits(again), bits(y)), f"two runs differ: rank {rank} of {case}"
        assert_case_accepted(case, rank, y, layer.engine.act_group)
        assert not is_bitwise or torch.equal(bits(y), bits(of_arena)), f"rank {rank} of {case}"
    return passes


@every_world
def test_edges_within_the_acceptance(rank_pool, num_ranks):
    no_tokens = tuple(17 * (rank % 2) for rank in range(num_ranks))
    cases = [small_case(routing=routing, has_bias=True, tokens=no_tokens)
             for routing in ("uniform", "zipf", "skips", "one-rank", "one-expert")]
    cases += [
        small_case(tokens=(0,) * num_ranks),
        small_case(tokens=(24,) * num_ranks, swiglu_limit=0.5, nan_tokens=(2, 5, 11)),
        small_case(tokens=(5,) * num_ranks, num_topk=32, num_experts=32),
        small_case(tokens=(3,) * num_ranks, hidden=2880, intermediate=2880, num_experts=num_ranks, num_topk=2),
        small_case(tokens=(300,) * num_ranks, hidden=2048, intermediate=768, num_experts=16, num_topk=8, max_tokens_per_rank=300),
        small_case(tokens=(64,) * num_ranks, hidden=7168, intermediate=2048, num_topk=6, max_tokens_per_rank=64),
    ]
    rank_pool(num_ranks).run(run_cases, cases, False, timeout_s=400)


@every_world
def test_tokens_of_one_rank_have_the_bits_of_the_arena(rank_pool, num_ranks):
    cases = [small_case(num_topk=1, tokens=(17,) * num_ranks, has_bias=True), small_case(routing="one-rank", tokens=(13,) * num_ranks),
             small_case(routing="one-rank", hidden=2048, num_topk=2, tokens=(24,) * num_ranks)]
    rank_pool(num_ranks).run(run_cases, cases, True, timeout_s=200)


@every_world
def test_passes_within_the_acceptance(rank_pool, num_ranks):
    case = small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000)
    passes = rank_pool(num_ranks).run(run_cases, [case], False, timeout_s=200)
    assert max(count for counts in passes for count in counts) > 1


def run_changing_calls(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    """Calls of one layer whose tokens, routing and sizes change, each equal to the same call of another layer."""
    torch.cuda.set_device(rank)
    arena_env = unfused.env
    try:
        unfused.env = replace(arena_env, transport="deep_ep")
        with unfused_layer(cases[0], rank) as layer, unfused_layer(cases[0], rank) as other:
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
    rank_pool(num_ranks).run(run_changing_calls, cases, timeout_s=200)
