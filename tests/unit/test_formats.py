"""The scalar formats against ml_dtypes, exhaustively: every code, every rounding boundary and its two neighbours."""

import re
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.errors import FormatError
from megamoe.formats import e2m1, fp8, ue8m0

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
FP8_FORMATS = [
    (fp8.encode_e4m3, torch.float8_e4m3fn, ml_dtypes.float8_e4m3fn, 448.0),
    (fp8.encode_e5m2, torch.float8_e5m2, ml_dtypes.float8_e5m2, 57344.0),
]
finite_float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def boundaries(values: np.ndarray) -> np.ndarray:
    """All values, the midpoints between neighbours, and one ulp to either side of each: both signs, float32."""
    values = np.unique(np.abs(values))
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(np.inf))])
    return np.concatenate([points, -points])


def test_e2m1_decode_all_codes():
    expected = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    decoded = e2m1.decode(ALL_BYTES[:16]).numpy()
    assert decoded.tobytes() == expected.tobytes()  # bytes, so that -0 counts
    assert decoded[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_e2m1_encode_boundaries():
    points = boundaries(e2m1.decode(ALL_BYTES[:16]).numpy())
    expected = points.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert e2m1.encode(torch.from_numpy(points)).tolist() == expected.tolist()


def test_e2m1_ties_go_to_the_even_code():
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.encode(midpoints).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert e2m1.encode(-midpoints).tolist() == [8, 10, 10, 12, 12, 14, 14]


def test_e2m1_encode_saturates():
    assert e2m1.encode(torch.tensor([6.01, 7.0, 1e30, torch.inf, -1e30])).tolist() == [7, 7, 7, 7, 15]


@settings(deadline=None, derandomize=True)
@given(st.lists(finite_float32, min_size=1, max_size=64))
def test_e2m1_encode_any_float(values):
    points = np.clip(np.array(values, dtype=np.float32), -6, 6)
    assert e2m1.encode(torch.from_numpy(points)).tolist() == points.astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist()


def test_e2m1_encode_accepts_bfloat16():
    values = torch.tensor([0.75, -2.5, 5.0, 3.0], dtype=torch.bfloat16)
    assert e2m1.encode(values).tolist() == [2, 12, 6, 5]


def test_e2m1_pack_puts_the_even_index_low():
    assert e2m1.pack(torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)).tolist() == [[0x21, 0x8F]]
    assert torch.equal(e2m1.pack(e2m1.unpack(ALL_BYTES)), ALL_BYTES)


def test_e2m1_pack_refuses_odd_k():
    with pytest.raises(FormatError, match=f"^{re.escape('e2m1.pack: K must be even, got 3; pad K with zeros to a multiple of 32')}$"):
        e2m1.pack(torch.zeros(2, 3, dtype=torch.uint8))


def test_ue8m0_decode_all_bytes():
    expected = ALL_BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(ue8m0.decode(ALL_BYTES).numpy(), expected)
    assert ue8m0.decode(torch.tensor([127, 0, 254], dtype=torch.uint8)).tolist() == [1.0, 2.0**-127, 2.0**127]
    assert ue8m0.decode(ALL_BYTES[255:]).isnan().all()


def test_ue8m0_reciprocal_is_exact():
    scales = ALL_BYTES[:255]
    assert (ue8m0.decode(scales).double() * ue8m0.decode_reciprocal(scales).double() == 1).all()


def test_ue8m0_encode_ceil_all_powers():
    scales = ALL_BYTES[:255]
    powers = ue8m0.decode(scales)
    assert torch.equal(ue8m0.encode_ceil(powers), scales)
    above = powers.nextafter(torch.tensor(torch.inf))
    assert ue8m0.encode_ceil(above).tolist() == [*range(1, 255), 254]  # saturates at the top
    below = powers.nextafter(torch.tensor(0.0))
    assert torch.equal(ue8m0.encode_ceil(below), scales)
    assert ue8m0.encode_ceil(torch.tensor([0.0, 1e-45])).tolist() == [0, 0]


def smallest_scale(value: float, largest: float) -> int:
    return next((e for e in range(255) if Fraction(value) <= Fraction(largest) * Fraction(2) ** (e - 127)), 254)


@pytest.mark.parametrize("largest", [1.0, 6.0, 448.0])
@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.floats(min_value=0, width=32, allow_infinity=False))
def test_ue8m0_encode_ceil_is_the_smallest_that_fits(largest, value):
    assert ue8m0.encode_ceil(torch.tensor([value]), largest).item() == smallest_scale(value, largest)


@pytest.mark.parametrize("largest", [6.0, 448.0])
def test_ue8m0_encode_ceil_at_multiples_of_the_largest(largest):
    # Where a division by `largest` could round across a power of two.
    exact = largest * ue8m0.decode(torch.arange(1, 246, dtype=torch.uint8))
    assert ue8m0.encode_ceil(exact, largest).tolist() == list(range(1, 246))
    assert ue8m0.encode_ceil(exact.nextafter(torch.tensor(torch.inf)), largest).tolist() == list(range(2, 247))
    assert ue8m0.encode_ceil(exact.nextafter(torch.tensor(0.0)), largest).tolist() == list(range(1, 246))


@pytest.mark.parametrize("encode, dtype, oracle, largest", FP8_FORMATS)
def test_fp8_all_codes_and_boundaries(encode, dtype, oracle, largest):
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(oracle).astype(np.float32)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(ALL_BYTES.view(dtype).float().numpy(), values)
    assert encode(torch.from_numpy(values[finite])).view(torch.uint8).tolist() == codes[finite].tolist()
    points = np.clip(boundaries(values[finite]), -largest, largest)
    assert encode(torch.from_numpy(points)).view(torch.uint8).tolist() == points.astype(oracle).view(np.uint8).tolist()


@pytest.mark.parametrize("encode, dtype, oracle, largest", FP8_FORMATS)
def test_fp8_saturates_and_keeps_nan(encode, dtype, oracle, largest):
    values = torch.tensor([largest * 1.04, 3e38, torch.inf, -torch.inf, torch.nan])
    encoded = encode(values).float()
    assert encoded[:4].tolist() == [largest, largest, largest, -largest]
    assert encoded[4].isnan()
