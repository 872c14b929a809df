"""launch/trace_moe.py without a GPU: the table, what a run records and writes, and traces read back."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timeline_spans import ABOUT, MATH, put, span, two_ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import trace_moe  # noqa: E402

from megamoe.testing import timeline  # noqa: E402


def test_summary_table():
    spans, _ = timeline.align(two_ranks())
    lines = trace_moe.summary_table(spans).splitlines()
    assert lines[0].split("  ")[0] == "span" and lines[0].endswith("of SM time  median us  first us  last us")
    # SM time: 2 SMs x 8600 ns in rank 0, 1 x 8300 in rank 1; one lane of pull, two of math.
    cells = [re.split(r"  +", line) for line in lines[2:]]
    assert cells == [
        ["pull", "pull", "2", f"{100 * 3000 / 25_500:.1f} %", "2.00", "0.0", "3.0"],  # 3000: overlap counts once
        ["main loop, linear 1", "math", "2", f"{100 * 4300 / 51_000:.1f} %", "2.15", "0.2", "3.5"],
        ["main loop, linear 2", "math", "1", f"{100 * 5000 / 51_000:.1f} %", "5.00", "3.0", "8.0"],
        ["meet peers", "math", "3", f"{100 * 12_600 / 51_000:.1f} %", "5.00", "1.5", "8.6"],
    ]


class RecordingLayer:
    """Stands for the layer: its call number n records four main loops of tile n in each rank."""

    device = torch.device("cpu")

    def __init__(self, *_, **kwargs):
        self.kwargs, self.engine, self.num_calls, self.num_checks = kwargs, SimpleNamespace(), 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load_experts(self, *_):
        assert self.kwargs["engine"] == "fused"

    def __call__(self, *inputs):
        assert not self.engine.timeline.any(), "zero before each call"
        self.num_calls += 1
        put(self.engine.timeline, 1, MATH, *(("main loop", 0, self.num_calls, i, 100 + i, 101 + i) for i in range(4)))

    def check(self):
        self.num_checks += 1


@pytest.fixture
def two_sms(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    return lambda call, num_calls: ([float(call() or 77)] * num_calls, [])  # a timer


def test_a_call_is_recorded_once_it_is_compiled(two_sms):
    layer, draw = RecordingLayer(), SimpleNamespace(x="x", topk_idx="idx", topk_weights="weights")
    buffer, call_us = trace_moe.record_call(layer, draw, two_sms, 3)
    assert (layer.num_calls, layer.num_checks, call_us) == (2, 2, 77)
    spans, num_dropped = timeline.decode(buffer, 0)
    assert spans["tile"].tolist() == [2, 2, 2] and num_dropped == 1, "only the second call"


def test_script_writes_what_all_ranks_recorded(tmp_path, capsys, monkeypatch, two_sms):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trace_moe, "MegaMoE", RecordingLayer)
    monkeypatch.setattr(trace_moe, "CudaTimer", lambda device: two_sms)
    assert trace_moe.main(["--model", "tiny", "--tokens", "4", "--capacity", "3", "--out", str(tmp_path / "t.json")]) == 0
    spans, about = timeline.read_trace(tmp_path / "t.json")
    assert spans.tolist() == [span("main loop", 0, 2, i, begin=i, end=i + 1, block=1) for i in range(3)]
    assert [about[name] for name in ("model", "tokens", "num_ranks", "call_us", "dropped_spans")] == ["tiny", 4, 1, 77.0, 1]
    assert about["command"].startswith("torchrun --standalone --nproc-per-node 1 ")
    assert f"{tmp_path / 't.json'} written" in capsys.readouterr().out


def test_script_reads_a_trace(tmp_path, capsys, monkeypatch):
    spans, _ = timeline.align(two_ranks())
    timeline.write_trace(tmp_path / "trace.json", spans, {**ABOUT, "dropped_spans": 1234})
    drawn = []
    monkeypatch.setattr(timeline, "draw", lambda path, spans, title: drawn.append((path, spans["rank"].tolist(), title)))
    assert trace_moe.main(["--from", str(tmp_path / "trace.json"), "--png", "out.png", "--rank", "1"]) == 0
    title = "mega_moe, v4-pro, 512 tokens x 2 ranks, uniform routing, NVIDIA H200, commit abc1234"
    assert drawn == [(Path("out.png"), [1, 1], f"{title}: rank 1")]
    assert capsys.readouterr().out.endswith(
        f"{title}\nwhole call 1012.5 us with staging and routing, on the slowest rank; clocks of the ranks moved by [0, -40] ns, "
        "their steps are 100 ns\n1,234 spans found no room: raise --capacity\n")


def test_script_reports_a_missing_matplotlib(tmp_path, capsys, monkeypatch):
    timeline.write_trace(tmp_path / "trace.json", two_ranks(), ABOUT)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert trace_moe.main(["--from", str(tmp_path / "trace.json"), "--png", "out.png"]) == 1
    out, err = capsys.readouterr()
    assert "pip install 'megamoe[trace]'" in err and "main loop, linear 2" in out


@pytest.mark.parametrize("argv, message", [
    (["--tokens", "0"], "trace_moe: --tokens must be in 1..1, got 0; raise --max-tokens or leave it out"),
    (["--tokens", "9", "--max-tokens", "8"], "trace_moe: --tokens must be in 1..8, got 9; raise --max-tokens or leave it out"),
    (["--capacity", "0"], "trace_moe: --capacity must be at least 1, got 0; leave it out"),
    ([], "trace_moe: ranks must be started by torchrun, got a plain process; see --help for the command"),
])
def test_bad_arguments(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        trace_moe.main(argv)
    assert capsys.readouterr().err.endswith(f"error: {message}\n")


def test_a_rank_that_is_not_in_the_trace(tmp_path):
    timeline.write_trace(tmp_path / "trace.json", two_ranks(), ABOUT)
    with pytest.raises(ValueError, match=f"^{re.escape('trace_moe: --rank must be one of [0, 1], got 2; pick a rank of the trace')}$"):
        trace_moe.main(["--from", str(tmp_path / "trace.json"), "--rank", "2"])
