"""The sm_90a weight layout: bytes against a naive loop, values against the main loop's own decode, exact inverses, exact refusals.

Shapes: `E` experts, `N` rows, `K` channels.
"""

import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import FormatError
from megamoe.formats import FP4Weight, e2m1, gate_up, layout_sm90, quantize_fp4
from megamoe.formats.fp4_weight import ZERO_GROUP_SCALE
from megamoe.formats.thread_order import from_thread_order, to_thread_order

EXPONENTS = range(1, 28)


def random_weight(e: int, n: int, k: int, seed: int, zero_groups: float = 0.1) -> FP4Weight:
    """Codes of every kind; each row's scales fill a window of 27 steps somewhere in 1..254; some groups are zeros (of both signs)."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (e, n, k), generator=g, dtype=torch.uint8)
    is_zero = torch.rand((e, n, k // 32), generator=g) < zero_groups
    codes = torch.where(is_zero.repeat_interleave(32, -1), codes & 8, codes)
    lowest = torch.randint(1, 228, (e, n, 1), generator=g)
    scales = lowest + torch.randint(0, 27, (e, n, k // 32), generator=g)
    scales = torch.where(is_zero, torch.randint(0, 255, scales.shape, generator=g), scales)
    return FP4Weight(e2m1.pack(codes), scales.to(torch.uint8))


def canonical_scales(weight: FP4Weight) -> torch.Tensor:
    is_zero = (e2m1.unpack(weight.codes) & 7).unflatten(-1, (-1, 32)).sum(-1) == 0
    return weight.scales.masked_fill(is_zero, ZERO_GROUP_SCALE)


def kernel_rows(n: int, interleaved: bool) -> list[int]:
    """The canonical row of each kernel row."""
    if not interleaved:
        return list(range(n))
    return [half * (n // 2) + 8 * slab + i for slab in range(n // 16) for half in range(2) for i in range(8)]


def lookup_tables(exponent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The main loop's lookup table of an exponent byte: E5M2 bytes of codes 0..3 and 4..7 as two 32-bit words."""
    e = exponent.astype(np.uint64)
    return ((e * 0x04040400 + 0x06040000) & 0xFFFFFFFF).astype(np.uint32), ((e * 0x04040404 + 0x0E0C0A08) & 0xFFFFFFFF).astype(np.uint32)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_fp4_in_the_window_is_e5m2_and_the_lookup_table_gives_its_bytes(exponent):
    values = e2m1.decode(torch.arange(16, dtype=torch.uint8)).numpy() * np.float32(2.0) ** (exponent - 14)
    as_e5m2 = values.astype(ml_dtypes.float8_e5m2)
    np.testing.assert_array_equal(as_e5m2.astype(np.float32), values)
    lo, hi = lookup_tables(np.array([exponent]))
    table = np.concatenate([lo, hi]).view(np.uint8)
    assert table.tolist() == as_e5m2.view(np.uint8)[:8].tolist()
    assert (table | 0x80).tolist() == as_e5m2.view(np.uint8)[8:].tolist()


def test_the_window_is_as_wide_as_the_lookup_table_allows():
    assert layout_sm90.MIN_EXPONENT == EXPONENTS.start and layout_sm90.WINDOW == len(EXPONENTS)
    for exponent in (0, 28):
        values = e2m1.decode(torch.arange(8, dtype=torch.uint8)).numpy() * np.float32(2.0) ** (exponent - 14)
        lo, hi = lookup_tables(np.array([exponent]))
        assert np.concatenate([lo, hi]).view(np.uint8).tolist() != values.astype(ml_dtypes.float8_e5m2).view(np.uint8).tolist()


def channel_of(column: int, thread_order: bool) -> int:
    """The channel of a 128-block that the main loop multiplies as `column`."""
    step, k_half, thread, i = column // 32, column // 16 % 2, column // 4 % 4, column % 4
    return 32 * thread + 8 * step + 4 * k_half + i if thread_order else column


