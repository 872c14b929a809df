"""engine="unfused" on GPUs, one rank per GPU: the edge grid, model shapes, bounded pools, both transports, forms of input and weights.

Everything also runs with one rank on one GPU.
"""

import os
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from test_moe import EDGES, small_case

from megamoe import MegaMoE, MoEConfig
from megamoe.engines import unfused
from megamoe.formats import quantize_tokens
from megamoe.testing.compare import assert_gemm_accepted
from megamoe.testing.inputs import ROUTINGS, LayerCase, local_weights, rank_inputs
from megamoe.testing.layer_run import assert_case_accepted, build_layer, oracle_output

IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NUM_GPUS = torch.cuda.device_count() if IS_HOPPER else 0
WORLDS = [1] + ([min(4, NUM_GPUS)] if NUM_GPUS > 1 else [])

pytestmark = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
every_world = pytest.mark.parametrize("num_ranks", WORLDS)


def on_ranks(case: LayerCase, num_ranks: int) -> LayerCase:
    """The case with the tokens of the first ranks, repeated where there are more."""
    return replace(case, tokens_per_rank=tuple(case.tokens_per_rank[rank % case.num_ranks] for rank in range(num_ranks)))


def device_inputs(case: LayerCase, rank: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in rank_inputs(case, rank))


def unfused_layer(case: LayerCase, rank: int, **options) -> MegaMoE:
    return build_layer(case, rank, **{"device": "cuda", "engine": "unfused", "timeout_s": 30.0, **options})


def poison(layer: MegaMoE) -> None:
    """NaN wherever a call could read what it has not written."""
    for name in ("partials", "pool_x", "pool_x_sf", "pool_a", "pool_a_sf", "x", "x_sf"):
        layer.arena.view(name).view(torch.uint8).fill_(0xFF)


def received(case: LayerCase, rank: int) -> torch.Tensor:
    """Rows that each local expert of `rank` should get."""
    all_idx = torch.cat([rank_inputs(case, src)[1].flatten() for src in range(case.num_ranks)])
    num_local = case.cfg.num_local_experts(case.num_ranks)
    return torch.bincount(all_idx[all_idx >= 0], minlength=case.cfg.num_experts)[rank * num_local: (rank + 1) * num_local]


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int16)


