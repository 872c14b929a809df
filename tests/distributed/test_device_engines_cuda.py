"""Engines that kernels drive, unfused and fused, one rank per GPU: the edge grid, model shapes, bounded pools, forms of input and weights.

Everything also runs with one rank on one GPU.
"""

import re

import pytest
import torch
from device_engines import (
    NUM_GPUS,
    device_inputs,
    device_layer,
    every_engine,
    every_world,
    needs_hopper,
    on_ranks,
    run_and_judge,
    run_cases,
)
from test_moe import EDGES, small_case

from megamoe import MegaMoE, MoEConfig
from megamoe.formats import quantize_tokens
from megamoe.testing.compare import assert_gemm_accepted
from megamoe.testing.inputs import ROUTINGS, LayerCase, local_weights
from megamoe.testing.layer_run import build_layer, oracle_output

pytestmark = needs_hopper


@every_engine
@every_world
def test_few_tokens(rank_pool, num_ranks, engine):
    """The smallest calls first: a token on one rank, then one on each."""
    cases = [small_case(tokens=(1,) + (0,) * (num_ranks - 1), num_topk=1), *(small_case(tokens=(n,) * num_ranks) for n in (1, 9))]
    rank_pool(num_ranks).run(run_cases, engine, cases, timeout_s=200)


@every_engine
@pytest.mark.parametrize("num_ranks", (1, 2, 3, 4))
def test_edge_grid(rank_pool, num_ranks, engine):
    if num_ranks > NUM_GPUS:
        pytest.skip(f"needs {num_ranks} GPUs")
    cases = EDGES.values() if num_ranks == 1 else [case for case in EDGES.values() if case.num_ranks == num_ranks]
    rank_pool(num_ranks).run(run_cases, engine, [on_ranks(case, num_ranks) for case in cases], timeout_s=280)


@every_engine
@every_world
def test_routings_and_nan(rank_pool, num_ranks, engine):
    cases = [small_case(routing=routing, has_bias=True, swiglu_limit=2.0, nan_tokens=(1, 3), tokens=(13,) * num_ranks)
             for routing in ROUTINGS]
    rank_pool(num_ranks).run(run_cases, engine, cases, timeout_s=200)


# Widths, top-k and gates of the models, with fewer experts.
MODELS = {
    "v4-pro": {"hidden": 7168, "intermediate": 3072, "num_topk": 6, "swiglu_limit": 10.0},
    "v3": {"hidden": 7168, "intermediate": 2048, "num_topk": 8},
    "gpt-oss-120b": {"hidden": 2880, "intermediate": 2880, "num_topk": 4, "swiglu_alpha": 1.702, "swiglu_up_bias": 1.0,
                     "swiglu_limit": 7.0},
    "qwen3-30b": {"hidden": 2048, "intermediate": 768, "num_topk": 8},
}


def model_case(model: str, num_ranks: int) -> LayerCase:
    """The weights come from the GPU: on the CPU, drawing and quantising them takes minutes at these widths."""
    cfg = MoEConfig(**MODELS[model], num_experts=12 if num_ranks == 3 else 8, max_tokens_per_rank=128)
    return LayerCase(cfg=cfg, tokens_per_rank=tuple(32 + 32 * rank for rank in range(num_ranks)), has_bias=model == "gpt-oss-120b",
                     weights_device="cuda")


def run_model(rank: int, num_ranks: int, engine: str, case: LayerCase) -> None:
    with device_layer(case, rank, engine) as layer:
        y = run_and_judge(layer, case, rank)
    with build_layer(case, rank, device="cuda", engine="reference", timeout_s=30.0) as reference:
        twin = reference(*device_inputs(case, rank))
    exact = oracle_output(case, rank, layer.engine.act_group, "cuda", quantized=False)
    assert_gemm_accepted(y, exact, twin, context=f"{engine}, rank {rank} of {case}")


@every_engine
@every_world
@pytest.mark.parametrize("model", MODELS)
def test_model_shapes(rank_pool, model, num_ranks, engine):
    rank_pool(num_ranks).run(run_model, engine, model_case(model, num_ranks), timeout_s=240)


