"""The public ops and modules on an Sm90Weight without a Hopper GPU: the same numbers as float64, the exact messages, round trips."""

import re

import pytest
import torch

import megamoe
from megamoe.formats import QuantizedTokens, fp8, layout_sm90, quantize_fp4, quantize_tokens
from megamoe.kernels import device_errors, gemm, grouped_gemm, grouped_gemm_swiglu
from megamoe.layers.grouped import GroupedFP4Linear
from megamoe.layers.linear import FP4Linear
from megamoe.reference.fold_tokens import fold_tokens
from megamoe.reference.oracle import decode_e2m1, quantize_e4m3
from megamoe.testing.compare import relative_error

BF16_ROUNDING = 4e-3  # just above 2^-8, the most that one rounding can move a value
INDEX = torch.tensor([0, 0, 2, -1, 2])
OFFSETS = torch.tensor([0, 2, 2, 4])
COUNTS = torch.tensor([2, 0, 1])
GROUPS = [0, 0, 2, -1, 2]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(w, group: int) -> torch.Tensor:
    return decode_e2m1(w.codes[group], w.scales[group])


def exact_rows(values: torch.Tensor, w, groups: list[int]) -> torch.Tensor:
    rows = [exact(w, max(group, 0)) @ row * (group >= 0) for row, group in zip(values, groups, strict=True)]
    return torch.stack(rows)


def test_fold_tokens_by_hand():
    one = 0x38  # 1.0
    # Scales 2^0, 2^-3, 2^-9, 2^-10 and 2^-30: 1.0 becomes 2^-3, the smallest denormal 2^-9, half of it (a tie to even: 0), 0.
    codes = torch.tensor([[one, 0x7F, 0xB8] + [0] * 29] * 5, dtype=torch.uint8)
    codes[3, 1] = 0x39  # 1.125 * 2^-10 is above the tie
    sf = torch.tensor([[127, 124, 118, 117, 97]], dtype=torch.uint8)
    folded = fold_tokens(QuantizedTokens(codes.view(1, 160).view(torch.float8_e4m3fn), sf, 32))
    assert folded.group == "token" and folded.sf.tolist() == [[127]]
    got = folded.codes.view(torch.uint8).view(5, 32)
    assert got[:, 0].tolist() == [0x38, 0x20, 0x01, 0x00, 0x00]
    assert got[:, 2].tolist() == [0xB8, 0xA0, 0x81, 0x80, 0x80]
    assert got[3, 1] == 0x01 and (got[[0, 1, 2, 4], 1] & 0x7F).tolist() == [0x7F] * 4


@pytest.mark.parametrize("group", [32, 128])
def test_fold_tokens_rounds_each_value_once(group):
    x = quantize_tokens(randn(7, 416, seed=1) * torch.logspace(-6, 1, 416), group)
    folded = fold_tokens(x)
    scale = torch.exp2(folded.sf.double() - 127)
    assert torch.equal(folded.sf, x.sf.amax(1, keepdim=True))
    assert torch.equal(folded.codes.float(), fp8.encode_e4m3((x.dequantize().double() / scale).float()).float())
    token = quantize_tokens(randn(7, 416, seed=1), "token")
    assert fold_tokens(token) is token


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("n", [32, 96])
def test_gemm(n, accumulate):
    x, w, before = randn(5, 160, seed=2), quantize_fp4(randn(1, n, 160, seed=3)), randn(5, n, seed=4)
    expected = quantize_e4m3(x, "token") @ exact(w, 0).T + (before.double() if accumulate else 0)
    out = before.clone() if accumulate else None
    y = gemm(x, layout_sm90.pack(w, False), out=out, accumulate=accumulate)
    assert y.dtype == torch.bfloat16 and (out is None or y is out)
    assert relative_error(y, expected) < BF16_ROUNDING


