"""The weight containers: values of hand-made codes, slicing, conversion between precisions, and every refusal with its message.

Shapes: `e` experts, `N` rows, `K` channels, `H` hidden, `I` intermediate.
"""

import math
import re

import pytest
import torch

from megamoe.errors import FormatError
from megamoe.formats import ExpertWeights, FP4Weight, FP8Weight, quantize_fp4, quantize_fp8


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_fp4_dequantize_example():
    # Codes 1 (0.5) and 15 (-6) share a byte, the scale byte 129 is 4.
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0] = 0xF1
    weight = FP4Weight(codes, torch.tensor([[129]], dtype=torch.uint8))
    assert weight.dequantize()[0, :3].tolist() == [2.0, -24.0, 0.0]
    assert weight.shape == (1, 32)
    assert weight.num_bytes == 17


def test_fp4_slices_by_expert():
    w = random(4, 8, 64, seed=5)
    quantized = quantize_fp4(w)
    for index in (2, slice(1, 3), torch.tensor([3, 0])):
        assert torch.equal(quantized[index].dequantize(), quantize_fp4(w[index]).dequantize())
    assert quantized[2].codes.data_ptr() == quantized.codes[2].data_ptr()
    assert torch.equal(quantized.to("cpu").codes, quantized.codes)


def test_fp4_accepts_other_views_of_its_bytes():
    quantized = quantize_fp4(random(8, 64, seed=6))
    as_int8 = FP4Weight(quantized.codes.view(torch.int8), quantized.scales.view(torch.float8_e8m0fnu))
    as_fp4 = FP4Weight(quantized.codes.view(torch.float4_e2m1fn_x2), quantized.scales)
    for weight in (as_int8, as_fp4):
        assert weight.codes.dtype == weight.scales.dtype == torch.uint8
        assert torch.equal(weight.dequantize(), quantized.dequantize())


NVFP4_FIX = "convert NVFP4 to MXFP4 first (dequantise with its scale per tensor, then quantize_fp4)"
BAD_FP4 = {
    "nvfp4 dtype": ((2, 32), torch.uint8, (2, 4), torch.float8_e4m3fn,
                    f"scales must be UE8M0 bytes per 32 weights, got float8_e4m3fn, which looks like NVFP4; {NVFP4_FIX}"),
    "nvfp4 shape": ((2, 32), torch.uint8, (2, 4), torch.uint8,
                    f"scales shape must be [2, 2], got [2, 4], one per 16 weights, which looks like NVFP4; {NVFP4_FIX}"),
    "K": ((2, 24), torch.uint8, (2, 1), torch.uint8, "K must be a positive multiple of 32, got 48; pad K with zeros"),
    "scales shape": ((2, 32), torch.uint8, (1, 2), torch.uint8,
                     "scales shape must be [2, 2], got [1, 2]; pass one scale per row and 32 weights"),
    "codes dtype": ((2, 32), torch.bfloat16, (2, 2), torch.uint8,
                    "codes dtype must be uint8, got torch.bfloat16; pass packed codes, or quantise with quantize_fp4"),
    "scales dtype": ((2, 32), torch.uint8, (2, 2), torch.float32,
                     "scales dtype must be uint8, got torch.float32; pass UE8M0 bytes, or quantise with quantize_fp4"),
    "dims": ((32,), torch.uint8, (2,), torch.uint8, "codes must be [..., N, K/2], got [32]; pass at least one matrix"),
}


@pytest.mark.parametrize("codes_shape, codes_dtype, scales_shape, scales_dtype, message", BAD_FP4.values(), ids=BAD_FP4.keys())
def test_fp4_weight_refuses(codes_shape, codes_dtype, scales_shape, scales_dtype, message):
    with pytest.raises(FormatError, match=exactly(f"FP4Weight: {message}")):
        FP4Weight(torch.zeros(codes_shape).to(codes_dtype), torch.zeros(scales_shape).to(scales_dtype))


def test_fp4_weight_refuses_nan_scales():
    scales = torch.zeros(2, 4, 2, dtype=torch.uint8)
    scales[1, 2, 1] = scales[1, 3, 0] = 255
    with pytest.raises(FormatError, match=exactly(
        "FP4Weight: scales must be UE8M0 bytes below 255 (255 is NaN), got 2 of 255, the first at [1, 2, 1]; "
        "repair the checkpoint, or check that these bytes are scales")):
        FP4Weight(torch.zeros(2, 4, 32, dtype=torch.uint8), scales)


def test_fp4_weight_refuses_scales_elsewhere_and_row_slices():
    with pytest.raises(FormatError, match=exactly("FP4Weight: scales device must be cpu, got meta; move both to one device")):
        FP4Weight(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.uint8, device="meta"))
    with pytest.raises(FormatError, match=exactly(
        "FP4Weight: an indexed weight must be [E, N, K], got [2, 32]; slice rows after dequantize()")):
        quantize_fp4(torch.zeros(2, 32))[0]


