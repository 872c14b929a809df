"""tuning/sm90: a legal config for every shape, few configs, sane choices, and measurements that take precedence over the model."""

import re
from itertools import product

import pytest

from megamoe.kernels import shipped
from megamoe.kernels.compiler import include_dir
from megamoe.kernels.fp4_gemm_config import EPILOGUES, MAX_SMEM_BYTES, Fp4GemmConfig, with_most_stages
from megamoe.kernels.tuning import sm90
from megamoe.kernels.tuning.sm90 import candidates, choose_fp4_gemm, predict_us, stage_us, token_tiles
from megamoe.kernels.tuning.table import Entry, Table, read_table, write_table

SMALL = with_most_stages(num_math_warpgroups=2, token_tiles=(8,), max_groups=64)


@pytest.fixture
def no_table(monkeypatch):
    monkeypatch.setattr(sm90, "read_table", lambda: Table.of([]))
    choose_fp4_gemm.cache_clear()
    yield
    choose_fp4_gemm.cache_clear()


def choose(n=6144, k=7168, num_groups=32, rows=64, epilogue="store", num_sms=132) -> Fp4GemmConfig:
    return choose_fp4_gemm(n, k, num_groups, rows * num_groups, rows, epilogue, num_sms)


@pytest.mark.parametrize("model", shipped.MODELS)
def test_every_model_shape_has_a_legal_config(model):
    """The constructor refuses what is not legal; here it is what the kernel needs beyond it."""
    hidden, intermediate, num_experts, num_topk = shipped.MODELS[model]
    for num_ranks, power in product((r for r in (1, 2, 4, 8) if num_experts % r == 0), range(14)):
        num_groups, num_rows = num_experts // num_ranks, 2**power * num_ranks * num_topk
        for (n, k, epilogue), hint in product(((2 * intermediate, hidden, "swiglu"), (hidden, intermediate, "store")), (None, 0, num_rows)):
            config = choose_fp4_gemm(n, k, num_groups, num_rows, hint, epilogue, 132)
            assert config.epilogue == epilogue and config.max_groups >= num_groups and config.smem_bytes <= MAX_SMEM_BYTES
            assert config.num_stages >= 4, "fewer do not cover the latency of HBM"


@pytest.mark.parametrize("n, k", [(32, 32), (96, 2880), (2880, 96), (64, 32), (28672, 4096), (129280, 7168)])
@pytest.mark.parametrize("num_groups", [1, 3, 64, 100, 512, 1000])
@pytest.mark.parametrize("num_sms", [1, 78, 132, 144])
def test_any_shape_has_a_legal_config(n, k, num_groups, num_sms):
    for rows, epilogue in product((0, 1, 7, 48, 49, 200, 100_000), EPILOGUES):
        config = choose_fp4_gemm(n, k, num_groups, rows * num_groups, rows, epilogue, num_sms)
        assert config.epilogue == epilogue and config.max_groups >= num_groups


def test_shipped_configs_are_few_and_unique():
    configs = [config for op, config, _, _ in shipped.shipped_kernels() if op == "fp4_gemm"]
    assert len(configs) == len(set(configs)) and 6 <= len(configs) <= 27
    assert {config.epilogue for config in configs} == {"store", "swiglu"}
    only_v3 = [config for op, config, _, _ in shipped.shipped_kernels(("v3",)) if op == "fp4_gemm"]
    assert set(only_v3) < set(configs)


def test_shipped_text_is_that_of_its_config():
    """A closure over the loop variable would give every kernel the text of the last."""
    kernels = [kernel for kernel in shipped.shipped_kernels() if kernel[0] == "fp4_gemm"]
    for _, config, make_source, entry in kernels:
        text = make_source()
        assert f"kStages = {config.num_stages}u;" in text and f"kMaxGroups = {config.max_groups}u;" in text
        assert f"{entry}(const __grid_constant__ megamoe::Fp4GemmParams params)" in text
    assert len({make_source() for _, _, make_source, _ in kernels}) == len(kernels)