@every_engine
@every_world
def test_more_rows_than_the_pool_holds(rank_pool, num_ranks, engine):
    """Unfused: several passes. Fused: the slots of the ring are used again and again."""
    case = small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000)
    rank_pool(num_ranks).run(run_cases, engine, [case], timeout_s=100)


@every_engine
@pytest.mark.parametrize("sizes", ({}, {"hidden": 256, "intermediate": 128}), ids=("natural order", "thread order"))
def test_quantised_tokens_and_input_views_equal_the_plain_call(engine, sizes):
    case = small_case(num_ranks=1, **sizes)
    layer, (x, topk_idx, topk_weights) = device_layer(case, 0, engine), device_inputs(case, 0)
    expected, tokens, views, n = layer(x, topk_idx, topk_weights), quantize_tokens(x, group=32), layer.inputs, len(x)
    assert torch.equal(layer(tokens, topk_idx, topk_weights), expected)
    for view, value in ((views.x, tokens.codes), (views.x_sf, tokens.sf), (views.topk_idx, topk_idx), (views.topk_weights, topk_weights)):
        view[:n].copy_(value)
    for _ in range(2):  # the second call of the unfused engine finds tokens that the first has folded
        assert torch.equal(layer(type(tokens)(views.x[:n], views.x_sf[:n], 32), views.topk_idx[:n], views.topk_weights[:n]), expected)
        left = tokens.sf.amax(1, keepdim=True).expand_as(tokens.sf) if engine == "unfused" else tokens.sf
        assert torch.equal(views.x_sf[:n], left)


@every_engine
def test_the_state_dict_is_canonical(engine):
    case = small_case(num_ranks=1, has_bias=True)
    layer, reference = device_layer(case, 0, engine), MegaMoE(case.cfg)
    state = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
    reference.load_state_dict(state)
    weights = local_weights(case, 0)
    for expert in range(case.cfg.num_experts):
        for got, due in zip(reference.engine.weights().dequantized(expert), weights.dequantized(expert)):
            assert torch.equal(got, due)
    assert torch.equal(state["experts.gate_up_bias"], weights.gate_up_bias)


def run_both(rank: int, num_ranks: int, cases: list[LayerCase]) -> list[tuple[float, float]]:
    """Median and largest difference per token of the fused from the unfused engine."""
    torch.cuda.set_device(rank)
    found = []
    for case in cases:
        inputs = device_inputs(case, rank)
        with device_layer(case, rank, "unfused") as unfused, device_layer(case, rank, "fused") as fused:
            due, y = unfused(*inputs).double(), fused(*inputs).double()  # no layer waits for the other one's call
            fused.check()
        error = (y - due).norm(dim=1) / due.norm(dim=1).clamp(min=1e-9)
        found.append((error.median().item(), error.max().item()))
    return found


@every_world
def test_fused_equals_unfused_up_to_rounding(rank_pool, num_ranks):
    cases = [small_case(hidden=512, intermediate=256, tokens=(24,) * num_ranks, has_bias=has_bias) for has_bias in (False, True)]
    for of_rank in rank_pool(num_ranks).run(run_both, cases, timeout_s=100):
        for median, largest in of_rank:
            assert median <= 6e-3 and largest <= 0.08


def test_every_bucket_of_tokens():
    """The config changes with the number of tokens."""
    sizes = {"hidden": 256, "intermediate": 128, "max_tokens_per_rank": 256}
    with device_layer(small_case(tokens=(0,), **sizes), 0, "fused") as layer:
        for num_tokens in (0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 65, 128, 255, 256):
            run_and_judge(layer, small_case(tokens=(num_tokens,), **sizes), 0)


def test_repr_and_auto():
    layer = MegaMoE(small_case(num_ranks=1).cfg, device="cuda")
    assert re.search(r"engine=fused \(the fastest one here\), act_group=32", repr(layer))
    assert MegaMoE(small_case(num_ranks=1, precision="bf16").cfg, device="cuda").engine.name == "reference"
