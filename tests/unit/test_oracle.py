"""The FP64 oracle: its number formats against ml_dtypes, its layer against loops over scalars, its independence from the rest."""

import ast
import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from megamoe.formats import quantize_fp4, quantize_fp8, quantize_tokens
from megamoe.reference import oracle
from megamoe.reference.oracle import moe_oracle
from megamoe.testing.compare import error_report, relative_error

ACT_GROUPS = [32, 64, 96, 128, "token"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread(num_channels: int) -> torch.Tensor:
    """[C] powers of two that put neighbouring groups of 32 further apart than E4M3 reaches: a wrong group size loses whole channels."""
    return torch.exp2(-18.0 * (torch.arange(num_channels) // 32 % 2)).bfloat16()


def random_layer(seed: int, num_tokens: int = 9, hidden: int = 64, intermediate: int = 160, num_experts: int = 4, num_topk: int = 2):
    """x, topk_idx, topk_weights, gate_up, down; about one slot in five is -1, and both quantised inputs have spread channels."""
    g = generator(seed)
    x = torch.randn(num_tokens, hidden, generator=g).bfloat16() * spread(hidden)
    topk_idx = torch.stack([torch.randperm(num_experts, generator=g)[:num_topk] for _ in range(num_tokens)])
    topk_idx[torch.rand(topk_idx.shape, generator=g) < 0.2] = -1
    topk_weights = torch.rand(num_tokens, num_topk, generator=g)
    gate_up = (torch.randn(num_experts, 2 * intermediate, hidden, generator=g) * hidden**-0.5).bfloat16() / spread(hidden)
    gate_up[:, intermediate:] *= spread(intermediate)[:, None]
    down = (torch.randn(num_experts, hidden, intermediate, generator=g) * intermediate**-0.5).bfloat16() / spread(intermediate)
    return x, topk_idx, topk_weights, gate_up, down


def test_imports_only_torch():
    imported = set()
    for node in ast.walk(ast.parse(Path(oracle.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"torch"}


def test_e4m3_table_is_the_format():
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert oracle.E4M3_POSITIVE.tolist() == codes.tolist()


def test_e4m3_rounding_on_every_value_midpoint_and_neighbour():
    # Row maximum 448 makes the scale 1, so the row is rounded as it is.
    points = torch.cat((oracle.E4M3_POSITIVE, oracle.E4M3_MIDPOINTS)).float()
    zero, limit = torch.tensor(0.0), torch.tensor(448.0)
    points = torch.cat((points, points.nextafter(zero), points.nextafter(limit)))
    row = torch.cat((points, -points))
    want = row.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert oracle.quantize_e4m3(row[None], "token")[0].tolist() == want.tolist()


@pytest.mark.parametrize(
    ("amax", "scale"), [(448.0, 1.0), (448.0000305, 2.0), (447.9, 1.0), (224.0, 0.5), (0.0, 2.0**-22), (5e-5, 2.0**-22)]
)
def test_e4m3_scale(amax, scale):
    # 2^-9 * scale is the smallest step: it survives, half of it rounds to the even zero.
    row = torch.tensor([[amax, scale * 2.0**-9, scale * 2.0**-10, -scale * 2.0**-9]])
    assert oracle.quantize_e4m3(row, "token")[0, 1:].tolist() == [scale * 2.0**-9, 0.0, -scale * 2.0**-9]


@pytest.mark.parametrize("group", ACT_GROUPS)
def test_e4m3_agrees_with_formats_bit_for_bit(group):
    x = torch.randn(16, 160, generator=generator(2)) * torch.exp2(torch.randint(-30, 30, (16, 1), generator=generator(3)))
    x[3] = 0.0
    x[5, 7], x[6, 9] = math.nan, math.inf
    ours, theirs = oracle.quantize_e4m3(x, group), quantize_tokens(x, group=group).dequantize().double()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert ours.isnan().sum() == 2


def test_decode_e2m1_on_every_byte():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scales = torch.tensor([[0, 1, 126, 127, 128, 200, 253, 254]], dtype=torch.uint8).repeat(2, 1)
    nibbles = np.stack((codes.numpy() & 15, codes.numpy() >> 4), -1).reshape(2, 256)
    want = nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    want *= scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64).repeat(32, axis=1)
    assert oracle.decode_e2m1(codes, scales).tolist() == want.tolist()


@pytest.mark.parametrize("scale_dtype", [torch.uint8, torch.float32])
def test_decode_e4m3_on_every_code_and_short_blocks(scale_dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(130, 1)[:, :200].contiguous()  # blocks [128 + 2, 128 + 72]
    scales = torch.tensor([[120, 127], [130, 140]], dtype=torch.uint8)
    factors = torch.exp2(scales.double() - 127)
    got = oracle.decode_e4m3(codes.view(torch.float8_e4m3fn), scales if scale_dtype == torch.uint8 else factors.float())
    want = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    for row, column in ((0, 0), (0, 199), (129, 0), (129, 199)):
        np.testing.assert_equal(got[row, column].item(), want[row, column] * factors[row // 128, column // 128].item())
    assert got.isnan().equal(torch.from_numpy(np.isnan(want)))


def scalar_layer(x, topk_idx, topk_weights, gate_up, down, gate_up_bias, down_bias, round_x, round_a, limit, alpha, up_bias):
    """The contract written slot by slot; all tensors float64."""
    y = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for slot, expert in enumerate(topk_idx[token].tolist()):
            if not 0 <= expert < gate_up.shape[0]:
                continue
            weight = topk_weights[token, slot].double()
            h = gate_up[expert] @ round_x(x[token]) + gate_up_bias[expert]
            a = torch.zeros(down.shape[2], dtype=torch.float64)
            for i in range(down.shape[2]):
                gate, up = h[i].item(), h[down.shape[2] + i].item()
                if limit is not None:
                    gate, up = min(gate, limit), max(-limit, min(up, limit))
                sigmoid = 1 / (1 + math.exp(-(alpha or 1.0) * gate))
                a[i] = gate * sigmoid * (up + (up_bias if alpha else 0.0)) * weight
            y[token] += down[expert] @ round_a(a) + weight * down_bias[expert]
    return y


def rounders(precision, act_group):
    """How the contract's steps 1 and 4 round a vector, by the formats package (checked against ml_dtypes in its own tests)."""
    if precision == "fp32":
        return (lambda v: v), (lambda v: v)
    if precision == "bf16":
        return (lambda v: v.bfloat16().double()), (lambda v: v.bfloat16().double())
    return tuple(lambda v, group=group: quantize_tokens(v[None].float(), group=group).dequantize()[0].double() for group in (32, act_group))


@pytest.mark.parametrize(("limit", "alpha", "up_bias"), [(None, None, 0.0), (0.5, None, 0.0), (0.7, 1.702, 1.0)])
@pytest.mark.parametrize(
    ("precision", "act_group"), [*(("fp8xfp4", group) for group in ACT_GROUPS), ("fp8xfp8", 128), ("bf16", 128), ("fp32", 128)]
)
def test_layer_matches_scalar_loops(precision, act_group, limit, alpha, up_bias):
    x, topk_idx, topk_weights, gate_up, down = random_layer(4)
    topk_idx[2, 0] = 99
    gate_up_bias, down_bias = torch.randn(4, 320, generator=generator(5)), torch.randn(4, 64, generator=generator(6))
    gate_up_bias[:, 160:] *= spread(160)
    given_gate_up, given_down = gate_up, down
    if precision == "fp8xfp4":
        packed = [quantize_fp4(w) for w in (gate_up, down)]
    elif precision == "fp8xfp8":
        packed = [quantize_fp8(w) for w in (gate_up, down)]
    if precision.startswith("fp8"):
        given_gate_up, given_down = ((w.codes, w.scales) for w in packed)
        gate_up, down = (w.dequantize() for w in packed)
    y = moe_oracle(
        x, topk_idx, topk_weights, given_gate_up, given_down, gate_up_bias=gate_up_bias, down_bias=down_bias, precision=precision,
        act_group=act_group, swiglu_limit=limit, swiglu_alpha=alpha, swiglu_up_bias=up_bias,
    )
    want = scalar_layer(
        x.double(), topk_idx, topk_weights, gate_up.double(), down.double(), gate_up_bias.double(), down_bias.double(),
        *rounders(precision, act_group), limit, alpha, up_bias,
    )
    assert y.dtype == torch.float64
    # The loop quantises a from FP32, so a value on a rounding boundary may differ: rare, and far below one slot.
    assert relative_error(y, want) < (2e-3 if precision.startswith("fp8") else 1e-12)


def test_unquantised_takes_inputs_as_given():
    x, topk_idx, topk_weights, gate_up, down = random_layer(7)
    x, gate_up, down = x.float() + 1e-5, gate_up.float() + 1e-5, down.float() + 1e-5
    exact = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision="bf16", act_group=32, quantized=False)
    zero = torch.zeros(4, 1, dtype=torch.float64)
    want = scalar_layer(
        x.double(), topk_idx, topk_weights, gate_up.double(), down.double(), zero, zero, *rounders("fp32", None), None, None, 0.0
    )
    assert relative_error(exact, want) < 1e-12
    rounded = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision="bf16", act_group=32)
    assert 1e-4 < relative_error(rounded, exact) < 1e-2


def test_float_weights_round_to_bf16_only_in_bf16():
    x, topk_idx, topk_weights, gate_up, down = random_layer(8)
    fine = gate_up.float() * (1 + 2.0**-10)
    same = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision="bf16", act_group=32)
    assert torch.equal(moe_oracle(x, topk_idx, topk_weights, fine, down, precision="bf16", act_group=32), same)
    in_fp32 = [moe_oracle(x, topk_idx, topk_weights, w, down, precision="fp32", act_group=32) for w in (fine, gate_up)]
    assert not torch.equal(*in_fp32)


def test_tokens_without_experts_are_zero_and_no_tokens_are_fine():
    x, topk_idx, topk_weights, gate_up, down = random_layer(9)
    topk_idx[3] = torch.tensor([-1, 4])
    x[3] = math.nan
    y = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision="fp8xfp4", act_group=32)
    assert y[3].tolist() == [0.0] * 64
    assert y.isfinite().all()
    for precision in ("fp8xfp4", "bf16"):
        none = moe_oracle(x[:0], topk_idx[:0], topk_weights[:0], gate_up, down, precision=precision, act_group=32)
        assert none.shape == (0, 64)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp8xfp4", "bf16", "fp32"])
def test_nan_and_inf_fill_their_token_and_no_other(precision, bad):
    x, topk_idx, topk_weights, gate_up, down = random_layer(10)
    topk_idx[:, 0] = 1
    gate_up[:, :, 11] = gate_up[:, :, 11].abs()  # Inf reaches every gate with one sign, so that the clamp could hide it
    clean = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision=precision, act_group=96, swiglu_limit=1.0)
    x[4, 11] = bad
    y = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision=precision, act_group=96, swiglu_limit=1.0)
    assert y[4].isnan().all()
    others = torch.arange(9) != 4
    # Tolerance: a GEMM may order its sums otherwise when a neighbouring row changes.
    torch.testing.assert_close(y[others], clean[others], rtol=1e-12, atol=1e-14)


def test_one_expert_in_two_slots_counts_twice():
    x, _, _, gate_up, down = random_layer(11, num_tokens=3)
    once = moe_oracle(x, torch.full((3, 1), 2), torch.ones(3, 1), gate_up, down, precision="fp32", act_group=32)
    twice = moe_oracle(x, torch.full((3, 2), 2), torch.ones(3, 2), gate_up, down, precision="fp32", act_group=32)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=1e-14)


def test_row_chunks_change_nothing(monkeypatch):
    layer = random_layer(12, num_tokens=13)
    whole = moe_oracle(*layer, precision="fp8xfp4", act_group=64)
    monkeypatch.setattr(oracle, "ROW_CHUNK", 2)
    torch.testing.assert_close(moe_oracle(*layer, precision="fp8xfp4", act_group=64), whole, rtol=1e-12, atol=1e-14)


def test_a_lost_slot_is_seen():
    x, topk_idx, topk_weights, gate_up, down = random_layer(13, num_topk=3)
    topk_idx[5], topk_weights[5] = torch.tensor([0, 1, 2]), torch.tensor([0.3, 0.3, 0.3])
    whole = moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision="fp8xfp4", act_group=32)
    topk_idx[5, 1] = -1
    report = error_report(moe_oracle(x, topk_idx, topk_weights, gate_up, down, precision="fp8xfp4", act_group=32), whole)
    assert report.worst_token == 5
    assert report.max > 0.3


def test_unknown_precision_raises():
    message = "moe_oracle: precision must be one of ('fp8xfp4', 'fp8xfp8', 'bf16', 'fp32'), got 'fp4'; pick one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        moe_oracle(*random_layer(14), precision="fp4", act_group=32)
