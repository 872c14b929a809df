"""megamoe.testing.bench and launch/tune_gemm.py without a GPU: group sizes, work and floor, timing order, what the tuner keeps."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import tune_gemm  # noqa: E402
from bench_gemm_cases import Case, parse_config  # noqa: E402

from megamoe.kernels.fp4_gemm_config import with_most_stages  # noqa: E402
from megamoe.kernels.tuning.table import Entry, Table  # noqa: E402
from megamoe.testing import bench  # noqa: E402
from megamoe.testing.bench import Timing, fp4_gemm_work, group_counts, measure, num_buffers, summarize  # noqa: E402

MASKED = Case("masked", 32, 20, 6144, 7168, "uniform")


def test_counts():
    exact, uniform, routing = (group_counts(kind, 32, 100, seed=3) for kind in bench.COUNTS)
    assert exact == [100] * 32
    assert all(70 <= count < 130 for count in uniform) and len(set(uniform)) > 10
    assert sum(routing) == 3200 and 50 < min(routing) < 90 and 110 < max(routing) < 150
    assert group_counts("routing", 32, 100, 3) == routing != group_counts("routing", 32, 100, 4)
    assert group_counts("uniform", 2, 4096) == [4255, 3605], "the same on every machine and version"
    message = "group_counts: kind must be one of ('exact', 'uniform', 'routing'), got 'zipf'; pick one of them"
    with pytest.raises(ValueError, match=re.escape(message)):
        group_counts("zipf", 2, 2)


def test_work_and_floor_by_hand():
    work = fp4_gemm_work([3, 0, 5], n=64, k=128)
    assert work.flop == 2 * 8 * 64 * 128
    assert work.weight_bytes == 2 * 64 * (64 + 4), "two groups have rows; half a byte a weight and a byte per 32"
    assert work.token_bytes == 8 * 129 and work.output_bytes == 8 * 128
    assert fp4_gemm_work([8], 64, 128, is_swiglu=True).output_bytes == 8 * (32 + 1)
    decode, prefill = fp4_gemm_work([20] * 32, 6144, 7168), fp4_gemm_work([4096], 4096, 7168)
    assert decode.floor_us == pytest.approx((32 * 6144 * 7168 * 17 / 32 + 640 * (7169 + 12288)) / 4.2e6)
    assert prefill.floor_us == pytest.approx(2 * 4096 * 4096 * 7168 / 1.5e9)


def test_summary_is_median_and_deciles():
    assert summarize([5.0]) == Timing(5.0, 5.0, 5.0, 1)
    assert summarize(list(range(20, -1, -1))) == Timing(10, 2, 18, 21)


def test_contenders_take_turns_and_rotate_buffers():
    calls = []
    contenders = {name: [lambda name=name, i=i: calls.append((name, i)) for i in range(2)] for name in ("a", "b")}

    def time_once(launch):
        launch()
        return float(len(calls))

    timings = measure(contenders, 3, time_once)
    assert calls[:4] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)], "each buffer once before anything is timed"
    assert calls[4:] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert timings == {"a": Timing(7.0, 5.0, 9.0, 3), "b": Timing(8.0, 6.0, 10.0, 3)}


def test_buffers_exceed_l2():
    assert num_buffers(700 << 20) == 2 and num_buffers(100 << 20) == 2
    assert num_buffers(16 << 20) == 8 and 8 * 16 >= 120


def test_provenance_names_the_command():
    about = bench.provenance(["launch/bench_gemm.py", "--op", "dense"])
    assert about["command"] == "python launch/bench_gemm.py --op dense" and about["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", about["commit"]) and about["gpu"] and about["date"]
    assert bench.provenance([], "abc1234")["commit"] == "abc1234"


def test_tuner_tries_what_is_within_reach():
    found = tune_gemm.contenders(MASKED, 132, ["2:24,48:5"])
    assert found[0].num_math_warpgroups == 4, "the choice of the cost model first"
    assert found[-1] == parse_config("2:24,48:5", "store", 32) and 2 <= len(found) == len(set(found))


def test_tuner_keeps_what_beats_the_model():
    model, better = (with_most_stages(num_math_warpgroups=2, token_tiles=(tokens,), max_groups=32) for tokens in (64, 96))

    def finding(us: float) -> tune_gemm.Finding:
        timings = {better: Timing(us, us, us, 30), model: Timing(100.0, 99.0, 101.0, 30)}
        return tune_gemm.Finding(MASKED, dict(sorted(timings.items(), key=lambda item: item[1].us)), model)

    other = Entry(64, 64, 2, 8, 132, 5.0, model)
    kept = tune_gemm.updated(Table.of([other]), [finding(98.0)], 132)
    entry = Entry(6144, 7168, 32, 20, 132, 98.0, better)
    assert kept.entries() == [other, entry]
    assert tune_gemm.updated(kept, [finding(99.5)], 132).entries() == [other], "half a percent is noise, and an entry is a compilation"
    assert tune_gemm.updated(kept, [finding(110.0)], 132).entries() == [other]
    text = tune_gemm.findings_table([finding(98.0)])
    assert re.search(r"2:96:\d+ +98.0 +98.0-98.0 +kept\n", text) and text.endswith("model")
