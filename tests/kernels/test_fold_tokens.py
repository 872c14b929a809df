"""fold_tokens on a GPU: every code at every shift against its plain-torch twin, ragged widths, skipped rows, refusals."""

import re

import pytest
import torch

from megamoe.formats import QuantizedTokens, quantize_tokens
from megamoe.kernels.fold_tokens import fold_tokens
from megamoe.reference.fold_tokens import fold_tokens as twin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90 or later")


def assert_same(got: QuantizedTokens, expected: QuantizedTokens) -> None:
    """Byte by byte; a NaN may have either sign."""
    a, b = got.codes.cpu().view(torch.uint8), expected.codes.cpu().view(torch.uint8)
    assert torch.equal(got.sf.cpu(), expected.sf.cpu())
    assert torch.equal(torch.where(a & 0x7F == 0x7F, 0x7F, a), torch.where(b & 0x7F == 0x7F, 0x7F, b))


@pytest.mark.parametrize("group", [32, 128])
def test_every_code_at_every_shift(group):
    shifts = torch.arange(255, dtype=torch.uint8)  # one row each: a group at scale 254, then all codes at 254 - shift
    codes = torch.cat([torch.full((group,), 0x38), torch.arange(256)]).to(torch.uint8).expand(255, -1).contiguous()
    sf = torch.cat([torch.full((255, 1), 254), (254 - shifts.int())[:, None].expand(-1, 256 // group)], dim=1).to(torch.uint8)
    x = QuantizedTokens(codes.view(torch.float8_e4m3fn), sf, group)
    got = fold_tokens(QuantizedTokens(x.codes.cuda(), sf.cuda(), group))
    assert got.group == "token"
    assert_same(got, twin(x))


@pytest.mark.parametrize("group", [32, 64, 96, 128])
@pytest.mark.parametrize("k", [32, 96, 768, 2880, 7168])
@pytest.mark.parametrize("m", [0, 1, 9, 131])
def test_random_tokens(m, k, group):
    spread = torch.exp2(torch.randint(-8, 8, (m, -(-k // group)), generator=torch.Generator().manual_seed(1)).float())
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2)) * spread.repeat_interleave(group, dim=1)[:, :k]
    x = quantize_tokens(x, group)
    got = fold_tokens(QuantizedTokens(x.codes.cuda(), x.sf.cuda(), group))
    assert_same(got, twin(x))


def test_rows_inside_the_bounds_are_folded():
    x = quantize_tokens(torch.randn(12, 64) * torch.tensor([1.0, 8.0]).repeat_interleave(32), 32)
    bounds = torch.tensor([[0, 4], [4, 4], [8, 9]], dtype=torch.int32, device="cuda")  # groups of 4 rows
    rows = [0, 1, 2, 3, 8]
    on_gpu = QuantizedTokens(x.codes.cuda(), x.sf.cuda(), 32)
    picked, expected = (QuantizedTokens(y.codes.view(torch.uint8)[rows].view(torch.float8_e4m3fn), y.sf[rows], "token")
                        for y in (fold_tokens(on_gpu, bounds), twin(x)))
    assert_same(picked, expected)


@pytest.mark.parametrize("m", [5, 9000])  # 9000 rows are more than the grid holds at once
def test_in_place(m):
    x = quantize_tokens(torch.randn(m, 96, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 8.0, 0.1]).repeat_interleave(32))
    on_gpu = QuantizedTokens(x.codes.cuda(), x.sf.cuda(), 32)
    out = QuantizedTokens(on_gpu.codes, torch.full((m, 1), 0xFF, dtype=torch.uint8, device="cuda"), "token")
    num_folded = m - 2
    bounds = torch.tensor([[0, num_folded]], dtype=torch.int32, device="cuda")
    assert fold_tokens(on_gpu, bounds, out) is out
    expected = twin(x)
    picked, due = (QuantizedTokens(y.codes[:num_folded], y.sf[:num_folded], "token") for y in (out, expected))
    assert_same(picked, due)
    assert torch.equal(out.codes[num_folded:].cpu().view(torch.uint8), x.codes[num_folded:].view(torch.uint8)), "rows outside stay as they are"
    assert (out.sf[num_folded:] == 0xFF).all()


def test_tokens_with_one_scale_pass_and_misaligned_rows_are_refused():
    x = quantize_tokens(torch.randn(3, 64), "token")
    x = QuantizedTokens(x.codes.cuda(), x.sf.cuda(), "token")
    assert fold_tokens(x) is x
    codes = torch.zeros(3 * 64 + 1, dtype=torch.uint8, device="cuda")[1:].view(3, 64).view(torch.float8_e4m3fn)
    message = "fold_tokens: rows of codes must be at multiples of 16 bytes, got [1, 64]; copy them with .clone()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fold_tokens(QuantizedTokens(codes, torch.zeros(3, 2, dtype=torch.uint8, device="cuda"), 32))
    good = QuantizedTokens(torch.zeros_like(x.codes), torch.zeros(3, 2, dtype=torch.uint8, device="cuda"), 32)
    message = "fold_tokens: out must be [3, 64] with group 'token', got [3, 64] with group 32; allocate it as x"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        fold_tokens(good, out=good)