@pytest.mark.parametrize("group", [None, 32, 128, "token"])
def test_grouped_gemm(group):
    x, w = randn(5, 160, seed=5), quantize_fp4(randn(3, 96, 160, seed=6))
    packed = layout_sm90.pack(w, False)
    tokens = x if group is None else quantize_tokens(x, group)
    values = quantize_e4m3(x, "token") if group is None else fold_tokens(tokens).dequantize().double()
    expected = exact_rows(values, w, GROUPS)
    by_row = grouped_gemm(tokens, packed, expert_idx=INDEX, rows_hint=2)
    assert relative_error(by_row, expected) < BF16_ROUNDING and not by_row[3].any()
    by_offsets = grouped_gemm(tokens, packed, offsets=OFFSETS)
    assert relative_error(by_offsets, exact_rows(values, w, [0, 0, 2, 2, -1])) < BF16_ROUNDING


def swiglu_exact(values, w, groups, bias, row_weight, limit, alpha, up_bias):
    product = exact_rows(values, w, groups) + bias.double()[groups] * (torch.tensor(groups) >= 0)[:, None]
    gate, up = product.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid((1.0 if alpha is None else alpha) * gate) * (up + up_bias) * row_weight.double()[:, None] * (
        torch.tensor(groups) >= 0)[:, None]


@pytest.mark.parametrize("form", ["canonical", "packed"])
@pytest.mark.parametrize(("limit", "alpha", "up_bias"), [(None, None, 0.0), (1.5, None, 0.0), (7.0, 1.702, 1.0)])
def test_grouped_gemm_swiglu(form, limit, alpha, up_bias):
    x, w, bias = randn(5, 160, seed=7), quantize_fp4(randn(3, 192, 160, seed=8) / 8), randn(3, 192, seed=9)
    row_weight = randn(5, seed=10).float()
    values = quantize_e4m3(x, 32 if form == "canonical" else "token")
    expected = quantize_e4m3(swiglu_exact(values, w, GROUPS, bias, row_weight, limit, alpha, up_bias), 32)
    given = w if form == "canonical" else layout_sm90.pack(w, True)
    act = grouped_gemm_swiglu(x, given, expert_idx=INDEX, bias=bias, row_weight=row_weight, limit=limit, alpha=alpha, up_bias=up_bias)
    assert act.group == 32 and act.shape == (5, 96)
    # The same values but where FP32 rounds across a boundary of E4M3.
    assert relative_error(act.dequantize(), expected) < 0.01
    assert not act.dequantize()[3].any() and act.sf[3].tolist() == quantize_tokens(torch.zeros(1, 96)).sf[0].tolist()


def test_grouped_gemm_swiglu_masked_and_empty():
    x, w = randn(3, 2, 64, seed=11), quantize_fp4(randn(3, 64, 64, seed=12))
    act = grouped_gemm_swiglu(x, w, num_rows=COUNTS)
    flat = grouped_gemm_swiglu(x.flatten(0, 1), w, expert_idx=torch.tensor([0, 0, -1, -1, 2, -1]))
    assert torch.equal(act.dequantize().flatten(0, 1), flat.dequantize()) and flat.dequantize()[4].any()
    assert grouped_gemm_swiglu(x[0, :0], w, offsets=torch.zeros(4, dtype=torch.int32)).shape == (0, 32)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_break(backend):
    x, w = randn(5, 64, seed=13), quantize_fp4(randn(3, 64, 64, seed=14))
    for given in (w, layout_sm90.pack(w, True)):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, w: grouped_gemm_swiglu(x, w, expert_idx=INDEX).dequantize(), fullgraph=True, backend=backend)
        assert torch.equal(compiled(x, given), grouped_gemm_swiglu(x, given, expert_idx=INDEX).dequantize())
    packed = layout_sm90.pack(w, False)
    compiled = torch.compile(lambda x, w: grouped_gemm(x, w, expert_idx=INDEX) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, packed), grouped_gemm(x, packed, expert_idx=INDEX) + 1)


def test_op_matches_its_schema_and_fake():
    w = layout_sm90.pack(quantize_fp4(randn(3, 64, 64, seed=15)), True)
    outs = torch.zeros(5, 32, dtype=torch.float8_e4m3fn), torch.zeros(5, 1, dtype=torch.uint8)
    args = (randn(5, 64, seed=16), None, 0, w.blocks, w.row_base, INDEX, None, None, None, None, None, None, 0.0, None, *outs)
    torch.library.opcheck(torch.ops.megamoe.grouped_gemm_swiglu.default, args, test_utils="test_faketensor")


