"""Token and weight quantisers against naive loops over ml_dtypes, and what they refuse."""

import math
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import FormatError
from megamoe.formats import QuantizedTokens, e2m1, fp4_weight, quantize_fp4, quantize_fp8, quantize_tokens
from megamoe.formats.tokens import num_groups

bounded_float32 = st.floats(width=32, min_value=-(2.0**120), max_value=2.0**120)


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def random(*shape: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    """Normal values whose groups of 32 differ in magnitude by powers of two of that spread."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=g)
    factors = torch.exp2(torch.randn((*shape[:-1], -(-shape[-1] // 32)), generator=g) * spread)
    return values * factors.repeat_interleave(32, dim=-1)[..., : shape[-1]]


def naive_scale(amax: float, largest: float) -> int:
    """The UE8M0 byte of 2^ceil(log2(amax / largest)), from exact float64 comparisons."""
    exponent = math.floor(math.log2(amax / largest)) - 1
    while amax > largest * 2.0**exponent:
        exponent += 1
    return exponent + 127


def naive_groups(row: np.ndarray, width: int, largest: float, min_amax: float, dtype) -> tuple[list[int], list[int]]:
    """Codes and scale bytes of one row, group by group."""
    codes, scales = [], []
    for start in range(0, len(row), width):
        group = row[start : start + width].astype(np.float64)
        amax = max(np.abs(group[np.isfinite(group)]).max(initial=0.0), min_amax)
        scale = naive_scale(amax, largest) if amax > 0 else 0
        scaled = np.where(np.isfinite(group), group / 2.0 ** (scale - 127), np.nan).astype(np.float32)
        codes += scaled.astype(dtype).view(np.uint8).tolist()
        scales.append(scale)
    return codes, scales


@pytest.mark.parametrize("group", [32, 64, 96, 128, "token"])
@pytest.mark.parametrize("num_channels", [32, 160, 224])
def test_quantize_tokens_matches_naive_loop(group, num_channels):
    x = random(5, num_channels, seed=num_channels).bfloat16()
    x[2] = 0
    quantized = quantize_tokens(x, group)
    width = num_channels if group == "token" else group
    assert quantized.sf.shape == (5, num_groups(num_channels, group))
    for row in range(5):
        codes, scales = naive_groups(x[row].float().numpy(), width, 448.0, 1e-4, ml_dtypes.float8_e4m3fn)
        assert quantized.codes[row].view(torch.uint8).tolist() == codes
        assert quantized.sf[row].tolist() == scales


def test_quantize_tokens_example():
    # amax 449 needs a scale of 2: 449/2 = 224.5 rounds to 224, 3/2 is exact. The short group holds -448 with scale 1.
    x = torch.zeros(1, 40)
    x[0, 0], x[0, 1], x[0, 39] = 449.0, 3.0, -448.0
    quantized = quantize_tokens(x, 32)
    assert quantized.sf.tolist() == [[128, 127]]
    values = quantized.dequantize()
    assert values[0, [0, 1, 39]].tolist() == [448.0, 3.0, -448.0]
    assert values.count_nonzero() == 3


@pytest.mark.parametrize("group", [32, 128, "token"])
def test_quantize_tokens_small_and_zero_rows(group):
    x = torch.zeros(3, 128)
    x[1] = 1e-6
    x[2, :2] = torch.tensor([1e-4, -1e-4])
    quantized = quantize_tokens(x, group)
    assert (quantized.sf[:, 0] == naive_scale(1e-4, 448.0)).all()
    assert quantized.dequantize()[0].tolist() == [0.0] * 128
    torch.testing.assert_close(quantized.dequantize()[1], x[1], rtol=2**-4, atol=0)
    assert quantize_tokens(torch.zeros(0, 128), group).dequantize().shape == (0, 128)


@pytest.mark.parametrize("group", [32, 96, "token"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_quantize_tokens_isolates_nan_and_inf(group, poison):
    clean = random(4, 160, seed=7)
    clean[1, 35] = 0
    poisoned = clean.clone()
    poisoned[1, 35] = poison
    expected, got = quantize_tokens(clean, group), quantize_tokens(poisoned, group)
    assert torch.equal(got.sf, expected.sf)
    differs = got.codes.view(torch.uint8) != expected.codes.view(torch.uint8)
    assert differs.nonzero().tolist() == [[1, 35]]
    assert got.dequantize()[1, 35].isnan()


def test_quantize_tokens_row_of_nan():
    quantized = quantize_tokens(torch.full((1, 64), math.nan))
    assert quantized.dequantize().isnan().all()
    assert (quantized.sf == naive_scale(1e-4, 448.0)).all()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(bounded_float32, min_size=1, max_size=100), st.sampled_from([32, 64, "token"]))
def test_quantize_tokens_any_float(values, group):
    row = np.array(values, dtype=np.float32)
    quantized = quantize_tokens(torch.from_numpy(row)[None], group)
    codes, scales = naive_groups(row, len(row) if group == "token" else group, 448.0, 1e-4, ml_dtypes.float8_e4m3fn)
    assert quantized.codes[0].view(torch.uint8).tolist() == codes
    assert quantized.sf[0].tolist() == scales


def test_quantized_tokens_refuses():
    codes, sf = torch.zeros(2, 64).to(torch.float8_e4m3fn), torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=exactly(
        "quantize_tokens: group must be one of (32, 64, 96, 128, 'token'), got 48; pick one of them")):
        quantize_tokens(torch.zeros(2, 64), 48)
    with pytest.raises(ValueError, match=exactly(
        "QuantizedTokens: sf shape must be [2, 1], got [2, 2]; use quantize_tokens")):
        QuantizedTokens(codes, sf, "token")
    with pytest.raises(ValueError, match=exactly(
        "QuantizedTokens: codes dtype must be torch.float8_e4m3fn, got torch.uint8; use quantize_tokens")):
        QuantizedTokens(codes.view(torch.uint8), sf, 32)
    with pytest.raises(ValueError, match=exactly(
        "QuantizedTokens: sf dtype must be torch.uint8, got torch.float32; use quantize_tokens")):
        QuantizedTokens(codes, sf.float(), 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_fp4_matches_naive_loop(dtype):
    w = random(2, 5, 96, seed=11, spread=1.0).to(dtype)
    w[1, 3, 32:64] = 0
    quantized = quantize_fp4(w)
    assert quantized.shape == w.shape
    for expert in range(2):
        for row in range(5):
            codes, scales = naive_groups(w[expert, row].float().numpy(), 32, 6.0, 0.0, ml_dtypes.float4_e2m1fn)
            assert e2m1.unpack(quantized.codes[expert, row]).tolist() == codes
            assert quantized.scales[expert, row].tolist() == scales
    assert quantized.scales[1, 3, 1] == fp4_weight.ZERO_GROUP_SCALE
    assert not quantized.codes[1, 3, 16:32].any()


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(bounded_float32, min_size=32, max_size=32))
def test_quantize_fp4_any_float(values):
    row = np.array(values, dtype=np.float32)
    amax = float(np.abs(row).max())
    quantized = quantize_fp4(torch.from_numpy(row)[None])
    scale = max(naive_scale(amax, 6.0), 0) if amax > 0 else 0
    assert quantized.scales.tolist() == [[scale]]
    scaled = (row.astype(np.float64) / 2.0 ** (scale - 127)).astype(np.float32)
    assert e2m1.unpack(quantized.codes)[0].tolist() == scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist()


def test_fp4_requantising_its_own_values_is_exact():
    quantized = quantize_fp4(random(3, 16, 64, seed=3))
    values = quantized.dequantize()
    assert torch.equal(quantize_fp4(values).dequantize(), values)
    assert torch.equal(quantized.dequantize(torch.bfloat16).float(), values)  # 2 significant bits fit


@pytest.mark.parametrize("quantize", [quantize_fp4, quantize_fp8])
def test_quantizers_refuse(quantize):
    op = quantize.__name__
    w = torch.zeros(2, 3, 32)
    w[1, 2, 5] = math.nan
    with pytest.raises(FormatError, match=exactly(f"{op}: weights must be finite, got nan at [1, 2, 5]; repair the checkpoint")):
        quantize(w)
    w[0, 1, 7] = -math.inf
    with pytest.raises(FormatError, match=exactly(f"{op}: weights must be finite, got -inf at [0, 1, 7]; repair the checkpoint")):
        quantize(w)
    with pytest.raises(FormatError, match=exactly(f"{op}: weights must be bfloat16, float16 or float32, got float64; cast them first")):
        quantize(torch.zeros(2, 32, dtype=torch.float64))
    with pytest.raises(FormatError, match=exactly(f"{op}: weights must be [..., N, K], got [32]; pass at least one matrix")):
        quantize(torch.zeros(32))


@pytest.mark.parametrize("k", [0, 31, 48])
def test_quantize_fp4_refuses_k(k):
    with pytest.raises(FormatError, match=exactly(f"quantize_fp4: K must be a positive multiple of 32, got {k}; pad K with zeros")):
        quantize_fp4(torch.zeros(2, k))


def test_quantize_fp8_matches_naive_loop():
    w = random(2, 160, 288, seed=13)
    w[1, 128:, 256:] = 0
    quantized = quantize_fp8(w)
    assert quantized.scales.shape == (2, 2, 3)
    for expert, row_block, col_block in np.ndindex(2, 2, 3):
        here = (expert, slice(128 * row_block, 128 * row_block + 128), slice(128 * col_block, 128 * col_block + 128))
        block = w[here].numpy()
        codes, scales = naive_groups(block.ravel(), block.size, 448.0, 0.0, ml_dtypes.float8_e4m3fn)
        assert quantized.scales[expert, row_block, col_block] == scales[0]
        assert quantized.codes[here].reshape(-1).view(torch.uint8).tolist() == codes
    torch.testing.assert_close(quantized.dequantize(), w, rtol=2**-4, atol=2**-9 * 448)
    assert torch.equal(quantized[1].dequantize(), quantized.dequantize()[1])
