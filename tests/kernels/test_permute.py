"""megamoe.permute_tokens and unpermute_tokens against loops, bit for bit; indices out of range; refusals.

On the CPU the ops are the twins.
"""

import math
import re

import pytest
import torch

import megamoe

on_hopper = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90")
DEVICES = ["cpu", pytest.param("cuda", marks=on_hopper)]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.uint8]


def random_rows(m: int, h: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bfloat16:
        return torch.randn(m, h, generator=g).to(dtype)
    return torch.randint(0, 256, (m, h), dtype=torch.uint8, generator=g).view(dtype)  # every FP8 code, NaN too


def random_index(shape: tuple[int, ...], m: int, dtype: torch.dtype = torch.int64, seed: int = 2) -> torch.Tensor:
    return torch.randint(-1, m, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().contiguous().view(torch.uint8)


def naive_unpermute(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    out = torch.zeros(len(index), rows.shape[1])
    for t, slots in enumerate(index.tolist()):
        for k, row in enumerate(slots):
            if row >= 0:
                out[t] += rows[row].float() * (1.0 if weights is None else weights[t, k])
    return out.bfloat16()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("h", [1, 6, 90, 96, 224, 2880, 7168])
@pytest.mark.parametrize(("m", "r"), [(1, 1), (7, 131), (40, 3), (5, 0)])
def test_permute(m, r, h, dtype, index_dtype, device):
    rows, index = random_rows(m, h, dtype), random_index((r,), m, index_dtype)
    torch.full((1 << 20,), math.nan, device=device)  # where the output may lie
    got = megamoe.permute_tokens(rows.to(device), index.to(device))
    source = as_bytes(rows)
    expected = torch.stack([source[i] if i >= 0 else torch.zeros_like(source[0]) for i in index.tolist()]) if r else source[:0]
    assert got.dtype == dtype and got.shape == (r, h)
    assert torch.equal(as_bytes(got), expected)
    megamoe.check()


@on_hopper
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_permute_of_misaligned_rows(offset):
    rows = torch.randint(0, 256, (offset + 9 * 64,), dtype=torch.uint8, device="cuda")[offset:].view(9, 64)
    index = random_index((50,), 9)
    expected = torch.where(index[:, None] >= 0, rows.cpu()[index.clamp(min=0)], 0)
    assert torch.equal(megamoe.permute_tokens(rows, index.cuda()).cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("h", [8, 96, 520, 2880, 7168])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (13, 6), (5, 8), (3, 37), (2, 0), (0, 6)])
def test_unpermute(t, k, h, weighted, device):
    rows = random_rows(29, h) * torch.logspace(-3, 3, 29)[:, None].bfloat16()
    index = random_index((t, k), 29, torch.int32 if weighted else torch.int64)
    index[t // 2 :, : k // 2] = -1
    weights = torch.rand(t, k, generator=torch.Generator().manual_seed(3)) - 0.25 if weighted else None
    if weighted:
        weights[index < 0] = math.nan  # never read
    torch.full((1 << 20,), math.nan, device=device)
    got = megamoe.unpermute_tokens(rows.to(device), index.to(device), None if weights is None else weights.to(device))
    assert got.dtype == torch.bfloat16 and got.shape == (t, h)
    assert torch.equal(as_bytes(got), as_bytes(naive_unpermute(rows, index, weights)))
    megamoe.check()


@pytest.mark.parametrize("device", DEVICES)
def test_slots_are_added_in_order(device):
    rows = torch.tensor([[2.0**30] * 8, [1.0] * 8, [-(2.0**30)] * 8]).bfloat16().to(device)
    index = torch.tensor([[0, 1, 2], [0, 2, 1]], device=device)
    assert megamoe.unpermute_tokens(rows, index)[:, 0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("device", DEVICES)
def test_unpermute_undoes_permute(device):
    rows = random_rows(40, 96).to(device)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(4)).to(device)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(40, device=device)
    assert torch.equal(megamoe.unpermute_tokens(megamoe.permute_tokens(rows, order), inverse[:, None]), rows)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_rows_reach_only_their_tokens(device):
    rows = random_rows(4, 16)
    rows[2, 3] = math.nan
    got = megamoe.unpermute_tokens(rows.to(device), torch.tensor([[0, 1], [2, 3], [-1, 2]], device=device)).cpu()
    assert got.isnan().nonzero().tolist() == [[1, 3], [2, 3]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("wrong", "shown"), [(5, 5), (-2, -2), (2**40, 2**31 - 1)])
def test_indices_out_of_range(wrong, shown, device):
    rows = random_rows(5, 96).to(device)
    index = torch.tensor([[0, 1, 2], [3, wrong, 4], [wrong, -1, 0]], device=device)
    shown = wrong if device == "cpu" else shown
    treated = torch.where(index == wrong, -1, index)
    cases = ((lambda i: megamoe.permute_tokens(rows, i.flatten()),
              f"permute_tokens: index[4] must be in [-1, M), got {shown}; -1 gives a row of zeros"),
             (lambda i: megamoe.unpermute_tokens(rows, i),
              f"unpermute_tokens: index.flatten()[4] must be in [-1, R), got {shown}; -1 skips a slot"))
    for run, message in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            got = run(index)
            megamoe.check()
        if device == "cuda":
            assert torch.equal(got, run(treated))
        megamoe.check()


@pytest.mark.parametrize("device", DEVICES)
def test_no_source_rows(device):
    rows = torch.zeros(0, 32, dtype=torch.bfloat16, device=device)
    assert not megamoe.permute_tokens(rows, torch.tensor([-1, -1], device=device)).any()
    assert not megamoe.unpermute_tokens(rows, torch.tensor([[-1, -1]], device=device)).any()
    megamoe.check()


@on_hopper
def test_runs_are_equal_and_graphs_replay():
    rows, index = random_rows(4096, 7168).cuda(), random_index((2048, 8), 4096).cuda()
    weights = torch.rand(2048, 8, device="cuda")

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return megamoe.permute_tokens(rows, index.flatten()), megamoe.unpermute_tokens(rows, index, weights)

    first, again, graph = run(), run(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for out in captured:
        out.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, captured))


@on_hopper
def test_more_than_two_to_the_31_bytes():
    num_rows = 310_000  # 4.4 GB
    rows = torch.zeros(num_rows, 7168, dtype=torch.bfloat16, device="cuda")
    rows[-1] = random_rows(1, 7168)[0].cuda()
    index = torch.arange(num_rows, device="cuda")
    got = megamoe.permute_tokens(rows, index)
    assert torch.equal(got[-1], rows[-1]) and not got[:-1].any()
    del got
    got = megamoe.unpermute_tokens(rows, index[:, None])
    assert torch.equal(got[-1], rows[-1]) and not got[:-1].any()


def test_the_ops_match_their_schemas_and_fakes():
    rows, index, out = random_rows(4, 16), torch.tensor([3, -1, 0]), torch.zeros(3, 16, dtype=torch.bfloat16)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.megamoe.permute_tokens.default, (rows, index, out), test_utils=utils)
    torch.library.opcheck(torch.ops.megamoe.unpermute_tokens.default, (rows, index[:, None], torch.ones(3, 1), out), test_utils=utils)


ROWS, INDEX = torch.zeros(4, 16, dtype=torch.bfloat16), torch.tensor([0, 1])
ERRORS = [
    (megamoe.permute_tokens, (ROWS.float(), INDEX),
     "permute_tokens: rows.dtype must be torch.bfloat16 or torch.float8_e4m3fn or torch.uint8, got torch.float32; "
     "convert it with .to(torch.bfloat16)"),
    (megamoe.permute_tokens, (ROWS, INDEX[:, None]), "permute_tokens: index.shape must be [R], got [2, 1]; sizes of one letter must agree"),
    (megamoe.permute_tokens, (ROWS, INDEX.float()),
     "permute_tokens: index.dtype must be torch.int32 or torch.int64, got torch.float32; convert it with .to(torch.int32)"),
    (megamoe.permute_tokens, (ROWS.T, INDEX), "permute_tokens: rows must be contiguous, got strides (1, 16); call .contiguous()"),
    (megamoe.unpermute_tokens, (ROWS, INDEX), "unpermute_tokens: index.shape must be [T, K], got [2]; sizes of one letter must agree"),
    (megamoe.unpermute_tokens, (ROWS, INDEX[:, None], torch.ones(2)),
     "unpermute_tokens: weights.shape must be [T=2, K=1], got [2]; sizes of one letter must agree"),
    (megamoe.unpermute_tokens, (ROWS[:, :9].clone(), INDEX[:, None]),
     "unpermute_tokens: H must be a multiple of 8, got 9; pad the rows with zeros"),
]


@pytest.mark.parametrize(("op", "args", "message"), ERRORS, ids=[message[:40] for *_, message in ERRORS])
def test_bad_input(op, args, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op(*args)


@on_hopper
def test_misaligned_rows_are_refused():
    rows = torch.zeros(1 + 32, dtype=torch.bfloat16, device="cuda")[1:].view(2, 16)
    message = "unpermute_tokens: rows.data_ptr() must be a multiple of 16, got 2 more than one; copy it with .clone()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        megamoe.unpermute_tokens(rows, torch.zeros(1, 1, dtype=torch.int64, device="cuda"))
