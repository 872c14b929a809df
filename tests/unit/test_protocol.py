"""The arena's table: where regions lie, how big the pool is, what the messages say. Pure arithmetic, no ranks."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe.comm import signals
from megamoe.comm.abort import Abort, AbortReason
from megamoe.comm.budget import plan_dims
from megamoe.comm.protocol import EVERY, REGIONS, SIGNALS, ArenaDims, emit_markdown, emit_struct, pack
from megamoe.config import MoEConfig
from megamoe.errors import ArenaBudgetError

SMALL = ArenaDims(num_ranks=3, max_tokens=5, num_topk=2, num_experts=6, hidden=96, intermediate=32, precision="fp8xfp4", pool_rows=64)
V4_PRO = MoEConfig(hidden=7168, intermediate=3072, num_experts=384, num_topk=6, max_tokens_per_rank=8192)
DIMS = [replace(SMALL, precision=precision, **changes) for precision in EVERY
        for changes in ({}, {"num_ranks": 1, "max_tokens": 1, "num_topk": 1}, {"hidden": 2880, "intermediate": 2880, "max_tokens": 33},
                        {"num_ranks": 72, "hidden": 7168, "intermediate": 3072, "max_tokens": 8192, "num_topk": 8, "pool_rows": 131072})]


@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_regions_are_aligned_and_disjoint_and_inside(dims):
    layout = pack(dims)
    end = 0
    for place in layout.placements.values():
        assert place.offset % place.region.alignment == 0 and place.offset >= end
        assert place.num_bytes == torch.empty(place.shape, dtype=place.dtype, device="meta").nbytes
        end = place.offset + place.num_bytes
    assert end <= layout.num_bytes < end + 1024
    assert set(layout.placements) == {region.name for region in REGIONS if dims.precision in region.precisions}


@pytest.mark.parametrize("precision", EVERY)
def test_views_show_their_own_bytes_only(precision):
    layout = pack(replace(SMALL, precision=precision))
    arena = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    expected = arena.clone()
    for value, (name, place) in enumerate(layout.placements.items(), start=1):
        view = layout.view(name, arena)
        assert (view.shape, view.dtype) == (place.shape, place.dtype) and view.is_contiguous()
        view.view(torch.uint8).fill_(value)
        expected[place.offset:place.offset + place.num_bytes] = value
    assert torch.equal(arena, expected)


def test_signal_words_of_two_ranks_never_share_a_line():
    layout = pack(SMALL)
    arena = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    lines = [layout.view(name, arena)[rank, 0].data_ptr() // 128 for name in SIGNALS for rank in range(SMALL.num_ranks)]
    assert len(set(lines)) == len(SIGNALS) * SMALL.num_ranks
    assert all(layout.view(name, arena)[0, 0].data_ptr() % 64 == arena.data_ptr() % 64 for name in SIGNALS)


def test_every_region_is_published_by_a_signal_of_the_table():
    assert {region.signal for region in REGIONS} == {"itself", "none (local)", "inputs_ready", "combine_ready"}
    assert SIGNALS == ("inputs_ready", "combine_ready", "abort", "barrier", "reset")


def test_offsets_are_64_bit():
    layout = pack(replace(SMALL, max_tokens=65536, num_topk=8, hidden=7168, intermediate=3072, pool_rows=524288))
    assert layout.offsets["partials"] == 6027220992
    assert layout.num_bytes == 6027220992 + 65536 * 8 * 7168 * 2
    assert "partials_offset = 6027220992ull" in emit_struct(layout)
    assert f"num_bytes = {layout.num_bytes}ull, hash = 0x{layout.hash}ull" in emit_struct(layout)
    view = layout.view("partials", torch.empty(layout.num_bytes, dtype=torch.uint8, device="meta"))
    assert view.shape == (65536, 8, 7168) and view.storage_offset() * 2 == 6027220992


def test_the_hash_covers_dims_and_rows(monkeypatch):
    layout = pack(SMALL)
    assert pack(SMALL).hash == layout.hash and re.fullmatch("[0-9a-f]{16}", layout.hash)
    changed = [replace(SMALL, **{field: getattr(SMALL, field) * 2}) for field in vars(SMALL) if field != "precision"]
    changed += [replace(SMALL, precision=precision) for precision in EVERY[1:]]
    hashes = {pack(dims).hash for dims in changed}
    monkeypatch.setattr("megamoe.comm.protocol.REGIONS", (*REGIONS[:-1], replace(REGIONS[-1], writer="somebody else")))
    hashes.add(pack(SMALL).hash)
    assert len(hashes) == len(changed) + 1 and layout.hash not in hashes


def test_a_region_that_this_precision_lacks():
    layout = pack(replace(SMALL, precision="bf16"))
    names = (*SIGNALS, "num_tokens", "topk_idx", "topk_weights", "x", "pool_x", "pool_a", "partials")
    with pytest.raises(ValueError, match=re.escape(f"Arena: region must be one of {names}, got 'x_sf'; precision is 'bf16'")):
        layout.view("x_sf", torch.empty(layout.num_bytes, dtype=torch.uint8))


def test_docs_are_generated():
    docs = Path(__file__).parents[2] / "docs" / "protocol.md"
    assert docs.read_text() == emit_markdown(), "write megamoe.comm.protocol.emit_markdown() to docs/protocol.md"


def test_default_pool():
    v4_pro = plan_dims(V4_PRO, num_ranks=4)
    assert v4_pro.pool_rows == 8192 * 6 * 33 // 32
    assert pack(v4_pro).num_bytes <= 1.5 * 2**30
    few = replace(V4_PRO, max_tokens_per_rank=3)
    assert plan_dims(few, num_ranks=1).pool_rows == 18 * 32, "worst case: 18 rows of different experts, a tile each"
    assert plan_dims(few, num_ranks=64).pool_rows == 64 * 21, "the worst case: 64 * 3 * 6 rows and 31 beside each of 6 experts'"
    one_expert = replace(V4_PRO, num_experts=8, max_tokens_per_rank=64)
    assert plan_dims(one_expert, num_ranks=8).pool_rows == 9 * 64, "512 rows and 31: a token has at most one slot on a rank with one expert"
    assert plan_dims(replace(V4_PRO, max_tokens_per_rank=1024), num_ranks=8).pool_rows == 16384, "the least where T * K is 6144"


def test_a_budget_is_spent_on_the_pool():
    cfg = replace(V4_PRO, max_tokens_per_rank=128)
    budget = 20 * 2**20
    dims = plan_dims(cfg, 4, budget)
    assert dims.pool_rows % 64 == 0
    assert pack(dims).num_bytes <= budget < pack(replace(dims, pool_rows=dims.pool_rows + 64)).num_bytes
    assert plan_dims(cfg, 4, 2**40).pool_rows == 95 * 64, "never more than the worst case: 4 * 128 * 6 + 31 * 96"


def test_budget_too_small_names_both_fixes():
    cfg = replace(V4_PRO, max_tokens_per_rank=128)
    with pytest.raises(ArenaBudgetError) as caught:
        plan_dims(cfg, 4, 4 * 2**20)
    assert str(caught.value) == ("Arena: arena_bytes must be at least 12647424 for 128 tokens per rank and a pool of 64 rows, got 4194304; "
                                 "pass arena_bytes >= 12647424 or max_tokens_per_rank <= 37")
    assert plan_dims(cfg, 4, 12647424).pool_rows == 64
    assert plan_dims(replace(cfg, max_tokens_per_rank=37), 4, 4 * 2**20).pool_rows == 64
    for too_much in (lambda: plan_dims(cfg, 4, 12647423), lambda: plan_dims(replace(cfg, max_tokens_per_rank=38), 4, 4 * 2**20)):
        with pytest.raises(ArenaBudgetError):
            too_much()


def test_budget_too_small_for_a_single_token():
    with pytest.raises(ArenaBudgetError, match=r"got 4096; pass arena_bytes >= \d+$"):
        plan_dims(V4_PRO, 4, 4096)


@pytest.mark.parametrize("reason", AbortReason)
def test_an_abort_word_holds_what_it_was_given(reason):
    abort = Abort(epoch=2**40 + 3, reason=reason, culprit=71)
    assert Abort.from_word(abort.to_word()) == abort and 0 < abort.to_word() < 2**63
    assert abort.ends(2**40 + 3)
    for other_call in (2**40 + 2, 2**40 + 4):
        assert abort.ends(other_call) == (reason != AbortReason.REFUSED), "a refusal concerns its own call only"


@pytest.mark.parametrize("library", ("found", None))
def test_host_atomics(monkeypatch, library):
    if library is None:
        monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
    store, load = signals.host_atomics.__wrapped__()
    words = torch.zeros(3, dtype=torch.int64)
    store(words[1].data_ptr(), 2**62 + 5)
    assert words.tolist() == [0, 2**62 + 5, 0] and load(words[1].data_ptr()) == 2**62 + 5


def test_host_atomics_where_neither_is_there(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    message = "libatomic was not found, which aarch64 needs for ordered shared memory; install libatomic1"
    with pytest.raises(OSError, match=re.escape(message)):
        signals.host_atomics.__wrapped__()
