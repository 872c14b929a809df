"""megamoe.grouped_gemm in its three groupings against float64, row by row, and the exact messages of its checks."""

import re

import pytest
import torch

from megamoe.formats import quantize_fp4, quantize_fp8, quantize_tokens
from megamoe.kernels import grouped_gemm
from megamoe.reference.oracle import decode_e2m1, decode_e4m3, quantize_e4m3
from megamoe.testing.compare import relative_error

BF16_ROUNDING = 4e-3  # just above 2^-8, the most that one rounding can move a value
COUNTS = [3, 0, 5, 1, 0]  # rows of each group: empty ones in the middle and at the end
NUM_PADDING = 2


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_w(kind: str, w: torch.Tensor):
    return {"bf16": lambda: w, "fp32": w.float, "fp4": lambda: quantize_fp4(w), "fp8": lambda: quantize_fp8(w)}[kind]()


def exact_w(w, group: int) -> torch.Tensor:
    if isinstance(w, torch.Tensor):
        return w[group].double()
    return (decode_e2m1 if w.codes.dtype == torch.uint8 else decode_e4m3)(w.codes[group], w.scales[group])


def exact_rows(x: torch.Tensor, w, expert_idx: list[int], bias: torch.Tensor | None = None) -> torch.Tensor:
    """[M, N] float64, one row at a time; x [M, K] float64 holds the values the GEMM reads."""
    rows = []
    for row, group in enumerate(expert_idx):
        product = exact_w(w, max(group, 0)) @ x[row]
        product = product if bias is None else product + bias[group].double()
        rows.append(product if group >= 0 else torch.zeros_like(product))
    return torch.stack(rows)


def sorted_problem(k: int, n: int, seed: int):
    """x [M, K] with two NaN padding rows at the end, w [G, N, K], bias [G, N] and the group of each row."""
    expert_idx = [group for group, count in enumerate(COUNTS) for _ in range(count)] + [-1] * NUM_PADDING
    x = randn(len(expert_idx), k, seed=seed)
    x[-NUM_PADDING:] = torch.nan
    return x, randn(len(COUNTS), n, k, seed=seed + 1), randn(len(COUNTS), n, seed=seed + 2), expert_idx


def offsets_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("w_kind", ["bf16", "fp32", "fp4", "fp8"])
@pytest.mark.parametrize(("k", "n"), [(2880, 96), (160, 130)])
def test_contiguous_groupings_match_float64(k, n, w_kind, index_dtype):
    x, w, bias, expert_idx = sorted_problem(k, n, seed=1)
    w = make_w(w_kind, w)
    values = {"fp4": lambda: quantize_e4m3(x, 32), "fp8": lambda: quantize_e4m3(x, 128)}.get(w_kind, x.double)()
    exact = exact_rows(values.nan_to_num(), w, expert_idx, bias)
    by_row = grouped_gemm(x, w, expert_idx=torch.tensor(expert_idx, dtype=index_dtype), bias=bias)
    by_offsets = grouped_gemm(x, w, offsets=offsets_of(COUNTS).to(index_dtype), bias=bias)
    assert by_row.dtype == torch.bfloat16
    assert relative_error(by_row, exact) < BF16_ROUNDING
    assert torch.equal(by_row, by_offsets)
    assert by_row[-NUM_PADDING:].tolist() == [[0.0] * n] * NUM_PADDING


@pytest.mark.parametrize("group", [32, 128, "token"])
def test_quantised_tokens(group):
    x, w, bias, expert_idx = sorted_problem(160, 96, seed=4)
    w = quantize_fp4(w)
    exact = exact_rows(quantize_e4m3(x, group).nan_to_num(), w, expert_idx, bias)
    y = grouped_gemm(quantize_tokens(x, group=group), w, expert_idx=torch.tensor(expert_idx), bias=bias)
    assert relative_error(y, exact) < BF16_ROUNDING


def test_fp32_operands_give_fp32():
    x, w, _, expert_idx = sorted_problem(64, 96, seed=7)
    y = grouped_gemm(x.float(), w.float(), expert_idx=torch.tensor(expert_idx))
    assert y.dtype == torch.float32
    assert relative_error(y, exact_rows(x.double().nan_to_num(), w, expert_idx)) < 1e-6


