"""On a GPU the quantisers and layouts give the same bytes as on the CPU, within the time and memory that loading a big rank allows."""

import math
import time

import pytest
import torch

from megamoe.formats import (
    FP4Weight,
    e2m1,
    fp8,
    layout_sm90,
    layout_sm100,
    quantize_fp4,
    quantize_fp8,
    quantize_tokens,
    ue8m0,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GIB = 2**30


def random(*shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g) * torch.exp2(torch.randn(shape[:-1], generator=g) * 4).unsqueeze(-1)


def assert_same_bytes(on_gpu: torch.Tensor, on_cpu: torch.Tensor) -> None:
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu().view(torch.uint8), on_cpu.view(torch.uint8))


def test_codecs():
    codes = torch.arange(256, dtype=torch.uint8)
    assert_same_bytes(e2m1.decode(codes[:16].cuda()), e2m1.decode(codes[:16]))
    assert_same_bytes(ue8m0.decode(codes[:255].cuda()), ue8m0.decode(codes[:255]))
    assert ue8m0.decode(codes[255:].cuda()).isnan().all()
    bits = torch.randint(0, 2**31, (1 << 20,), generator=torch.Generator().manual_seed(1)).int()
    values = bits.view(torch.float32)
    values = values[values.isfinite()]
    for largest in (1.0, 6.0, 448.0):
        exact = largest * ue8m0.decode(torch.arange(1, 240, dtype=torch.uint8))
        near = torch.cat([values, exact, exact.nextafter(torch.tensor(math.inf)), exact.nextafter(torch.tensor(0.0))])
        assert_same_bytes(ue8m0.encode_ceil(near.cuda(), largest), ue8m0.encode_ceil(near, largest))
    overflow = torch.tensor([465.0, 1e6, math.inf, -math.inf, 6e4, 3.0])
    for encode in (fp8.encode_e4m3, fp8.encode_e5m2):
        assert_same_bytes(encode(overflow.cuda()), encode(overflow))
        assert encode(torch.tensor([math.nan], device="cuda")).float().isnan().all()


@pytest.mark.parametrize("group", [32, 96, "token"])
def test_quantize_tokens(group):
    x = random(64, 416, seed=2).bfloat16()
    x[3], x[5, 7], x[6, 8] = 0, math.nan, -math.inf
    on_gpu, on_cpu = quantize_tokens(x.cuda(), group), quantize_tokens(x, group)
    assert_same_bytes(on_gpu.sf, on_cpu.sf)
    values, expected = on_gpu.dequantize().cpu(), on_cpu.dequantize()
    assert values[5, 7].isnan() and values[6, 8].isnan()
    assert torch.equal(values.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))


def test_quantize_weights():
    w = random(3, 160, 288, seed=3)
    for quantize in (quantize_fp4, quantize_fp8):
        on_gpu, on_cpu = quantize(w.cuda()), quantize(w)
        assert_same_bytes(on_gpu.codes, on_cpu.codes)
        assert_same_bytes(on_gpu.scales, on_cpu.scales)
        assert_same_bytes(on_gpu.dequantize(), on_cpu.dequantize())
        assert on_gpu.to("cpu").device.type == "cpu"


@pytest.mark.parametrize("interleaved", [False, True])
def test_layouts(interleaved):
    weight = quantize_fp4(random(2, 80, 416, seed=4))
    on_gpu, on_cpu = layout_sm90.pack(weight.to("cuda"), interleaved), layout_sm90.pack(weight, interleaved)
    assert_same_bytes(on_gpu.blocks, on_cpu.blocks)
    assert_same_bytes(on_gpu.row_base, on_cpu.row_base)
    assert_same_bytes(on_gpu.unpack().codes, weight.codes)
    assert_same_bytes(on_gpu.unpack().scales, weight.scales)
    on_gpu, on_cpu = layout_sm100.pack(weight.to("cuda"), interleaved), layout_sm100.pack(weight, interleaved)
    assert_same_bytes(on_gpu.codes, on_cpu.codes)
    assert_same_bytes(on_gpu.scales, on_cpu.scales)
    assert_same_bytes(on_gpu.unpack().scales, weight.scales)


def test_a_big_rank_packs_in_time_and_memory():
    """gate_up of 24 experts of H=7168, I=3072: a quarter of a 96-expert rank, so a sixth of 20 s at most; temporaries below 2 GiB."""
    e, n, k = 24, 6144, 7168
    if torch.cuda.mem_get_info()[0] < 8 * GIB:
        pytest.skip("needs 8 GiB of free GPU memory")
    g = torch.Generator("cuda").manual_seed(5)
    codes = torch.randint(0, 256, (e, n, k // 2), generator=g, dtype=torch.uint8, device="cuda")
    scales = torch.randint(110, 130, (e, n, k // 32), generator=g, dtype=torch.uint8, device="cuda")
    weight = FP4Weight(codes, scales)
    layout_sm90.pack(weight[:1], True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    packed = layout_sm90.pack(weight, True)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    temporaries = torch.cuda.max_memory_allocated() - before - packed.num_bytes
    assert seconds < 20 / 6, f"{seconds:.2f} s"
    assert temporaries < 2 * GIB, f"{temporaries / GIB:.2f} GiB"
    restored = packed.unpack()
    assert torch.equal(restored.codes, codes) and torch.equal(restored.scales, scales)