@pytest.mark.parametrize("bias", [False, True])
def test_fp4_linear_packed(bias):
    layer = FP4Linear(160, 96, bias=bias)
    w = quantize_fp4(randn(96, 160, seed=17))
    layer.load_state_dict({"codes": w.codes, "scales": w.scales} | ({"bias": randn(96, seed=18)} if bias else {}))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.pack_weight()
    assert layer.codes is None and layer.scales is None and layer.blocks.shape == (1, 2, 2, 4352)
    x = randn(2, 3, 160, seed=19)
    expected = quantize_e4m3(x.view(6, 160), "token") @ decode_e2m1(w.codes, w.scales).T + (layer.bias.double() if bias else 0)
    assert relative_error(layer(x).view(6, 96), expected) < BF16_ROUNDING
    packed = layer.state_dict()
    assert sorted(packed) == sorted(state) and all(torch.equal(packed[name], state[name]) for name in state)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    layer.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert layer.blocks is None and not layer(x).any()


@pytest.mark.parametrize(("grouping", "groups"), [
    ({"expert_idx": INDEX}, GROUPS), ({"offsets": OFFSETS.int()}, [0, 0, 2, 2, -1]), ({"num_rows": COUNTS}, [0, 0, -1, -1, 2, -1]),
], ids=["expert_idx", "offsets", "num_rows"])
def test_grouped_fp4_linear_packed_with_bias(grouping, groups):
    w, bias = randn(3, 32, 64, seed=20), randn(3, 32, seed=21)
    x = randn(3, 2, 64, seed=22) if "num_rows" in grouping else randn(5, 64, seed=22)
    layer = GroupedFP4Linear.from_tensor(w, bias)
    state = layer.state_dict()
    layer.pack_weight()
    expected = exact_rows(quantize_e4m3(x.view(-1, 64), "token"), quantize_fp4(w), groups)
    expected += torch.where((torch.tensor(groups) >= 0)[:, None], bias.double()[groups], 0)
    assert relative_error(layer(x, **grouping).view(-1, 32), expected) < BF16_ROUNDING
    assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)
    message = "grouped_gemm: grouping must be exactly one of expert_idx, offsets and num_rows, got None; pass one of them"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer(x)


