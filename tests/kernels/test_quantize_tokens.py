"""megamoe.quantize_tokens: byte for byte formats.quantize_tokens, on the CPU through the op, on a Hopper through the kernel."""

import math

import pytest
import torch

import megamoe
from megamoe import formats
from megamoe.formats import QuantizedTokens

on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90")
DEVICES = ["cpu", pytest.param("cuda", marks=on_hopper)]
GROUPS = [32, 128, "token"]
NAN = 0x7F


def random(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Magnitudes from 2^-20 to 2^20, groups of 32 channels apart from each other."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    spread = torch.randint(-20, 21, (*shape[:-1], -(-shape[-1] // 32)), generator=g).float().exp2()
    return (x * spread.repeat_interleave(32, dim=-1)[..., : shape[-1]]).to(dtype)


def codes(x: QuantizedTokens) -> torch.Tensor:
    """Bytes on the CPU; a NaN may have either sign."""
    found = x.codes.cpu().view(torch.uint8)
    return torch.where(found & NAN == NAN, NAN, found)


def assert_same(got: QuantizedTokens, expected: QuantizedTokens) -> None:
    assert got.group == expected.group
    assert torch.equal(got.sf.cpu(), expected.sf.cpu())
    assert torch.equal(codes(got), codes(expected))


def poison(device: str) -> None:
    """Leave NaN where the allocator places the next small tensors."""
    torch.full((1 << 20,), math.nan, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("m", "k"), [(1, 32), (9, 96), (131, 2880), (3, 1056), (5, 7168), (2, 8224), (2, 20000)])
def test_same_bytes_as_the_twin(m, k, group, dtype, device):
    x = random(m, k, seed=m + k, dtype=dtype)
    poison(device)
    assert_same(megamoe.quantize_tokens(x.to(device), group), formats.quantize_tokens(x, group))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", GROUPS)
def test_zeros_nan_inf_and_extremes(group, dtype, device):
    x = random(14, 2880, seed=1, dtype=dtype)
    x[0] = 0
    x[1], x[2, :40], x[3, 33] = math.nan, -math.nan, math.inf
    x[4, 5], x[4, 700], x[5] = -math.inf, math.nan, math.inf
    x[6], x[7, 0], x[8] = torch.finfo(dtype).max, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).tiny
    x[9], x[10] = 448.0 * 2.0**-22, -0.0
    x[11], x[12, 64:] = 464.0, 1e-4
    x[13, ::7] = math.inf
    got = megamoe.quantize_tokens(x.to(device), group)
    assert_same(got, formats.quantize_tokens(x, group))
    assert torch.equal(got.dequantize().isnan().cpu(), ~x.isfinite())


@on_hopper
@pytest.mark.parametrize("group", GROUPS)
def test_every_bf16_value(group):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).reshape(-1, 256)
    assert_same(megamoe.quantize_tokens(x.cuda(), group), formats.quantize_tokens(x, group))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group", GROUPS)
def test_shapes_and_strides(group, device):
    x = random(2, 3, 4, 96, seed=2).to(device)
    got = megamoe.quantize_tokens(x, group)
    assert got.codes.shape == x.shape and got.sf.shape == (2, 3, 4, {32: 3, 128: 1, "token": 1}[group])
    assert_same(got, formats.quantize_tokens(x.cpu(), group))
    assert megamoe.quantize_tokens(x[:0], group).codes.shape == (0, 3, 4, 96)
    assert_same(megamoe.quantize_tokens(x.transpose(0, 1), group), formats.quantize_tokens(x.cpu().transpose(0, 1), group))
    shifted = random(1, 97, seed=3).flatten().to(device)[1:].view(1, 96)  # not at a multiple of 16 bytes
    assert_same(megamoe.quantize_tokens(shifted, group), formats.quantize_tokens(shifted.cpu(), group))


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernel_does_not_take_runs_the_twin(device):
    for x, group in ((random(3, 50, seed=4), 32), (random(3, 64, seed=5), 96), (random(3, 64, seed=6).half(), "token")):
        assert_same(megamoe.quantize_tokens(x.to(device), group), formats.quantize_tokens(x, group))
    x = random(3, 64, seed=7, dtype=torch.float32).to(device).requires_grad_()
    assert_same(megamoe.quantize_tokens(x), formats.quantize_tokens(x.detach().cpu()))


def test_the_op_matches_its_fake_and_compiles():
    x = random(3, 64, seed=8)
    out = formats.quantize_tokens(torch.zeros(3, 64))
    torch.library.opcheck(torch.ops.megamoe.quantize_tokens.default, (x, 32, out.codes, out.sf), test_utils="test_faketensor")
    compiled = torch.compile(lambda v: megamoe.quantize_tokens(v, 32).sf, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), formats.quantize_tokens(x, 32).sf)


@on_hopper
def test_runs_are_equal_and_graphs_replay():
    x = random(4096, 7168, seed=9).cuda()
    for group in GROUPS:
        first = megamoe.quantize_tokens(x, group)
        for _ in range(3):
            assert_same(megamoe.quantize_tokens(x, group), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = megamoe.quantize_tokens(x, group)
        captured.codes.view(torch.uint8).fill_(NAN)
        captured.sf.fill_(255)
        graph.replay()
        assert_same(captured, first)


@on_hopper
@pytest.mark.parametrize("group", GROUPS)
def test_more_than_two_to_the_31_bytes(group):
    x = torch.zeros(310_000, 7168, dtype=torch.bfloat16, device="cuda")  # 4.4 GB of tokens, 2.2 GB of codes
    x[-1] = random(7168, seed=10).cuda()
    got, expected = megamoe.quantize_tokens(x, group), formats.quantize_tokens(x[-1:].cpu(), group)
    last = QuantizedTokens(got.codes[-1:], got.sf[-1:], group)
    assert_same(last, expected)
    assert not got.codes.view(torch.uint8)[:-1].any()
