"""FP4Linear, GroupedGemm, GroupedFP4Linear, KGroupedGemm: numbers against float64, state_dict round trips, repr, errors."""

import re

import pytest
import torch
from torch import nn

from megamoe.formats import quantize_fp4
from megamoe.layers.grouped import GroupedFP4Linear, GroupedGemm, KGroupedGemm
from megamoe.layers.linear import FP4Linear
from megamoe.reference.oracle import decode_e2m1, quantize_e4m3
from megamoe.testing.compare import relative_error

BF16_ROUNDING = 4e-3  # just above 2^-8, the most that one rounding can move a value
INDEX = torch.tensor([0, 0, 2, -1, 2])
GROUPINGS = [{"expert_idx": INDEX}, {"offsets": torch.tensor([0, 2, 2, 4])}, {"num_rows": torch.tensor([2, 0, 1])}]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(bias: bool, in_features: int = 64, out_features: int = 96) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias, dtype=torch.bfloat16)
    layer.weight.data = randn(out_features, in_features, seed=1)
    if bias:
        layer.bias.data = randn(out_features, seed=2)
    return layer


def tokens_for(grouping: dict) -> torch.Tensor:
    return randn(3, 2, 64, seed=3) if "num_rows" in grouping else randn(5, 64, seed=3)


def exact_grouped(values: torch.Tensor, w: torch.Tensor, bias: torch.Tensor, grouping: dict) -> torch.Tensor:
    """float64 from the values [..., K] that the GEMM reads and w [G, N, K], both float64."""
    if "num_rows" in grouping:
        is_row = torch.arange(2) < grouping["num_rows"][:, None]
        return torch.where(is_row[..., None], values @ w.mT + bias[:, None], 0.0)
    expert_idx = grouping.get("expert_idx", torch.tensor([0, 0, 2, 2, -1]))
    return torch.where(expert_idx[:, None] >= 0, torch.einsum("mk,mnk->mn", values, w[expert_idx]) + bias[expert_idx], 0.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (0,), (7,), (2, 3)])
def test_fp4_linear_matches_float64(lead, bias):
    source = linear(bias)
    x = randn(*lead, 64, seed=4)
    y = FP4Linear.from_linear(source)(x)
    w = quantize_fp4(source.weight.data)
    exact = quantize_e4m3(x.reshape(-1, 64), 32) @ decode_e2m1(w.codes, w.scales).T + (source.bias.data.double() if bias else 0.0)
    assert y.shape == (*lead, 96) and y.dtype == torch.bfloat16
    assert relative_error(y, exact.reshape(y.shape)) < BF16_ROUNDING


def test_fp4_linear_takes_strided_and_fp32_tokens():
    layer, x = FP4Linear.from_linear(linear(True)), randn(64, 5, seed=5)
    assert torch.equal(layer(x.T), layer(x.T.contiguous()))
    assert torch.equal(layer(x.T.float()), layer(x.T))


def test_a_new_fp4_linear_is_zero():
    assert not FP4Linear(64, 96, bias=True)(randn(3, 64, seed=6)).any()


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict_round_trip(bias):
    source = FP4Linear.from_linear(linear(bias))
    state = source.state_dict()
    assert sorted(state) == (["bias"] if bias else []) + ["codes", "scales"]
    copy = FP4Linear(64, 96, bias=bias)
    copy.load_state_dict(state)
    x = randn(4, 64, seed=7)
    assert torch.equal(copy(x), source(x))
    w, b = randn(3, 32, 64, seed=8), randn(3, 32, seed=9) if bias else None
    grouped = GroupedFP4Linear.from_tensor(w, b)
    copy = GroupedFP4Linear(3, 64, 32, bias=bias)
    copy.load_state_dict(grouped.state_dict())
    assert torch.equal(copy(randn(5, 64, seed=3), expert_idx=INDEX), grouped(randn(5, 64, seed=3), expert_idx=INDEX))


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: next(iter(grouping)))
def test_grouped_gemm_matches_float64(grouping):
    layer = GroupedGemm(3, 64, 32, bias=True)
    layer.load_state_dict({"weight": randn(3, 32, 64, seed=10), "bias": randn(3, 32, seed=11)})
    x = tokens_for(grouping)
    exact = exact_grouped(x.double(), layer.weight.double(), layer.bias.double(), grouping)
    assert relative_error(layer(x, **grouping), exact) < BF16_ROUNDING


@pytest.mark.parametrize("grouping", GROUPINGS, ids=lambda grouping: next(iter(grouping)))
def test_grouped_fp4_linear_matches_float64(grouping):
    w, bias, x = randn(3, 32, 64, seed=12), randn(3, 32, seed=13), tokens_for(grouping)
    packed = quantize_fp4(w)
    values = quantize_e4m3(x.reshape(-1, 64), 32).reshape(x.shape)
    decoded = torch.stack([decode_e2m1(packed.codes[group], packed.scales[group]) for group in range(3)])
    y = GroupedFP4Linear.from_tensor(w, bias)(x, **grouping)
    assert relative_error(y, exact_grouped(values, decoded, bias.double(), grouping)) < BF16_ROUNDING


def test_grouped_gemm_starts_bounded_and_different_per_group():
    weight = GroupedGemm(3, 64, 32).weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad
    assert 0.1 < weight.abs().max() <= 0.125
    assert not torch.equal(weight[0], weight[1])


def test_k_grouped_gemm_matches_float64():
    a, b = randn(5, 32, seed=14), randn(5, 96, seed=15)
    out = KGroupedGemm()(a, b, torch.tensor([0, 2, 2, 5]))
    exact = torch.stack([a[:2].double().T @ b[:2].double(), torch.zeros(32, 96).double(), a[2:].double().T @ b[2:].double()])
    assert relative_error(out, exact) < 1e-6


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_modules_compile_without_graph_break(backend):
    x = randn(5, 64, seed=3)
    for layer, grouping in (
        (FP4Linear.from_linear(linear(True)), {}),
        (GroupedGemm(3, 64, 32), {"expert_idx": INDEX}),
        (GroupedFP4Linear.from_tensor(randn(3, 32, 64, seed=16)), {"expert_idx": INDEX}),
    ):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(layer, fullgraph=True, backend=backend)(x, **grouping), layer(x, **grouping))


def test_repr():
    assert repr(FP4Linear(64, 96)) == "FP4Linear(in_features=64, out_features=96, bias=False)"
    assert repr(GroupedGemm(3, 64, 32, bias=True)) == "GroupedGemm(num_groups=3, in_features=64, out_features=32, bias=True)"
    assert repr(GroupedFP4Linear(3, 64, 32)) == "GroupedFP4Linear(num_groups=3, in_features=64, out_features=32, bias=False)"
    assert repr(KGroupedGemm()) == "KGroupedGemm()"


@pytest.mark.parametrize(("layer", "sizes"), [(FP4Linear, (40, 8)), (GroupedFP4Linear, (2, 40, 8))])
def test_in_features_must_be_whole_groups(layer, sizes):
    message = f"{layer.__name__}: in_features must be a multiple of 32, got 40; pad it with zeros"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(*sizes)


def test_inputs_that_require_grad_are_refused():
    x = randn(5, 64, seed=3).requires_grad_()
    fix = "x.requires_grad must be False, got True; training is not implemented yet, call it under torch.no_grad()"
    with pytest.raises(ValueError, match=re.escape(f"gemm: {fix}")):
        FP4Linear(64, 96)(x)
    with pytest.raises(ValueError, match=re.escape(f"grouped_gemm: {fix}")):
        GroupedGemm(3, 64, 32)(x, expert_idx=INDEX)