@pytest.mark.parametrize("rows, num_math_warpgroups", [(1, 4), (8, 4), (20, 4), (32, 4), (64, 3), (96, 3), (512, 2), (4096, 2)])
def test_more_warpgroups_for_fewer_rows(no_table, rows, num_math_warpgroups):
    """What was fastest on an H200: 4 warpgroups for a few rows, 3 up to about 120, 2 for many; between, it depends on how they divide."""
    for n, k in ((6144, 7168), (7168, 3072)):
        assert choose(n, k, rows=rows).num_math_warpgroups == num_math_warpgroups
        if rows not in (32, 96):  # swiglu has no tile above 40 with 4 warpgroups, none above 88 with 3
            assert choose(n, k, rows=rows, epilogue="swiglu").num_math_warpgroups == num_math_warpgroups


def test_prefill_takes_one_size(no_table):
    for n, k in ((4096, 7168), (6144, 7168), (7168, 2048), (7168, 3072)):
        assert choose(n, k, 8, 4096).token_tiles == (176,)
    assert choose(7168, 16384, 1, 4096).token_tiles == (176,)


@pytest.mark.parametrize("num_groups", [1, 8, 32])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_sane_over_rows(no_table, num_groups, epilogue):
    """Twice the rows never take less time, and never more than twice the time and a round.

    Over many groups they take no more warpgroups.
    """
    before = None
    for rows in [2**i for i in range(14)]:
        config = choose(7168, 3072, num_groups, rows, epilogue)
        us = predict_us(config, 7168, 3072, num_groups, rows, 132)
        if before:
            assert before[0] <= us <= 2 * before[0] + 24 * stage_us(2, 176) + 5, rows
            assert num_groups < 32 or config.num_math_warpgroups <= before[1].num_math_warpgroups
        before = us, config


@pytest.mark.parametrize("num_groups, rows, n, k, measured_us", [
    (32, 20, 6144, 7168, 188), (32, 20, 7168, 3072, 105), (32, 64, 6144, 7168, 241), (32, 64, 7168, 3072, 132), (32, 96, 6144, 7168, 273),
    (32, 96, 7168, 3072, 159), (32, 192, 6144, 7168, 537), (32, 192, 7168, 3072, 293), (8, 4096, 4096, 7168, 1490),
    (8, 4096, 7168, 2048, 879), (8, 4096, 7168, 3072, 1153), (1, 4096, 7168, 16384, 739), (1, 4096, 4096, 7168, 194)])
def test_model_is_near_the_measurements(no_table, num_groups, rows, n, k, measured_us):
    """Rows sent to groups at random, measured on one H200 on 2026-11-21 (docs/PERFORMANCE.md)."""
    us = predict_us(choose(n, k, num_groups, rows), n, k, num_groups, rows, 132)
    assert us == pytest.approx(measured_us, rel=0.15)


def test_default_hint_is_the_mean(no_table):
    assert choose_fp4_gemm(6144, 7168, 32, 32 * 20, None, "store", 132) == choose(rows=20)
    assert choose_fp4_gemm(6144, 7168, 32, 32 * 4096, None, "store", 132) == choose(rows=4096)


def test_is_cached_and_prints_on_one_line():
    first = choose(rows=20)
    assert choose(rows=20) is first
    assert "\n" not in repr(first)
    assert repr(first).startswith("Fp4GemmConfig(num_math_warpgroups=4, token_tiles=(16, 24, 32, 40, 48), num_stages=")


@pytest.mark.parametrize("wrong, message", [
    ({"n": 48}, "fp4_gemm: n must be a positive multiple of 32, got 48; pad it"),
    ({"k": 0}, "fp4_gemm: k must be a positive multiple of 32, got 0; pad it"),
    ({"num_groups": 0}, "fp4_gemm: num_groups must be positive, got 0; pad it"),
    ({"num_sms": 0}, "fp4_gemm: num_sms must be positive, got 0; pad it"),
    ({"rows": -1}, "fp4_gemm: max_rows and rows_hint must be at least 0, got (-32, -1); count rows"),
    ({"epilogue": "relu"}, "fp4_gemm: epilogue must be one of ('store', 'accumulate', 'swiglu'), got 'relu'; pick one of them")])
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(**wrong)


def test_token_tiles_are_those_of_the_kernel():
    """Rows per group -> (tiles, tokens), by hand from the rule in schedule/grouped_tiles.cuh."""
    config = Fp4GemmConfig(num_math_warpgroups=2, token_tiles=(64, 96, 128), num_stages=4)
    assert [token_tiles(config, count) for count in (1, 64, 65, 128, 129, 192, 193, 257)] == [
        (1, 64), (1, 64), (1, 96), (1, 128), (2, 96), (2, 96), (2, 128), (3, 96)]