def run_cases(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    torch.cuda.set_device(rank)
    for case in cases:
        inputs = device_inputs(case, rank)
        with unfused_layer(case, rank) as layer:
            poison(layer)
            y = layer(*inputs)
            load = layer.expert_load()
            again = layer(*inputs)
            layer.check()
            assert torch.equal(bits(again), bits(y)), f"two runs differ: rank {rank} of {case}"
            assert torch.equal(load.cpu(), received(case, rank)), f"rank {rank} of {case}"
            assert_case_accepted(case, rank, y, layer.engine.act_group)


@pytest.mark.parametrize("num_ranks", (1, 2, 3, 4))
def test_edge_grid(rank_pool, num_ranks):
    if num_ranks > NUM_GPUS:
        pytest.skip(f"needs {num_ranks} GPUs")
    cases = EDGES.values() if num_ranks == 1 else [case for case in EDGES.values() if case.num_ranks == num_ranks]
    rank_pool(num_ranks).run(run_cases, [on_ranks(case, num_ranks) for case in cases], timeout_s=400)


@every_world
def test_routings_and_nan(rank_pool, num_ranks):
    cases = [small_case(routing=routing, has_bias=True, swiglu_limit=2.0, nan_tokens=(1, 3), tokens=(13,) * num_ranks)
             for routing in ROUTINGS]
    rank_pool(num_ranks).run(run_cases, cases, timeout_s=200)


def model_case(num_ranks: int, **cfg) -> LayerCase:
    tokens = tuple(96 + 32 * rank for rank in range(num_ranks))
    return LayerCase(cfg=MoEConfig(max_tokens_per_rank=256, **cfg), tokens_per_rank=tokens, has_bias="swiglu_alpha" in cfg)


def model_cases(num_ranks: int) -> list[LayerCase]:
    """Widths, top-k and gates of the models; fewer experts than the model has, so that the oracle stays affordable."""
    num_experts = max(8, 4 * num_ranks)
    return [
        model_case(num_ranks, hidden=7168, intermediate=3072, num_experts=num_experts, num_topk=6, swiglu_limit=10.0),
        model_case(num_ranks, hidden=7168, intermediate=2048, num_experts=num_experts, num_topk=8),
        model_case(num_ranks, hidden=2880, intermediate=2880, num_experts=num_experts, num_topk=4, swiglu_alpha=1.702, swiglu_up_bias=1.0,
                   swiglu_limit=7.0),
        model_case(num_ranks, hidden=2048, intermediate=768, num_experts=2 * num_experts, num_topk=8),
    ]


def run_models(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    run_cases(rank, num_ranks, cases)
    for case in cases:
        inputs = device_inputs(case, rank)
        with unfused_layer(case, rank) as layer, build_layer(case, rank, device="cuda", engine="reference") as reference:
            exact = oracle_output(case, rank, layer.engine.act_group, "cuda", quantized=False)
            assert_gemm_accepted(layer(*inputs), exact, reference(*inputs), context=f"rank {rank} of {case}")


@every_world
def test_model_shapes(rank_pool, num_ranks):
    rank_pool(num_ranks).run(run_models, model_cases(num_ranks), timeout_s=500)


def run_passes(rank: int, num_ranks: int, case: LayerCase) -> int:
    torch.cuda.set_device(rank)
    inputs = device_inputs(case, rank)
    with unfused_layer(replace(case, arena_bytes=None), rank) as layer, unfused_layer(case, rank) as bounded:
        poison(bounded)
        assert torch.equal(bits(bounded(*inputs)), bits(layer(*inputs)))
        return bounded.engine._transport.num_passes


@every_world
def test_passes_do_not_change_a_bit(rank_pool, num_ranks):
    case = small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000)
    assert min(rank_pool(num_ranks).run(run_passes, case)) > 1


def run_nccl(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    torch.cuda.set_device(rank)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    group = dist.new_group(backend="nccl")
    arena_env = unfused.env
    for case in cases:
        inputs = device_inputs(case, rank)
        with unfused_layer(case, rank) as layer:
            expected = layer(*inputs)
        try:
            unfused.env = replace(arena_env, transport="nccl")
            with unfused_layer(case, rank, group=group) as layer:
                poison(layer)
                y, again = layer(*inputs), layer(*inputs)
                assert torch.equal(layer.expert_load().cpu(), 2 * received(case, rank))
        finally:
            unfused.env = arena_env
        assert torch.equal(bits(y), bits(expected)) and torch.equal(bits(again), bits(y)), f"rank {rank} of {case}"
    dist.destroy_process_group(group)


@every_world
def test_nccl_transport_gives_the_same_bits(rank_pool, num_ranks):
    cases = [small_case(routing=routing, has_bias=True, tokens=tuple(17 * (rank % 2) for rank in range(1, num_ranks + 1)))
             for routing in ("uniform", "one-rank", "skips")]
    cases.append(small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000))
    rank_pool(num_ranks).run(run_nccl, cases, timeout_s=200)


def test_quantised_tokens_and_input_views_equal_the_plain_call():
    case = small_case(num_ranks=1)
    layer, (x, topk_idx, topk_weights) = unfused_layer(case, 0), device_inputs(case, 0)
    expected, tokens, views, n = layer(x, topk_idx, topk_weights), quantize_tokens(x, group=32), layer.inputs, len(x)
    assert torch.equal(layer(tokens, topk_idx, topk_weights), expected)
    for view, value in ((views.x, tokens.codes), (views.x_sf, tokens.sf), (views.topk_idx, topk_idx), (views.topk_weights, topk_weights)):
        view[:n].copy_(value)
    assert torch.equal(layer(type(tokens)(views.x[:n], views.x_sf[:n], 32), views.topk_idx[:n], views.topk_weights[:n]), expected)


def test_the_state_dict_is_canonical():
    case = small_case(num_ranks=1, has_bias=True)
    layer, reference = unfused_layer(case, 0), MegaMoE(case.cfg)
    state = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    reference.load_state_dict(state)
    weights = local_weights(case, 0)
    for expert in range(case.cfg.num_experts):
        for got, due in zip(reference.engine.weights().dequantized(expert), weights.dequantized(expert)):
            assert torch.equal(got, due)
    assert torch.equal(state["experts.gate_up_bias"], weights.gate_up_bias)


def test_repr_and_auto():
    layer = MegaMoE(small_case(num_ranks=1).cfg, device="cuda")
    assert re.search(r"engine=unfused \(the fastest one here\), act_group=32", repr(layer))
    assert MegaMoE(small_case(num_ranks=1, precision="bf16").cfg, device="cuda").engine.name == "reference"
