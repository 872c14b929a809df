"""The sm_100 weight layout: words against a naive loop, exact inverses, exact refusals. Shapes: `E` experts, `N` rows, `K` channels."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import FormatError
from megamoe.formats import FP4Weight, layout_sm100, quantize_fp4


def random_weight(e: int, n: int, k: int, seed: int) -> FP4Weight:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (e, n, k // 2), generator=g, dtype=torch.uint8)
    return FP4Weight(codes, torch.randint(0, 255, (e, n, k // 32), generator=g, dtype=torch.uint8))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("n, k", [(32, 128), (48, 160), (16, 32)])
def test_pack_matches_naive_loop(interleaved, n, k):
    weight = random_weight(2, n, k, seed=n + k)
    packed = layout_sm100.pack(weight, interleaved)
    assert packed.shape == (2, n, k) and packed.scales.shape == (2, -(-k // 128), n)
    for expert, row in np.ndindex(2, n):
        slab, half, i = row // 16, row // 8 % 2, row % 8
        source = half * (n // 2) + 8 * slab + i if interleaved else row
        assert torch.equal(packed.codes[expert, row], weight.codes[expert, source])
        for word in range(-(-k // 128)):
            expected = sum(int(scale) << (8 * i) for i, scale in enumerate(weight.scales[expert, source, 4 * word : 4 * word + 4]))
            assert packed.scales[expert, word, row].item() & 0xFFFFFFFF == expected


def test_rows_are_padded_to_four():
    weight = random_weight(1, 6, 64, seed=1)
    packed = layout_sm100.pack(weight, False)
    assert packed.scales.shape == (1, 1, 8)
    assert packed.scales[0, 0, 6:].tolist() == [0, 0]
    assert torch.equal(packed.unpack().scales, weight.scales)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(e=st.integers(1, 3), n=st.integers(1, 9).map(lambda x: 16 * x), k=st.integers(1, 9).map(lambda x: 32 * x),
       interleaved=st.booleans(), seed=st.integers(0, 2**31))
def test_unpack_is_the_inverse_of_any_shape(e, n, k, interleaved, seed):
    weight = random_weight(e, n, k, seed)
    packed = layout_sm100.pack(weight, interleaved)
    assert packed.codes.is_contiguous() and packed.scales.is_contiguous()
    restored = packed.to("cpu").unpack()
    assert torch.equal(restored.codes, weight.codes) and torch.equal(restored.scales, weight.scales)
    assert packed.num_bytes == packed.codes.numel() + 4 * packed.scales.numel()


def test_shapes_that_do_not_fit_are_refused():
    message = "layout_sm100.pack: weight must be [E, N, K], got [16, 32]; add a leading expert dim"
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        layout_sm100.pack(quantize_fp4(torch.zeros(16, 32)), False)
    message = "layout_sm100.pack: N must be a multiple of 16 to interleave gate and up rows, got 24; pad I with zeros"
    with pytest.raises(FormatError, match=f"^{re.escape(message)}$"):
        layout_sm100.pack(quantize_fp4(torch.zeros(1, 24, 32)), True)
