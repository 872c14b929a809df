"""megamoe.gemm against float64 on operands decoded by the oracle's tables, and the exact messages of its checks."""

import re

import pytest
import torch

from megamoe.formats import quantize_fp4, quantize_fp8, quantize_tokens
from megamoe.kernels import gemm
from megamoe.reference.oracle import decode_e2m1, decode_e4m3, decode_ue8m0, quantize_e4m3
from megamoe.testing.compare import assert_gemm_accepted, relative_error

# (M, N, K): one row, odd sizes, a K that is no multiple of 128, a short last block.
SHAPES = [(1, 32, 32), (7, 96, 2880), (33, 130, 160)]
BF16_ROUNDING = 4e-3  # just above 2^-8, the most that one rounding can move a value


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(k: int) -> torch.Tensor:
    """[k] powers of two that put neighbouring groups of 32 further apart than E4M3 reaches: a wrong group size loses whole channels."""
    return torch.exp2(-18.0 * (torch.arange(k) // 32 % 2)).bfloat16()


def make_x(kind: str, x: torch.Tensor):
    if kind in ("bf16", "fp32"):
        return x if kind == "bf16" else x.float()
    return quantize_tokens(x, group="token" if kind == "token" else int(kind))


def make_w(kind: str, w: torch.Tensor):
    return {"bf16": lambda: w, "fp32": w.float, "fp4": lambda: quantize_fp4(w), "fp8": lambda: quantize_fp8(w)}[kind]()


def exact_x(kind: str, w_kind: str, x: torch.Tensor) -> torch.Tensor:
    """The float64 values that a GEMM must read for `x`."""
    plain_group = {"fp4": 32, "fp8": 128}.get(w_kind)
    group = {"32": 32, "128": 128, "token": "token"}.get(kind, plain_group)
    return x.double() if group is None else quantize_e4m3(x, group)


def exact_w(w) -> torch.Tensor:
    if isinstance(w, torch.Tensor):
        return w.double()
    return (decode_e2m1 if w.codes.dtype == torch.uint8 else decode_e4m3)(w.codes, w.scales)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("w_kind", ["bf16", "fp32", "fp4", "fp8"])
@pytest.mark.parametrize("x_kind", ["bf16", "fp32", "32", "128", "token"])
def test_matches_float64(x_kind, w_kind, shape):
    m, n, k = shape
    x, w = randn(m, k, seed=1) * spread(k), randn(n, k, seed=2) / spread(k)
    bias = randn(n, seed=3)
    w_given = make_w(w_kind, w)
    y = gemm(make_x(x_kind, x), w_given, bias=bias)
    exact = exact_x(x_kind, w_kind, x) @ exact_w(w_given).T + bias.double()
    if x_kind == w_kind == "fp32":
        assert y.dtype == torch.float32
        assert relative_error(y, exact) < 1e-6
    else:
        assert y.dtype == torch.bfloat16
        assert relative_error(y, exact) < BF16_ROUNDING
        assert_gemm_accepted(y, exact, exact.bfloat16())


def test_fp8_weight_with_float_scales():
    x, w = randn(5, 160, seed=4), quantize_fp8(randn(130, 160, seed=5))
    scales = (decode_ue8m0(w.scales) * 1.2345).float()
    y = gemm(x, type(w)(w.codes, scales))
    assert relative_error(y, quantize_e4m3(x, 128) @ decode_e4m3(w.codes, scales).T) < BF16_ROUNDING


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_out_is_overwritten_and_accumulate_rounds_once(out_dtype):
    x, w, before = randn(7, 64, seed=6), randn(96, 64, seed=7), randn(7, 96, seed=8, dtype=out_dtype)
    exact = x.double() @ w.double().T
    out = torch.full((7, 96), torch.nan, dtype=out_dtype)
    assert gemm(x, w, out=out) is out
    assert relative_error(out, exact) < (BF16_ROUNDING if out_dtype == torch.bfloat16 else 1e-6)
    out = before.clone()
    assert gemm(x, w, out=out, accumulate=True) is out
    if out_dtype == torch.bfloat16:
        assert torch.equal(out, (x.float() @ w.float().T + before.float()).bfloat16())
    assert relative_error(out, exact + before.double()) < (BF16_ROUNDING if out_dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("w_kind", ["bf16", "fp4", "fp8"])
def test_no_rows(w_kind):
    assert gemm(randn(0, 64, seed=1), make_w(w_kind, randn(96, 64, seed=2))).shape == (0, 96)


def test_nan_stays_in_its_row():
    x, w = randn(4, 64, seed=9), quantize_fp4(randn(32, 64, seed=10))
    clean = gemm(x, w)
    x[2, 5] = torch.nan
    y = gemm(x, w)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("w_kind", ["bf16", "fp4", "fp8"])
def test_compiles_without_graph_break(w_kind, backend):
    x, w = randn(5, 64, seed=11), make_w(w_kind, randn(32, 64, seed=12))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: gemm(x, w) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, w), gemm(x, w) + 1)
    tokens = quantize_tokens(x, group="token")
    assert torch.equal(compiled(tokens, w), gemm(tokens, w) + 1)


def test_op_matches_its_schema_and_fake():
    x, w, out = randn(5, 64, seed=13), quantize_fp4(randn(32, 64, seed=14)), torch.zeros(5, 32)
    op = torch.ops.megamoe.gemm.default
    torch.library.opcheck(op, (x, None, 0, w.codes, w.scales, None, out, True), test_utils=("test_schema", "test_faketensor"))
    tokens = quantize_tokens(x, group=32)  # torch's own schema test cannot compare float8 inputs
    torch.library.opcheck(op, (tokens.codes, tokens.sf, 32, w.codes, w.scales, None, out, True), test_utils="test_faketensor")


X, W = randn(4, 64, seed=15), randn(32, 64, seed=16)
ERRORS = [
    (dict(x=X.half()), "gemm: x.dtype must be torch.bfloat16 or torch.float32, got torch.float16; convert it with .to(torch.bfloat16)"),
    (dict(x=[1.0]), "gemm: x must be a tensor or QuantizedTokens, got list; convert it first"),
    (dict(x=quantize_tokens(X, group=96)), "gemm: x.group must be one of (32, 128, 'token'), got 96; quantise with such a group"),
    (dict(x=X[None]), "gemm: x.shape must be [M, K], got [1, 4, 64]; sizes of one letter must agree"),
    (dict(x=X.T.contiguous().T), "gemm: x must be contiguous, got strides (1, 4); call .contiguous()"),
    (dict(x=X.clone().requires_grad_()),
     "gemm: x.requires_grad must be False, got True; training is not implemented yet, call it under torch.no_grad()"),
    (dict(w=None), "gemm: w must be a tensor, FP4Weight, FP8Weight or Sm90Weight, got NoneType; convert it first"),
    (dict(w=W.int()), "gemm: w.dtype must be torch.bfloat16 or torch.float32, got torch.int32; convert it with .to(torch.bfloat16)"),
    (dict(w=W[:, :32].contiguous()), "gemm: w.shape must be [N, K=64], got [32, 32]; sizes of one letter must agree"),
    (dict(w=quantize_fp4(W[:, :32])), "gemm: w.shape must be [N, K=64], got [32, 32]; sizes of one letter must agree"),
    (dict(w=W.to("meta")), "gemm: w.device must be cpu as of the first operand, got meta; move it with .to('cpu')"),
    (dict(w=quantize_fp4(W).to("meta")), "gemm: w.codes.device must be cpu as of the first operand, got meta; move it with .to('cpu')"),
    (dict(bias=X[0]), "gemm: bias.shape must be [N=32], got [64]; sizes of one letter must agree"),
    (dict(out=X), "gemm: out.shape must be [M=4, N=32], got [4, 64]; sizes of one letter must agree"),
    (dict(out=X[:, :32].contiguous().half()),
     "gemm: out.dtype must be torch.bfloat16 or torch.float32, got torch.float16; convert it with .to(torch.bfloat16)"),
    (dict(accumulate=True), "gemm: out must be given with accumulate=True, got None; pass the tensor to add to"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[6:40] for _, message in ERRORS])
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gemm(**{"x": X, "w": W, **change})


def test_gradients_may_be_switched_off():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(gemm(x, W), gemm(X, W))
