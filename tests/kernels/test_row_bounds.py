"""row_bounds and group_bounds on a GPU against a loop, what they clear, what they report."""

import random
import re

import pytest
import torch

import megamoe
from megamoe.kernels.row_bounds import group_bounds, row_bounds

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90 or later")
OP = "grouped_gemm"


def naive(groups: list[int], num_groups: int) -> list[list[int]]:
    bounds = [[-1, -1] for _ in range(num_groups)]
    for row, group in enumerate(groups):
        if group >= 0:
            bounds[group] = [row if bounds[group][0] < 0 else bounds[group][0], row + 1]
    return bounds


def runs(rng: random.Random, num_groups: int, largest: int) -> list[int]:
    """Groups in any order, each in one run, padding between them."""
    order = rng.sample(range(num_groups), num_groups)
    return [g for group in order for g in [group] * rng.randint(0, largest) + [-1] * rng.choice([0, 0, 1, largest])]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_groups", "largest"), [(1, 5), (3, 1), (40, 40), (300, 100)])
def test_row_bounds(num_groups, largest, dtype):
    rng = random.Random(num_groups)
    for _ in range(5):
        groups = runs(rng, num_groups, largest) or [-1]
        index = torch.tensor(groups, dtype=dtype, device="cuda")
        rows = torch.full((len(groups), 24), torch.nan, dtype=torch.bfloat16, device="cuda")
        scales = torch.full((len(groups), 5), 200, dtype=torch.uint8, device="cuda")
        bounds = row_bounds(OP, index, num_groups, rows=rows, scales=scales, scale=9)
        assert bounds.dtype == torch.int32 and bounds.tolist() == naive(groups, num_groups)
        is_padding = index < 0
        assert not rows[is_padding].any() and rows[~is_padding].isnan().all()
        assert (scales[is_padding] == 9).all() and (scales[~is_padding] == 200).all()
    assert row_bounds(OP, index, num_groups).tolist() == naive(groups, num_groups)
    megamoe.check()


def test_group_bounds():
    offsets = torch.tensor([0, 3, 3, 300, 1000])
    for dtype in (torch.int32, torch.int64):
        assert group_bounds(OP, num_rows=1003, offsets=offsets.to("cuda", dtype)).tolist() == [[0, 3], [3, 3], [3, 300], [300, 1000]]
        counts = torch.tensor([0, 7, 3], dtype=dtype, device="cuda")
        assert group_bounds(OP, num_rows=21, counts=counts).tolist() == [[0, 0], [7, 14], [14, 17]]
    many = torch.arange(1001, device="cuda") * 2
    assert torch.equal(group_bounds(OP, num_rows=2000, offsets=many).long(), torch.stack([many[:-1], many[1:]], 1))
    megamoe.check()


RANGE = "expert_idx[{}] must be in [-1, G), got {}; -1 marks a padding row"
APART = "expert_idx[{}] must be next to the other rows of its group, got group {} again; sort the rows by group"
OFFSETS = "offsets[{}] must be non-decreasing from 0 to at most M, got {}; pass the cumulative row counts"
COUNTS = "num_rows[{}] must be in [0, Mmax], got {}; a group has at most Mmax rows"
BAD = [
    ("rows", [0, 0, 1, 3, 2, 7], RANGE.format(3, 3), [[0, 2], [2, 3], [4, 5]]),
    ("rows", [0, -2, 1, 1], RANGE.format(1, -2), [[0, 1], [2, 4], [-1, -1]]),
    ("rows", [0, 2**40, 1], RANGE.format(1, 2**31 - 1), [[0, 1], [2, 3], [-1, -1]]),
    ("rows", [0, 1, 0, 1, 0], APART.format(2, 0), [[0, 5], [1, 4], [-1, -1]]),
    ("rows", [1, -1, 1], APART.format(2, 1), [[-1, -1], [0, 3], [-1, -1]]),
    ("offsets", [0, 4, 2, 6], OFFSETS.format(2, 2), [[0, 4], [4, 2], [2, 6]]),
    ("offsets", [1, 4, 4, 6], OFFSETS.format(0, 1), [[1, 4], [4, 4], [4, 6]]),
    ("offsets", [0, 4, 9, 9], OFFSETS.format(2, 9), [[0, 4], [4, 6], [6, 6]]),
    ("offsets", [-3, 4, 4, 4], OFFSETS.format(0, -3), [[0, 4], [4, 4], [4, 4]]),
    ("counts", [0, -1, 3], COUNTS.format(1, -1), [[0, 0], [2, 2], [4, 6]]),
]


@pytest.mark.parametrize(("form", "values", "message", "bounds"), BAD, ids=[f"{i}-{case[2][:12]}" for i, case in enumerate(BAD)])
def test_bad_values_are_reported_and_lead_nowhere(form, values, message, bounds):
    values = torch.tensor(values, device="cuda")
    if form == "rows":
        got = row_bounds(OP, values, 3)
    else:
        got = group_bounds(OP, num_rows=6, **{form: values})
    with pytest.raises(ValueError, match=f"^{OP}: {re.escape(message)}$"):
        megamoe.check()
    assert got.tolist() == bounds
    megamoe.check()


def test_the_smallest_row_is_the_one_reported():
    index = torch.zeros(100_000, dtype=torch.int64, device="cuda")
    index[777:] = torch.arange(5, 5 + 100_000 - 777, device="cuda")
    row_bounds("grouped_gemm_swiglu", index, 5)
    with pytest.raises(ValueError, match=re.escape("grouped_gemm_swiglu: expert_idx[777] must be in [-1, G), got 5;")):
        megamoe.check("cuda:0")
    megamoe.check()
