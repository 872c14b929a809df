"""megamoe.k_grouped_gemm against float64, and the exact messages of its checks."""

import re

import pytest
import torch

from megamoe.kernels import k_grouped_gemm
from megamoe.testing.compare import relative_error


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_groups(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[G, M, N] float64, one outer product per row."""
    out = torch.zeros(len(offsets) - 1, a.shape[1], b.shape[1], dtype=torch.float64)
    for group in range(len(offsets) - 1):
        for row in range(int(offsets[group]), int(offsets[group + 1])):
            out[group] += torch.outer(a[row].double(), b[row].double())
    return out


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n"), [(64, 96), (33, 2880)])
def test_matches_float64(m, n, dtype, index_dtype):
    a, b = randn(13, m, seed=1, dtype=dtype), randn(13, n, seed=2, dtype=dtype)
    a[11:], b[11:] = torch.nan, torch.nan  # past the last offset: never read
    offsets = torch.tensor([0, 3, 3, 10, 11, 11], dtype=index_dtype)
    out = k_grouped_gemm(a, b, offsets)
    assert out.dtype == torch.float32
    assert relative_error(out, exact_groups(a, b, offsets)) < 1e-6
    assert not out[1].any() and not out[4].any()


def test_out_is_overwritten_and_accumulate_adds():
    a, b, offsets = randn(9, 32, seed=3), randn(9, 96, seed=4), torch.tensor([0, 4, 4, 9])
    exact = exact_groups(a, b, offsets)
    out = torch.full((3, 32, 96), torch.nan)
    assert k_grouped_gemm(a, b, offsets, out=out) is out
    assert relative_error(out, exact) < 1e-6
    before = randn(3, 32, 96, seed=5, dtype=torch.float32)
    out = before.clone()
    assert k_grouped_gemm(a, b, offsets, out=out, accumulate=True) is out
    assert relative_error(out, exact + before.double()) < 1e-6
    assert torch.equal(out[1], before[1])


def test_no_rows_and_no_groups():
    a, b = randn(0, 32, seed=6), randn(0, 96, seed=7)
    out = k_grouped_gemm(a, b, torch.zeros(3, dtype=torch.int32))
    assert out.shape == (2, 32, 96) and not out.any()
    assert k_grouped_gemm(a, b, torch.zeros(1, dtype=torch.int32)).shape == (0, 32, 96)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_break(backend):
    a, b, offsets = randn(9, 32, seed=8), randn(9, 96, seed=9), torch.tensor([0, 4, 4, 9])
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b, offsets: k_grouped_gemm(a, b, offsets) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(a, b, offsets), k_grouped_gemm(a, b, offsets) + 1)


def test_op_matches_its_schema_and_fake():
    args = (randn(9, 32, seed=10), randn(9, 96, seed=11), torch.tensor([0, 4, 9]), torch.zeros(2, 32, 96), True)
    torch.library.opcheck(torch.ops.megamoe.k_grouped_gemm.default, args, test_utils=("test_schema", "test_faketensor"))


A, B, OFFSETS = randn(6, 32, seed=12), randn(6, 64, seed=13), torch.tensor([0, 2, 6])
ERRORS = [
    (dict(a=A.half()), "a.dtype must be torch.bfloat16 or torch.float32, got torch.float16; convert it with .to(torch.bfloat16)"),
    (dict(b=B[:5]), "b.shape must be [R=6, N], got [5, 64]; sizes of one letter must agree"),
    (dict(b=B[None]), "b.shape must be [R=6, N], got [1, 6, 64]; sizes of one letter must agree"),
    (dict(a=A.T.contiguous().T), "a must be contiguous, got strides (1, 6); call .contiguous()"),
    (dict(b=B.to("meta")), "b.device must be cpu as of the first operand, got meta; move it with .to('cpu')"),
    (dict(a=A.clone().requires_grad_()),
     "a.requires_grad must be False, got True; training is not implemented yet, call it under torch.no_grad()"),
    (dict(offsets=[0, 6]), "offsets must be a tensor, got list; convert it first"),
    (dict(offsets=OFFSETS.float()),
     "offsets.dtype must be torch.int32 or torch.int64, got torch.float32; convert it with .to(torch.int32)"),
    (dict(offsets=OFFSETS[:0]), "offsets must be [G+1] values, got none; pass the cumulative row counts, from 0"),
    (dict(offsets=torch.tensor([0, 7])), "offsets must be non-decreasing from 0 to at most 6, got [0, 7]; pass the cumulative row counts"),
    (dict(out=torch.zeros(3, 32, 64)), "out.shape must be [G=2, M=32, N=64], got [3, 32, 64]; sizes of one letter must agree"),
    (dict(out=torch.zeros(2, 32, 64).bfloat16()),
     "out.dtype must be torch.float32, got torch.bfloat16; convert it with .to(torch.float32)"),
    (dict(accumulate=True), "out must be given with accumulate=True, got None; pass the tensor to add to"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[f"{i}-{message[:24]}" for i, (_, message) in enumerate(ERRORS)])
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"^k_grouped_gemm: {re.escape(message)}$"):
        k_grouped_gemm(**{"a": A, "b": B, "offsets": OFFSETS, **change})