def test_fp8_weight_float32_scales():
    codes = torch.full((130, 200), 2.0).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.3, 5.0], [7.0, 11.0]])
    values = FP8Weight(codes, scales).dequantize()
    corners = values[[0, 127, 0, 129, 129], [0, 127, 128, 127, 199]]
    assert corners.tolist() == [2 * scales[0, 0], 2 * scales[0, 0], 10.0, 14.0, 22.0]
    as_e8m0 = FP8Weight(codes, torch.full((2, 2), 128, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    assert (as_e8m0.dequantize(torch.bfloat16) == 4.0).all()
    assert as_e8m0.to("cpu").num_bytes == 130 * 200 + 4


def test_fp8_weight_refuses():
    codes = torch.zeros(2, 130, 200).to(torch.float8_e4m3fn)
    for scales, message in (
        (torch.ones(2, 2, 1), "scales shape must be [2, 2, 2], got [2, 2, 1]; pass one scale per 128 x 128 block"),
        (torch.ones(2, 2, 2).bfloat16(), "scales dtype must be uint8 (UE8M0) or float32, got torch.bfloat16; cast them"),
        (torch.full((2, 2, 2), math.inf), "scales must be finite, got NaN or Inf; repair the checkpoint"),
        (torch.full((2, 2, 2), 255, dtype=torch.uint8), "scales must be UE8M0 bytes below 255 (255 is NaN), got 8 of 255, the first at "
         "[0, 0, 0]; repair the checkpoint, or check that these bytes are scales"),
        (torch.ones(2, 2, 2, device="meta"), "scales device must be cpu, got meta; move both to one device"),
    ):
        with pytest.raises(FormatError, match=exactly(f"FP8Weight: {message}")):
            FP8Weight(codes, scales)
    with pytest.raises(FormatError, match=exactly(
        "FP8Weight: codes dtype must be torch.float8_e4m3fn, got torch.uint8; quantise with quantize_fp8")):
        FP8Weight(codes.view(torch.uint8), torch.ones(2, 2, 2))
    with pytest.raises(FormatError, match=exactly("FP8Weight: codes must be [..., N, K], got [200]; pass at least one matrix")):
        FP8Weight(codes[0, 0], torch.ones(2))
    with pytest.raises(FormatError, match=exactly(
        "FP8Weight: an indexed weight must be [E, N, K], got [130, 200]; slice rows after dequantize()")):
        FP8Weight(codes[0], torch.ones(2, 2))[0]


def experts(e: int = 2, h: int = 64, i: int = 32) -> ExpertWeights:
    return ExpertWeights(random(e, 2 * i, h, seed=1), random(e, h, i, seed=2), torch.arange(e * 2.0 * i).view(e, -1), torch.zeros(e, h))


def test_expert_weights_conversions():
    weights = experts()
    assert (weights.num_local_experts, weights.hidden, weights.intermediate, weights.device.type) == (2, 64, 32, "cpu")
    fp4, fp8 = weights.to_precision("fp8xfp4"), weights.to_precision("fp8xfp8")
    assert torch.equal(fp4.down.codes, quantize_fp4(weights.down).codes)
    assert torch.equal(fp8.gate_up.dequantize(), quantize_fp8(weights.gate_up).dequantize())
    assert fp4.to_precision("fp8xfp4").gate_up is fp4.gate_up
    assert fp8.to_precision("fp8xfp8").down is fp8.down
    assert torch.equal(fp8.to_precision("fp8xfp4").down.dequantize(), quantize_fp4(fp8.down.dequantize()).dequantize())
    assert torch.equal(fp4.to_precision("fp8xfp8").down.dequantize(), quantize_fp8(fp4.down.dequantize()).dequantize())
    assert torch.equal(fp4.to_precision("bf16").gate_up, fp4.gate_up.dequantize(torch.bfloat16))
    assert torch.equal(fp8.to_precision("fp32").down, fp8.down.dequantize())
    assert torch.equal(weights.to_precision("bf16").down, weights.down.bfloat16())
    assert weights.to_precision("fp32").down is weights.down
    assert fp4.gate_up_bias is weights.gate_up_bias and fp4.to("cpu").down_bias is weights.down_bias


@pytest.mark.parametrize("precision", ["fp8xfp4", "fp8xfp8", "bf16", "fp32"])
def test_expert_weights_dequantized(precision):
    weights = experts().to_precision(precision)
    gate_up, down = weights.dequantized(1)
    whole = weights.to_precision("fp32")
    assert gate_up.dtype == down.dtype == torch.float32
    assert torch.equal(gate_up, whole.gate_up[1]) and torch.equal(down, whole.down[1])


def test_expert_weights_refuses():
    gate_up, down = torch.zeros(2, 64, 96), torch.zeros(2, 96, 32)
    wrap = "wrap packed codes in FP4Weight"
    kinds = "FP4Weight, FP8Weight or a bfloat16, float16 or float32 tensor"
    for args, message in (
        ((gate_up, down.mT), "down shape must be [2, 96, 32], got [2, 32, 96]; gate_up is [2, 64, 96]"),
        ((gate_up[0], down), "gate_up must be [e, 2I, H], got [64, 96]; stack the gate rows on the up rows"),
        ((gate_up[:, 1:], down), "gate_up must be [e, 2I, H], got [2, 63, 96]; stack the gate rows on the up rows"),
        ((gate_up.to(torch.uint8), down), f"gate_up must be {kinds}, got torch.uint8; {wrap}"),
        ((gate_up, down.double()), f"down must be {kinds}, got torch.float64; {wrap}"),
        ((gate_up, down, torch.zeros(2, 32)), "gate_up_bias shape must be [2, 64], got [2, 32]; gate_up is [2, 64, 96]"),
        ((gate_up, down, None, torch.zeros(2, 32)), "down_bias shape must be [2, 96], got [2, 32]; gate_up is [2, 64, 96]"),
        ((gate_up, down, None, torch.zeros(2, 96).int()), "down_bias dtype must be floating point, got torch.int32; cast it"),
        ((gate_up, down.to("meta")), "down device must be cpu, got meta; move all parts to one device"),
    ):
        with pytest.raises(ValueError, match=exactly(f"ExpertWeights: {message}")):
            ExpertWeights(*args)
    with pytest.raises(ValueError, match=exactly(
        "ExpertWeights.to_precision: precision must be one of ('fp8xfp4', 'fp8xfp8', 'bf16', 'fp32'), got 'fp4'; pick one of them")):
        ExpertWeights(gate_up, down).to_precision("fp4")