def test_rows_of_a_group_may_lie_apart():
    expert_idx = [2, -1, 0, 2, 4, 0, -1]
    x, w = randn(7, 64, seed=10), randn(5, 96, 64, seed=11)
    y = grouped_gemm(x, w, expert_idx=torch.tensor(expert_idx))
    assert relative_error(y, exact_rows(x.double(), w, expert_idx)) < BF16_ROUNDING
    assert not y[[1, 6]].any()


@pytest.mark.parametrize("w_kind", ["bf16", "fp4"])
def test_masked_matches_float64(w_kind):
    max_rows = 5
    x, w, bias = randn(len(COUNTS), max_rows, 160, seed=13), make_w(w_kind, randn(len(COUNTS), 96, 160, seed=14)), randn(5, 96, seed=15)
    for group, count in enumerate(COUNTS):
        x[group, count:] = torch.nan
    out = torch.full((len(COUNTS), max_rows, 96), torch.nan, dtype=torch.bfloat16)
    assert grouped_gemm(x, w, num_rows=torch.tensor(COUNTS), bias=bias, out=out) is out
    values = (quantize_e4m3(x.flatten(0, 1), 32) if w_kind == "fp4" else x.flatten(0, 1).double()).nan_to_num()
    expert_idx = [group if row < count else -1 for group, count in enumerate(COUNTS) for row in range(max_rows)]
    assert relative_error(out.flatten(0, 1), exact_rows(values, w, expert_idx, bias)) < BF16_ROUNDING
    for group, count in enumerate(COUNTS):
        assert not out[group, count:].any()


def groupings(expert_idx: list[int]):
    return {"expert_idx": torch.tensor(expert_idx)}, {"offsets": offsets_of(COUNTS)}


@pytest.mark.parametrize("form", [0, 1])
def test_out_is_overwritten_and_accumulate_keeps_padding(form):
    x, w, _, expert_idx = sorted_problem(64, 96, seed=17)
    grouping = groupings(expert_idx)[form]
    exact = exact_rows(x.double().nan_to_num(), w, expert_idx)
    out = torch.full(exact.shape, torch.nan, dtype=torch.float32)
    assert grouped_gemm(x, w, **grouping, out=out) is out
    assert relative_error(out, exact) < 1e-6
    before = randn(*exact.shape, seed=19)
    out = before.clone()
    grouped_gemm(x, w, **grouping, out=out, accumulate=True)
    assert relative_error(out, exact + before.double()) < BF16_ROUNDING
    assert torch.equal(out[-NUM_PADDING:], before[-NUM_PADDING:])


def test_masked_accumulate_keeps_padding():
    x, w, before = randn(2, 3, 64, seed=20), randn(2, 32, 64, seed=21), randn(2, 3, 32, seed=22, dtype=torch.float32)
    out = before.clone()
    grouped_gemm(x, w, num_rows=torch.tensor([2, 0]), out=out, accumulate=True)
    assert torch.equal(out[0, 2:], before[0, 2:]) and torch.equal(out[1], before[1])
    assert relative_error(out[0, :2], before[0, :2].double() + x[0, :2].double() @ w[0].double().T) < 1e-6


@pytest.mark.parametrize("w_kind", ["bf16", "fp4", "fp8"])
def test_no_rows_and_only_empty_groups(w_kind):
    w = make_w(w_kind, randn(3, 96, 64, seed=23))
    none = randn(0, 64, seed=24)
    assert grouped_gemm(none, w, expert_idx=torch.zeros(0, dtype=torch.int32)).shape == (0, 96)
    assert grouped_gemm(none, w, offsets=torch.zeros(4, dtype=torch.int32)).shape == (0, 96)
    assert grouped_gemm(randn(3, 0, 64, seed=25), w, num_rows=torch.zeros(3, dtype=torch.int32)).shape == (3, 0, 96)
    assert not grouped_gemm(randn(4, 64, seed=26), w, offsets=torch.zeros(4, dtype=torch.int32)).any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("w_kind", ["bf16", "fp4"])
def test_compiles_without_graph_break(w_kind, backend):
    x, w, bias, expert_idx = sorted_problem(64, 32, seed=27)
    x, w = x.nan_to_num(), make_w(w_kind, w)
    for grouping in groupings(expert_idx):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, w, **kwargs: grouped_gemm(x, w, **kwargs) + 1, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x, w, bias=bias, **grouping), grouped_gemm(x, w, bias=bias, **grouping) + 1)