def naive_unit(codes: np.ndarray, exponents: np.ndarray, thread_order: bool) -> np.ndarray:
    """One storage unit, element by element: codes [64, 128], exponents [64, 4] -> [4352] bytes."""
    words, tail = [0] * 1024, [0] * 256
    for row, column in np.ndindex(64, 128):
        warp, row_half, group = row // 16, row // 8 % 2, row % 8
        step, k_half, thread, i = column // 32, column // 16 % 2, column // 4 % 4, column % 4
        lane = 32 * warp + 4 * group + thread
        word = (step // 2) * 512 + lane * 4 + (step % 2) * 2 + row_half
        channel = channel_of(column, thread_order)
        code = int(codes[row, channel])
        words[word] |= (code & 7) << (16 * k_half + 4 * i)
        words[word] |= (code >> 3) << (8 * i + (3 if k_half else 7))
        place = 2 * thread + row_half if thread_order else 4 * row_half + step
        tail[64 * warp + 8 * group + place] = int(exponents[row, channel // 32])
    return np.concatenate([np.array(words, dtype="<u4").view(np.uint8), np.array(tail, dtype=np.uint8)])


@pytest.mark.parametrize("thread_order", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_pack_matches_naive_loop(interleaved, thread_order):
    n, k = 128, 256
    weight = random_weight(1, n, k, seed=21)
    packed = layout_sm90.pack(weight, interleaved, thread_order)
    rows = kernel_rows(n, interleaved)
    codes, scales = e2m1.unpack(weight.codes)[0, rows].numpy(), weight.scales[0, rows].int().numpy()
    is_zero = (codes & 7).reshape(n, k // 32, 32).max(-1) == 0
    base = np.where(is_zero, 255, scales).min(-1)
    exponents = np.where(is_zero, 1, scales - base[:, None] + 1)
    assert packed.row_base[0].tolist() == base.tolist()
    for row_block, k_block in np.ndindex(2, 2):
        here = slice(64 * row_block, 64 * row_block + 64)
        expected = naive_unit(codes[here, 128 * k_block : 128 * k_block + 128], exponents[here, 4 * k_block : 4 * k_block + 4], thread_order)
        np.testing.assert_array_equal(packed.blocks[0, row_block, k_block].numpy(), expected)


def byte_permute(lo: np.ndarray, hi: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt.b32: byte i of the result is byte (nibble i of the selector) of hi:lo."""
    table = hi.astype(np.uint64) << np.uint64(32) | lo
    result = np.zeros_like(lo)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i) & np.uint32(7)).astype(np.uint64)
        result |= ((table >> (nibble * np.uint64(8))).astype(np.uint32) & np.uint32(0xFF)) << np.uint32(8 * i)
    return result


def main_loop_values(unit: np.ndarray, thread_order: bool) -> np.ndarray:
    """What the tensor cores see of one unit: each lane's loads, lookups and A registers -> E5M2 values [64, 128] in order of channels."""
    words = unit[:4096].view("<u4").reshape(2, 128, 4)  # two 16-byte loads per lane
    values = np.full((64, 128), np.nan, dtype=np.float32)
    for lane_idx in range(128):
        warp, group, thread = lane_idx // 32, lane_idx % 32 // 4, lane_idx % 4
        lane_words = words[:, lane_idx].reshape(8)
        exponents = unit[4096 + warp * 64 + group * 8 :][:8].reshape(2, 4)  # of both rows, for each step
        if thread_order:
            exponents = unit[4096 + 2 * lane_idx :][:2, None].repeat(4, 1)
        for step, row_half in np.ndindex(4, 2):
            word = lane_words[2 * step + row_half][None]
            lo, hi = lookup_tables(exponents[row_half, step][None])
            magnitudes, sign_mask = word & np.uint32(0x77777777), np.uint32(0x80808080)
            registers = (byte_permute(lo, hi, magnitudes) | word & sign_mask,
                         byte_permute(lo, hi, magnitudes >> np.uint32(16)) | word << np.uint32(4) & sign_mask)
            for k_half, register in enumerate(registers):
                column = channel_of(32 * step + 16 * k_half + 4 * thread, thread_order)
                decoded = register.view(np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32)
                values[16 * warp + 8 * row_half + group, column : column + 4] = decoded
    return values


@pytest.mark.parametrize("thread_order", [False, True])
@pytest.mark.parametrize("interleaved, n, k", [(False, 64, 128), (True, 64, 160), (False, 40, 96)])
def test_main_loop_decodes_the_weights(interleaved, n, k, thread_order):
    weight = random_weight(1, n, k, seed=n + k)
    packed = layout_sm90.pack(weight, interleaved, thread_order)
    decoded = np.concatenate([main_loop_values(unit, thread_order) for unit in packed.blocks[0, 0].numpy()], axis=1)
    scaled = decoded.astype(np.float64) * np.exp2(packed.row_base[0].double().numpy() - 114)[:, None]
    np.testing.assert_array_equal(scaled[:n, :k], weight.dequantize()[0].double().numpy()[kernel_rows(n, interleaved)])
    assert not scaled[n:].any() and not scaled[:, k:].any()  # padding is zero weights


@pytest.mark.parametrize("columns", range(1, 129, 9))
def test_tokens_in_thread_order_meet_the_weights_of_their_channels(columns):
    """A product of one channel: what the main loop multiplies as a column is that channel of both."""
    channels = torch.arange(256, dtype=torch.int16).view(-1, 4)  # words
    tokens = to_thread_order(channels[:, 0] // 4)
    assert tokens[columns // 4] == channel_of(columns, True) // 4 and tokens[32 + columns // 4] == 32 + channel_of(columns, True) // 4


def test_from_thread_order_is_the_inverse():
    words = torch.randint(0, 2**31, (3, 5, 96), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(from_thread_order(to_thread_order(words)), words) and not torch.equal(to_thread_order(words), words)


@pytest.mark.parametrize("thread_order", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("e, n, k", [(1, 16, 32), (3, 64, 128), (2, 192, 288), (2, 80, 416)])
def test_unpack_is_the_inverse(interleaved, e, n, k, thread_order):
    weight = random_weight(e, n, k, seed=e * n + k)
    packed = layout_sm90.pack(weight, interleaved, thread_order)
    assert packed.blocks.shape == (e, -(-n // 64), -(-k // 128), 4352)
    assert packed.row_base.shape == (e, -(-n // 64) * 64)
    restored = packed.to("cpu").unpack()
    assert torch.equal(restored.codes, weight.codes)
    assert torch.equal(restored.scales, canonical_scales(weight))
    assert packed.num_bytes == packed.blocks.numel() + packed.row_base.numel()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(e=st.integers(1, 2), n=st.integers(1, 9).map(lambda x: 16 * x), k=st.integers(1, 9).map(lambda x: 32 * x),
       interleaved=st.booleans(), thread_order=st.booleans(), seed=st.integers(0, 2**31), zero_groups=st.sampled_from([0.0, 0.5, 1.0]))
def test_unpack_is_the_inverse_of_any_shape(e, n, k, interleaved, thread_order, seed, zero_groups):
    weight = random_weight(e, n, k, seed, zero_groups)
    packed = layout_sm90.pack(weight, interleaved, thread_order)
    exponents = packed.blocks[..., 4096:]
    assert exponents.min() >= 1 and exponents.max() <= 27
    restored = packed.unpack()
    assert torch.equal(restored.codes, weight.codes)
    assert torch.equal(restored.scales, canonical_scales(weight))


def test_quantized_weights_come_back_exactly():
    w = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(4))
    w[0, 3, 32:64] = 0
    weight = quantize_fp4(w)
    restored = layout_sm90.pack(weight, True).unpack()
    assert torch.equal(restored.codes, weight.codes) and torch.equal(restored.scales, weight.scales)


def test_interleave_example():
    rows = torch.arange(32)  # gate rows 0..15, up rows 16..31
    expected = [*range(0, 8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert gate_up.interleave(rows).tolist() == expected
    assert gate_up.deinterleave(gate_up.interleave(rows)).tolist() == rows.tolist()
    assert gate_up.interleave(rows[None, :, None], dim=1)[0, :, 0].tolist() == expected


def test_rows_of_zeros_take_a_factor_of_one():
    packed = layout_sm90.pack(quantize_fp4(torch.zeros(1, 16, 32)), False)
    assert (packed.row_base == 114).all()
    assert not packed.blocks[..., :4096].any() and (packed.blocks[..., 4096:] == 1).all()


def weight_with_span(span: int, expert: int, row: int, zero_far_group: bool = False) -> FP4Weight:
    codes = torch.full((2, 64, 48), 0x22, dtype=torch.uint8)
    scales = torch.full((2, 64, 3), 120, dtype=torch.uint8)
    scales[expert, row, 1] = 120 + span - 1
    if zero_far_group:
        codes[expert, row, 16:32] = 0x80
    return FP4Weight(codes, scales)


def test_the_widest_window_is_accepted():
    weight = weight_with_span(27, 1, 40)
    packed = layout_sm90.pack(weight, True)
    assert sorted(packed.blocks[..., 4096:].unique().tolist()) == [1, 27]
    assert torch.equal(packed.unpack().scales, weight.scales)


def test_zero_groups_do_not_widen_the_window():
    weight = weight_with_span(100, 1, 40, zero_far_group=True)
    assert torch.equal(layout_sm90.pack(weight, True).unpack().dequantize(), weight.dequantize())


@pytest.mark.parametrize("row, interleaved, name", [
    (40, True, "row 40 (up row 8)"), (31, True, "row 31 (gate row 31)"), (40, False, "row 40"),
])
def test_exponents_outside_the_window_are_refused(row, interleaved, name):
    message = (f"layout_sm90.pack: the group exponents of a row must be within 27 steps, got 28 in expert 1, {name}; "
               "zero its smallest groups or run precision='bf16'")
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        layout_sm90.pack(weight_with_span(28, 1, row), interleaved)


def test_shapes_that_do_not_fit_are_refused():
    message = "layout_sm90.pack: weight must be [E, N, K], got [16, 32]; add a leading expert dim"
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        layout_sm90.pack(quantize_fp4(torch.zeros(16, 32)), False)
    message = "layout_sm90.pack: N must be a multiple of 16 to interleave gate and up rows, got 24; pad I with zeros"
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        layout_sm90.pack(quantize_fp4(torch.zeros(1, 24, 32)), True)
