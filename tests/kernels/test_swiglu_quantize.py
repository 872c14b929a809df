"""megamoe.swiglu_quantize against FP64 and its plain-torch twin, refusals. On the CPU the op is the twin."""

import math
import re

import pytest
import torch

import megamoe
from megamoe import formats
from megamoe.formats import QuantizedTokens
from megamoe.reference.swiglu_quantize import swiglu_quantize as twin
from megamoe.testing.compare import assert_gemm_accepted

on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90")
DEVICES = ["cpu", pytest.param("cuda", marks=on_hopper)]
GROUPS = [32, 128, "token"]
FORMS = [{}, {"limit": 2.0}, {"alpha": 1.702, "up_bias": 1.0, "limit": 7.0}]


def inputs(m: int, i: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(m, 2 * i, generator=g)).to(dtype), torch.rand(m, generator=g) * 2.0 ** torch.randint(-8, 4, (m,), generator=g)


def exact(gate_up, row_weight, limit=None, alpha=None, up_bias=0.0) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    act = gate * torch.sigmoid((1.0 if alpha is None else alpha) * gate) * (up + up_bias)
    return act if row_weight is None else act * row_weight.double()[:, None]


def assert_close(got: QuantizedTokens, expected: QuantizedTokens) -> None:
    """Equal but for values next to a rounding boundary, which may be one step of E4M3 apart."""
    a, b = got.dequantize().cpu(), expected.dequantize()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
    width = a.shape[-1] if got.group == "token" else got.group
    smallest = formats.ue8m0.decode(torch.maximum(got.sf.cpu(), expected.sf)).repeat_interleave(width, dim=1)[:, : a.shape[1]] * 2.0**-9
    assert ((a - b).abs() <= torch.maximum(b.abs() / 8, smallest)).all()
    assert (a != b).sum() <= 1 + a.numel() / 1000


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", FORMS, ids=["silu", "clamped", "alpha"])
@pytest.mark.parametrize(("m", "i"), [(1, 32), (131, 96), (64, 768), (9, 2880), (33, 3072), (3, 14336)])
def test_matches_the_formula(m, i, form, group, dtype, device):
    gate_up, row_weight = inputs(m, i, dtype)
    for weight in (None, row_weight):
        torch.full((1 << 20,), math.nan, device=device)  # where the next outputs may lie
        got = megamoe.swiglu_quantize(gate_up.to(device), row_weight=None if weight is None else weight.to(device), group=group, **form)
        expected = twin(gate_up, row_weight=weight, group=group, **form)
        assert got.group == group and got.codes.shape == (m, i)
        assert_close(got, expected)
        assert_gemm_accepted(got.dequantize().cpu(), exact(gate_up, weight, **form), expected.dequantize())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", FORMS, ids=["silu", "clamped", "alpha"])
def test_nan_and_inf(form, group, device):
    gate_up, row_weight = inputs(8, 160)
    gate_up[0], gate_up[1, 3], gate_up[2, 163] = 0, math.nan, math.nan
    gate_up[3, 40], gate_up[4, 41], gate_up[5, 200] = math.inf, -math.inf, -math.inf
    gate_up[6, 7], gate_up[6, 8], row_weight[7] = -1e5, 1e5, math.inf
    got = megamoe.swiglu_quantize(gate_up.to(device), row_weight=row_weight.to(device), group=group, **form)
    assert_close(got, twin(gate_up, row_weight=row_weight, group=group, **form))
    assert got.dequantize()[1:3].isnan().sum() == 2, "a NaN stays in its channel and passes the clamp"


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device):
    for group, num_sf in ((32, 3), (128, 1), ("token", 1)):
        got = megamoe.swiglu_quantize(torch.zeros(0, 192, device=device), group=group)
        assert got.codes.shape == (0, 96) and got.sf.shape == (0, num_sf)


@on_hopper
@pytest.mark.parametrize("group", GROUPS)
def test_runs_are_equal_and_graphs_replay(group):
    gate_up, row_weight = (v.cuda() for v in inputs(4096, 3072))

    def run() -> QuantizedTokens:
        return megamoe.swiglu_quantize(gate_up, row_weight=row_weight, limit=10.0, group=group)

    first, again, graph = run(), run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.codes.view(torch.uint8).fill_(0x7F)
    captured.sf.fill_(255)
    graph.replay()
    for other in (again, captured):
        assert torch.equal(other.codes.view(torch.uint8), first.codes.view(torch.uint8)) and torch.equal(other.sf, first.sf)


@on_hopper
def test_more_than_two_to_the_31_bytes():
    gate_up = torch.zeros(240_000, 6144, dtype=torch.bfloat16, device="cuda")  # 2.9 GB
    last, _ = inputs(1, 3072)
    gate_up[-1] = last[0].cuda()
    for group in GROUPS:
        got = megamoe.swiglu_quantize(gate_up, group=group)
        assert_close(QuantizedTokens(got.codes[-1:], got.sf[-1:], group), twin(last, group=group))
        assert not got.codes.view(torch.uint8)[:-1].any()


def test_the_op_matches_its_fake_and_compiles():
    (x, weight), out = inputs(3, 64), formats.quantize_tokens(torch.zeros(3, 64))
    args = (x, weight, 7.0, None, 0.0, 32, out.codes, out.sf)
    torch.library.opcheck(torch.ops.megamoe.swiglu_quantize.default, args, test_utils="test_faketensor")
    compiled = torch.compile(lambda v: megamoe.swiglu_quantize(v, limit=7.0).sf, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), twin(x, limit=7.0).sf)


X = torch.zeros(4, 128, dtype=torch.bfloat16)
ERRORS = [
    (dict(gate_up=X.half()),
     "gate_up.dtype must be torch.bfloat16 or torch.float32, got torch.float16; convert it with .to(torch.bfloat16)"),
    (dict(gate_up=X[0]), "gate_up.shape must be [M, 2I], got [128]; sizes of one letter must agree"),
    (dict(gate_up=X[:, :96]), "gate_up must be contiguous, got strides (128, 1); call .contiguous()"),
    (dict(gate_up=X[:, :96].clone()), "2I must be a positive multiple of 64, got 96; pad I with zeros"),
    (dict(gate_up=X[:, :0].clone()), "2I must be a positive multiple of 64, got 0; pad I with zeros"),
    (dict(gate_up=X.clone().requires_grad_()),
     "gate_up.requires_grad must be False, got True; training is not implemented yet, call it under torch.no_grad()"),
    (dict(row_weight=torch.ones(3)), "row_weight.shape must be [M=4], got [3]; sizes of one letter must agree"),
    (dict(row_weight=torch.ones(4).bfloat16()),
     "row_weight.dtype must be torch.float32, got torch.bfloat16; convert it with .to(torch.float32)"),
    (dict(limit=0.0), "limit must be positive or None, got 0.0; None does not clamp"),
    (dict(up_bias=1.0), "up_bias must be 0 without alpha, got 1.0; pass alpha too"),
    (dict(group=64), "group must be one of (32, 128, 'token'), got 64; pick one of them"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:24] for _, message in ERRORS])
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape('swiglu_quantize: ' + message)}$"):
        megamoe.swiglu_quantize(**({"gate_up": X} | change))


@on_hopper
def test_misaligned_rows_are_refused():
    x = torch.zeros(1 + 2 * 64, dtype=torch.bfloat16, device="cuda")[1:].view(1, 128)
    message = "swiglu_quantize: gate_up.data_ptr() must be a multiple of 16, got 2 more than one; copy it with .clone()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        megamoe.swiglu_quantize(x)