def test_op_matches_its_schema_and_fake():
    w = quantize_fp4(randn(3, 32, 64, seed=28))
    args = (randn(4, 64, seed=29), None, 0, w.codes, w.scales, torch.tensor([0, 2, 2, -1]), None, None, None, torch.zeros(4, 32), True)
    torch.library.opcheck(torch.ops.megamoe.grouped_gemm.default, args, test_utils=("test_schema", "test_faketensor"))


X, W, INDEX = randn(4, 64, seed=30), randn(3, 32, 64, seed=31), torch.tensor([0, 0, 1, 2])
ERRORS = [
    (dict(), "grouping must be exactly one of expert_idx, offsets and num_rows, got None; pass one of them"),
    (dict(expert_idx=INDEX, offsets=INDEX),
     "grouping must be exactly one of expert_idx, offsets and num_rows, got ['expert_idx', 'offsets']; pass one of them"),
    (dict(x=X[:, :32].contiguous(), expert_idx=INDEX), "w.shape must be [G, N, K=32], got [3, 32, 64]; sizes of one letter must agree"),
    (dict(x=X, w=W[0], expert_idx=INDEX), "w.shape must be [G, N, K=64], got [32, 64]; sizes of one letter must agree"),
    (dict(w=W.transpose(1, 2).contiguous().transpose(1, 2), expert_idx=INDEX),
     "w must be contiguous, got strides (2048, 1, 32); call .contiguous()"),
    (dict(expert_idx=INDEX.float()),
     "expert_idx.dtype must be torch.int32 or torch.int64, got torch.float32; convert it with .to(torch.int32)"),
    (dict(expert_idx=INDEX[:3]), "expert_idx.shape must be [M=4], got [3]; sizes of one letter must agree"),
    (dict(expert_idx=INDEX.to("meta")), "expert_idx.device must be cpu as of the first operand, got meta; move it with .to('cpu')"),
    (dict(expert_idx=torch.tensor([0, 1, 3, -1])), "expert_idx[2] must be in [-1, 2], got 3; -1 marks a padding row"),
    (dict(expert_idx=torch.tensor([0, -2, 3, -1])), "expert_idx[1] must be in [-1, 2], got -2; -1 marks a padding row"),
    (dict(offsets=INDEX[:3]), "offsets.shape must be [G+1=4], got [3]; sizes of one letter must agree"),
    (dict(offsets=torch.tensor([0, 2, 1, 4])),
     "offsets must be non-decreasing from 0 to at most 4, got [0, 2, 1, 4]; pass the cumulative row counts"),
    (dict(offsets=torch.tensor([1, 2, 3, 4])),
     "offsets must be non-decreasing from 0 to at most 4, got [1, 2, 3, 4]; pass the cumulative row counts"),
    (dict(offsets=torch.tensor([0, 2, 3, 5])),
     "offsets must be non-decreasing from 0 to at most 4, got [0, 2, 3, 5]; pass the cumulative row counts"),
    (dict(num_rows=INDEX[:3]), "x.shape must be [G, Mmax, K], got [4, 64]; sizes of one letter must agree"),
    (dict(x=X[None].repeat(3, 1, 1), num_rows=INDEX), "num_rows.shape must be [G=3], got [4]; sizes of one letter must agree"),
    (dict(x=X[None].repeat(3, 1, 1), num_rows=torch.tensor([0, 5, 1])),
     "num_rows[1] must be in [0, 4], got 5; a group has at most Mmax rows"),
    (dict(x=X[None].repeat(3, 1, 1), num_rows=torch.tensor([0, 1, -1])),
     "num_rows[2] must be in [0, 4], got -1; a group has at most Mmax rows"),
    (dict(expert_idx=INDEX, bias=X), "bias.shape must be [G=3, N=32], got [4, 64]; sizes of one letter must agree"),
    (dict(expert_idx=INDEX, out=X), "out.shape must be [M=4, N=32], got [4, 64]; sizes of one letter must agree"),
    (dict(expert_idx=INDEX, accumulate=True), "out must be given with accumulate=True, got None; pass the tensor to add to"),
    (dict(w=W.clone().requires_grad_(), expert_idx=INDEX),
     "w.requires_grad must be False, got True; training is not implemented yet, call it under torch.no_grad()"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[f"{i}-{message[:24]}" for i, (_, message) in enumerate(ERRORS)])
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"^grouped_gemm: {re.escape(message)}$"):
        grouped_gemm(**{"x": X, "w": W, **change})
