"""MegaMoE as an nn.Module in one process: compile, state dict, routers, input views, repr."""

import pytest
import torch

from megamoe import MegaMoE, MoEConfig, quantize_tokens
from megamoe.layers import SharedExpert, SoftmaxRouter
from megamoe.testing.inputs import LayerCase, local_weights, rank_inputs
from megamoe.testing.layer_run import assert_case_accepted, build_layer

CFG = MoEConfig(hidden=64, intermediate=96, num_experts=6, num_topk=3, max_tokens_per_rank=16, swiglu_limit=3.0)


def case(**changes) -> LayerCase:
    return LayerCase(cfg=MoEConfig(**{**CFG.as_dict(), **changes}), tokens_per_rank=(11,), has_bias=True)


@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiles_as_one_graph(backend):
    layer = build_layer(case(), 0)
    inputs = rank_inputs(case(), 0)

    def block(x, topk_idx, topk_weights):
        return layer(layer(x, topk_idx, topk_weights) + x, topk_idx, topk_weights) * 2

    with torch.no_grad():
        expected, calls = block(*inputs), int(layer.arena.num_calls)
        got = torch.compile(block, fullgraph=True, backend=backend)(*inputs)
    assert torch.equal(got, expected)
    assert int(layer.arena.num_calls) == 2 * calls == 4, "neither call may be merged or dropped"


def test_identical_calls_are_not_merged_by_a_compiler():
    layer = build_layer(case(), 0)
    inputs = rank_inputs(case(), 0)
    with torch.no_grad():
        torch.compile(lambda *args: layer(*args) + layer(*args), fullgraph=True, backend="aot_eager")(*inputs)
    assert int(layer.arena.num_calls) == 2


@pytest.mark.parametrize("precision", ("fp8xfp4", "fp8xfp8", "bf16", "fp32"))
def test_state_dict_round_trip(precision):
    this = case(precision=precision)
    layer, other = build_layer(this, 0), MegaMoE(this.cfg)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == set(layer.state_dict())
    other.load_state_dict(state)
    inputs = rank_inputs(this, 0)
    assert torch.equal(layer(*inputs), other(*inputs))
    with pytest.raises(RuntimeError, match="Missing key.*experts.down"):
        other.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("experts.down")})


def test_moving_a_model_to_another_dtype_leaves_the_codes_alone():
    layer = build_layer(case(), 0)
    inputs = rank_inputs(case(), 0)
    expected = layer(*inputs)
    assert torch.equal(torch.nn.Sequential(layer).to(torch.float16)[0](*inputs), expected)


def test_quantised_tokens_and_input_views_equal_the_plain_call():
    this = case()
    layer, (x, topk_idx, topk_weights) = build_layer(this, 0), rank_inputs(this, 0)
    expected = layer(x, topk_idx, topk_weights)
    assert_case_accepted(this, 0, expected, layer.engine.act_group)
    tokens = quantize_tokens(x, group=32)
    assert torch.equal(layer(tokens, topk_idx, topk_weights), expected)
    views, n = layer.inputs, x.shape[0]
    views.x[:n].copy_(tokens.codes)
    views.x_sf[:n].copy_(tokens.sf)
    views.topk_idx[:n].copy_(topk_idx)
    views.topk_weights[:n].copy_(topk_weights)
    in_place = type(tokens)(views.x[:n], views.x_sf[:n], 32)
    assert torch.equal(layer(in_place, views.topk_idx[:n], views.topk_weights[:n]), expected)


def test_router_and_shared_expert():
    this = case(hidden=64)
    torch.manual_seed(0)
    router = SoftmaxRouter(64, 6, 3).bfloat16().requires_grad_(False)
    shared = SharedExpert(64, 32, dtype=torch.bfloat16).requires_grad_(False)
    plain, x = build_layer(this, 0), rank_inputs(this, 0)[0]
    full = MegaMoE(this.cfg, router=router, shared_expert=shared)
    weights = local_weights(this, 0)
    full.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    assert torch.equal(full(x), plain(x, *router(x)) + shared(x))
    with pytest.raises(ValueError, match="MegaMoE: topk_idx must be given, as the layer has no router, got None"):
        plain(x)


def test_expert_load_counts_and_clears():
    layer = build_layer(case(), 0)
    x, topk_idx, topk_weights = rank_inputs(case(), 0)
    layer(x, topk_idx, topk_weights)
    layer(x, topk_idx, topk_weights)
    assert torch.equal(layer.expert_load(), 2 * torch.bincount(topk_idx.flatten(), minlength=6))
    assert not layer.expert_load().any()


def test_layers_share_an_arena():
    first = build_layer(case(), 0)
    second = MegaMoE(case().cfg, arena=first.arena)
    weights = local_weights(case().with_seed(1), 0)
    second.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    x, topk_idx, topk_weights = rank_inputs(case(), 0)
    assert_case_accepted(case(), 0, first(x, topk_idx, topk_weights), 128)
    second(x, topk_idx, topk_weights)
    second.close()
    assert_case_accepted(case(), 0, first(x, topk_idx, topk_weights), 128)
    with pytest.raises(ValueError, match="hidden must be 64, as the arena has it, got 32; share arenas between equal shapes"):
        MegaMoE(case(hidden=32).cfg, arena=first.arena)


def test_repr_names_engine_backend_and_act_group():
    text = repr(build_layer(case(), 0))
    for part in ("engine=reference (unfused needs a Hopper GPU, not device cpu)", "backend=local", "act_group=128", "rank=0/1",
                 "experts=6 (6 local)"):
        assert part in text