def test_model_cuts_the_last_round_where_the_kernel_does():
    text = (include_dir() / "megamoe/schedule/grouped_tiles.cuh").read_text()
    percent, blocks = map(int, re.search(r"kSplitBelowPercent = (\d+), kMinPart = (\d+);", text).groups())
    assert (sm90.SPLIT_BELOW, sm90.SPLIT_BLOCKS) == (percent / 100, blocks)


def test_rounds():
    """us of a tile 10, 8 blocks of K: full rounds, a cut last round with its exchange, and one that is full enough to stay whole."""
    assert [sm90._rounds_us(tiles, 10.0, 8) for tiles in (1.0, 1.25, 1.75, 2.0)] == [10.0, 10 + 5 + 2, 20.0, 20.0]
    assert sm90._rounds_us(1.25, 10.0, 4) == 20.0, "K is too short to cut"


def test_stage_time_is_interpolated():
    assert stage_us(2, 8) == stage_us(2, 16) == 0.248
    assert stage_us(2, 80) == pytest.approx((0.314 + 0.378) / 2) and stage_us(3, 48) == 0.385
    assert stage_us(4, 96) == pytest.approx(2 * 0.491), "beyond the last measurement in proportion"


@pytest.mark.parametrize("num_groups, capacities", [(1, {256, 512}), (256, {256, 512}), (257, {512}), (512, {512}), (513, {1024})])
def test_group_table_holds_the_groups(num_groups, capacities):
    for epilogue in EPILOGUES:
        assert {config.max_groups for config in candidates(num_groups, epilogue)} <= capacities


def entry(rows: int, config: Fp4GemmConfig = SMALL, **changes) -> Entry:
    return Entry(**{"n": 6144, "k": 7168, "num_groups": 32, "rows": rows, "num_sms": 132, "us": 100.0, "config": config} | changes)


def test_a_measurement_comes_before_the_model(monkeypatch):
    table = Table.of([entry(64), entry(1000, with_most_stages(num_math_warpgroups=2, token_tiles=(16,), max_groups=32))])
    monkeypatch.setattr(sm90, "read_table", lambda: table)
    choose_fp4_gemm.cache_clear()
    try:
        assert choose(rows=64) == choose(rows=59) == choose(rows=70) == SMALL
        others = {"n": 7168}, {"k": 4096}, {"num_groups": 31}, {"epilogue": "accumulate"}, {"num_sms": 114}
        for other in ({"rows": 57}, {"rows": 71}, *others):
            assert choose(**{"rows": 64} | other) != SMALL
        assert choose(rows=1000).token_tiles == (16,)
    finally:
        choose_fp4_gemm.cache_clear()


def test_the_nearest_measurement_counts():
    other = with_most_stages(num_math_warpgroups=2, token_tiles=(16,), max_groups=64)
    table, shape = Table.of([entry(64), entry(70, other)]), {"n": 6144, "k": 7168, "num_groups": 32, "epilogue": "store", "num_sms": 132}
    assert [table.find(rows=rows, **shape) for rows in (60, 66, 68, 75)] == [SMALL, SMALL, other, other]
    assert Table.of([entry(64, us=3.0), entry(64, other)]).entries() == [entry(64, other)], "a later entry replaces an earlier one"


def test_table_file_round_trip(tmp_path):
    path, table = tmp_path / "table.json", Table.of([entry(64), entry(20)])
    write_table(table, path)
    assert read_table(path) == table and [e.rows for e in read_table(path).entries()] == [20, 64]
    assert len(path.read_text().splitlines()) == 4, "brackets and a line per entry"
    write_table(Table.of([]), path)
    assert path.read_text() == "[]\n" and read_table(path) == Table.of([])


def test_an_illegal_entry_is_refused(tmp_path):
    path = tmp_path / "table.json"
    write_table(Table.of([entry(64)]), path)
    path.write_text(path.read_text().replace('"token_tiles": [8]', '"token_tiles": [9]'))
    with pytest.raises(ValueError, match=re.escape("got (9,)")):
        read_table(path)


def test_the_shipped_table_is_legal():
    for e in read_table().entries():
        assert e.config.max_groups >= e.num_groups and e.us > 0
