"""What fp4_gemm does with its sums beside storing them: a weighted bias, and rows scattered to addresses. Against float64, on a Hopper GPU.

Legend: R rows, G groups, N weight rows, K input channels.
"""

import re

import pytest
import torch

from megamoe.kernels import gemm, grouped_gemm
from megamoe.kernels.fp4_gemm import allocate_workspace, fp4_gemm
from megamoe.kernels.fp4_gemm_config import with_most_stages
from megamoe.testing.compare import relative_error
from tests.kernels.test_fp4_gemm import BF16_ROUNDING, exact, index_of, make_x, poisoned, randn, weight

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
COUNTS = [0, 45, 3, 104]
CONFIGS = [with_most_stages(num_math_warpgroups=number, token_tiles=tiles, max_groups=8) for number, tiles in (
    (4, (16, 48)), (3, (48, 72, 104)), (2, (64, 112)), (2, (176,)))]


@pytest.mark.parametrize(("n", "k"), [(96, 96), (2880, 2880), (128, 7168)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.num_math_warpgroups}x{c.token_tiles[-1]}")
@pytest.mark.parametrize("has_bias", [False, True])
def test_scatter(n, k, config, has_bias):
    w, w90 = weight(len(COUNTS), n, k)
    index = index_of(COUNTS, padding=0)
    x = make_x("token", len(index), k, seed=1)
    row_weight = randn(len(index), seed=2, dtype=torch.float32)
    bias = randn(len(COUNTS), n, seed=3, dtype=torch.float32) if has_bias else None
    expected = exact(x, w, index)
    if has_bias:
        expected += row_weight.double()[:, None] * bias.double()[index]
    place = torch.randperm(2 * len(index), generator=torch.Generator().manual_seed(4))[: len(index)].cuda()
    workspace, offsets = allocate_workspace(0), torch.tensor([0, *COUNTS], device="cuda").cumsum(0).int()
    runs = []
    for _ in range(2):
        out = poisoned(2 * len(index), n)
        row_dst = out.data_ptr() + place * out.stride(0) * out.itemsize
        fp4_gemm(x.codes, x.sf, w90, config.with_output(scatter=True, has_bias=has_bias), offsets=offsets, row_dst=row_dst, bias=bias,
                 row_weight=row_weight, workspace=workspace)
        assert relative_error(out[place], expected) < BF16_ROUNDING
        assert out.isnan().all(1).sum() == len(index), "nothing else is written"
        runs.append(out[place])
    assert torch.equal(*runs)


@pytest.mark.parametrize("accumulate", [False, True])
def test_bias_of_the_public_ops(accumulate):
    w, w90 = weight(3, 160, 96)
    index, x = index_of([5, 0, 131]), make_x("token", 139, 96, seed=5)
    bias, before = randn(3, 160, seed=6), randn(139, 160, seed=7)
    expected = exact(x, w, index) + torch.where((index >= 0)[:, None], bias.double()[index.clamp(min=0)], 0)
    out = before.clone() if accumulate else poisoned(139, 160)
    grouped_gemm(x, w90, expert_idx=index, bias=bias, out=out, accumulate=accumulate)
    assert relative_error(out, expected + (before.double() if accumulate else 0)) < BF16_ROUNDING
    dense, packed_dense = weight(1, 160, 96)
    out = before.clone() if accumulate else poisoned(139, 160)
    gemm(x, packed_dense, bias=bias[0], out=out, accumulate=accumulate)
    expected = exact(x, dense, torch.zeros_like(index)) + bias[0].double()
    assert relative_error(out, expected + (before.double() if accumulate else 0)) < BF16_ROUNDING


ERRORS = [
    ({}, {"bias": True}, "fp4_gemm: bias must be None, got a tensor; see config.has_bias"),
    ({"has_bias": True}, {}, "fp4_gemm: bias must be given, got None; see config.has_bias"),
    ({"scatter": True}, {"out": False}, "fp4_gemm: row_dst must be given for epilogue 'store', got None; pass it"),
    ({}, {"out": False}, "fp4_gemm: out must be given for epilogue 'store', got None; pass it"),
]


@pytest.mark.parametrize(("options", "operands", "message"), ERRORS, ids=lambda v: str(v)[:30])
def test_bad_output(options, operands, message):
    _, w90 = weight(1, 96, 96)
    x = make_x("token", 4, 96, seed=8)
    out = None if operands.get("out") is False else poisoned(4, 96)
    bias = randn(1, 96, seed=9, dtype=torch.float32) if operands.get("bias") else None
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fp4_gemm(x.codes, x.sf, w90, CONFIGS[0].with_output(**options), out=out, bias=bias)