X, FP4 = randn(5, 64, seed=23), quantize_fp4(randn(3, 64, 64, seed=24))
PLAIN, INTERLEAVED = layout_sm90.pack(FP4, False), layout_sm90.pack(FP4, True)
THREAD_ORDER = layout_sm90.pack(FP4, False, thread_order=True)
ODD = layout_sm90.pack(quantize_fp4(randn(3, 130, 64, seed=25)), False)
ERRORS = [
    (gemm, dict(w=PLAIN), "gemm: w.shape must be [N, K=64], got [3, 64, 64]; sizes of one letter must agree"),
    (grouped_gemm, dict(w=PLAIN, bias=randn(3, 32, seed=1)),
     "grouped_gemm: bias.shape must be [G=3, N=64], got [3, 32]; sizes of one letter must agree"),
    (grouped_gemm, dict(w=PLAIN, out=torch.zeros(5, 64)),
     "grouped_gemm: out.dtype must be torch.bfloat16, got torch.float32; convert it with .to(torch.bfloat16)"),
    (grouped_gemm, dict(w=INTERLEAVED),
     "grouped_gemm: w.interleaved must be False, got True; pack it with interleave_gate_up=False"),
    (grouped_gemm, dict(w=THREAD_ORDER), "grouped_gemm: w.thread_order must be False, got True; pack it with thread_order=False, the order of "
     "the tokens"),
    (grouped_gemm, dict(w=ODD), "grouped_gemm: w.shape[-2] must be a multiple of 32, got 130; pad the weight with zeros before packing it"),
    (grouped_gemm, dict(w=PLAIN, rows_hint=-1), "grouped_gemm: rows_hint must be at least 0, got -1; pass the expected rows per group"),
    (grouped_gemm, dict(w=PLAIN, expert_idx=INDEX + 1), "grouped_gemm: expert_idx[2] must be in [-1, 2], got 3; -1 marks a padding row"),
    (grouped_gemm, dict(w=PLAIN.to("meta")),
     "grouped_gemm: w.blocks.device must be cpu as of the first operand, got meta; move it with .to('cpu')"),
    (grouped_gemm_swiglu, dict(w=PLAIN),
     "grouped_gemm_swiglu: w.interleaved must be True, got False; pack it with interleave_gate_up=True"),
    (grouped_gemm_swiglu, dict(w=X),
     "grouped_gemm_swiglu: w must be an FP4Weight or Sm90Weight, got Tensor; quantise it with quantize_fp4"),
    (grouped_gemm_swiglu, dict(w=quantize_fp4(randn(3, 96, 64, seed=26))),
     "grouped_gemm_swiglu: 2I must be a multiple of 64, got 96; pad I with zeros"),
    (grouped_gemm_swiglu, dict(w=FP4, expert_idx=INDEX + 1),
     "grouped_gemm_swiglu: expert_idx[2] must be in [-1, 2], got 3; -1 marks a padding row"),
    (grouped_gemm_swiglu, dict(w=FP4, offsets=OFFSETS),
     "grouped_gemm_swiglu: grouping must be exactly one of expert_idx, offsets and num_rows, got ['expert_idx', 'offsets']; "
     "pass one of them"),
    (grouped_gemm_swiglu, dict(w=FP4, row_weight=X[:, 0].contiguous()),
     "grouped_gemm_swiglu: row_weight.dtype must be torch.float32, got torch.bfloat16; convert it with .to(torch.float32)"),
    (grouped_gemm_swiglu, dict(w=FP4, limit=0.0), "grouped_gemm_swiglu: limit must be positive or None, got 0.0; None does not clamp"),
    (grouped_gemm_swiglu, dict(w=FP4, up_bias=1.0), "grouped_gemm_swiglu: up_bias must be 0 without alpha, got 1.0; pass alpha too"),
]


@pytest.mark.parametrize(("op", "change", "message"), ERRORS, ids=[f"{i}-{message[:40]}" for i, (_, _, message) in enumerate(ERRORS)])
def test_errors(op, change, message):
    given = {"x": X} | ({} if op is gemm else {"expert_idx": INDEX}) | change
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op(**given)


def test_check_without_a_gpu_has_nothing_to_say(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    megamoe.check()
    megamoe.check("cpu")


class Reports(device_errors._Reports):
    """The slots of a device that is not there."""

    def __init__(self):
        slots = len(device_errors.OPS) * len(device_errors.KINDS)
        self.first, self.host_flags = torch.full((slots,), -1, dtype=torch.int64), (device_errors.ctypes.c_uint32 * slots)()
        self.no_flags = bytes(4 * slots)

    def report(self, slot: int, index: int, value: int) -> None:
        self.first[slot] = index << 32 | value & 0xFFFFFFFF
        self.host_flags[slot] = 1


def test_reports_raise_one_by_one(monkeypatch):
    reports = Reports()
    monkeypatch.setattr(device_errors, "_reports", lambda device: reports)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    device_errors.raise_pending(0)
    swiglu = len(device_errors.KINDS)
    for slot, (index, value) in {0: (7, 9), 1: (3, -5), swiglu + 2: (2, -2**31), swiglu + 3: (1, 2**31 - 1)}.items():
        reports.report(slot, index, value)
    for message in (
        "grouped_gemm: expert_idx[7] must be in [-1, G), got 9; -1 marks a padding row",
        "grouped_gemm: expert_idx[3] must be next to the other rows of its group, got group -5 again; sort the rows by group",
        "grouped_gemm_swiglu: offsets[2] must be non-decreasing from 0 to at most M, got -2147483648; pass the cumulative row counts",
        "grouped_gemm_swiglu: num_rows[1] must be in [0, Mmax], got 2147483647; a group has at most Mmax rows",
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            device_errors.raise_pending(0)
    device_errors.raise_pending(0)
    assert (reports.first == -1).all()
