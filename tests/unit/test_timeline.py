"""The kernel timeline without a GPU: what is compiled, and buffer -> spans -> trace file -> picture."""

import ctypes
import gzip
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timeline_spans import ABOUT, FOLD, MATH, PULL, WEIGHTS, put, span, two_ranks

from megamoe.comm.protocol import ArenaDims
from megamoe.kernels import compiler, mega_moe
from megamoe.kernels.mega_moe_config import with_most_stages
from megamoe.testing import timeline
from megamoe.testing.timeline import KIND_INDEX, KINDS, LABELS, LANES, SPAN

ROOT = Path(__file__).resolve().parents[2]
DIMS = ArenaDims(num_ranks=2, max_tokens=16, num_topk=3, num_experts=6, hidden=96, intermediate=64, precision="fp8xfp4", pool_rows=256)
CONFIG = with_most_stages(num_math_warpgroups=2, token_tiles=(8, 16), max_groups=4, has_down_bias=False, hidden=96, intermediate=64)


def test_kinds_and_lanes_are_those_of_the_header():
    header = (ROOT / "csrc/include/megamoe/timeline.cuh").read_text()
    kinds = re.findall(r"^  k(\w+),", re.search(r"enum class SpanKind : uint32 \{\n(.*?)\};", header, re.S)[1], re.M)
    assert [re.sub(r"(?<=.)([A-Z])", r" \1", kind).lower() for kind in kinds] == [kind.name for kind in KINDS]
    lanes = re.search(r"enum TimelineLane : uint32 \{ (.*?), kNumTimelineLanes = kMathLane \+ 4 \};", header)[1].split(", ")
    assert [lane[1:-4].lower() for lane in lanes] == [*LANES[:4], "math"]
    assert LANES[4:] == tuple(f"math {i}" for i in range(4))
    fields = re.search(r"struct alignas\(16\) TimelineSpan \{\n(.*?)\};", header, re.S)[1]
    assert re.findall(r"^  (?:uint64|uint32|SpanKind) ([\w, ]+);", fields, re.M) == ["begin_ns, end_ns", "kind", "tile", "linear", "part"]


def test_kernels_record_only_when_asked():
    off, on = (mega_moe.source(CONFIG, DIMS, has_timeline=has_timeline).splitlines() for has_timeline in (False, True))
    assert [(a.strip(), b.strip()) for a, b in zip(off, on, strict=True) if a != b] == [
        ("static constexpr bool kTimeline = false;", "static constexpr bool kTimeline = true;")]
    assert mega_moe.source(CONFIG, DIMS).splitlines() == off
    keys = {mega_moe.kernel_text(CONFIG, DIMS, *flags)[1] for flags in ((), (False, True), (True,), (True, True))}
    assert len(keys) == 4, "compiled kernels are told apart"


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("is_virtual", (False, True))
def test_kernels_that_record_compile(is_virtual):
    buffer = mega_moe.TimelineBuffer
    claims = {"sizeof(megamoe::TimelineBuffer)": ctypes.sizeof(buffer), "megamoe::kNumTimelineLanes": len(LANES),
              "__builtin_offsetof(megamoe::TimelineBuffer, records)": buffer.records.offset,
              "__builtin_offsetof(megamoe::TimelineBuffer, capacity)": buffer.capacity.offset}
    source = "\n".join([mega_moe.source(CONFIG, DIMS, is_virtual, True), *(f"static_assert({a} == {b});" for a, b in claims.items()), ""])
    assert compiler.compile_cubin(source).warnings == [], "no wgmma is serialised; spills are accepted"


def test_parameters_name_the_buffer():
    block, y, buffer = mega_moe.MegaMoeParams.allocate(), torch.empty(5, 96), timeline.allocate(3, 77, "cpu")
    routed = SimpleNamespace(row_entry=torch.empty(1), offsets=torch.empty(1))
    mega = SimpleNamespace(_params={}, _make_params=lambda *args: block)
    assert mega_moe.MegaMoe.params(mega, CONFIG, "experts", routed, y, buffer) is block
    assert (block.timeline.records, block.timeline.capacity) == (buffer.data_ptr(), 77)


def test_decodes_what_was_counted_and_nothing_else():
    buffer = timeline.allocate(3, 4, "cpu")
    assert buffer.shape == (3, 8, 5, 4) and buffer.dtype == torch.int64 and not buffer.any()
    buffer[:, :, 1:] = -1  # records that no count covers
    put(buffer, 0, WEIGHTS, ("weights", 1, 70_000, 55, 2**60, 2**60 + 320))
    put(buffer, 2, MATH + 3, ("stage wait", 0, 3, 9, 100, 132), ("main loop", 0, 3, 9, 132, 900))
    spans, num_dropped = timeline.decode(buffer, 6)
    assert num_dropped == 0
    assert spans.tolist() == [span("weights", 1, 70_000, 55, begin=2**60, end=2**60 + 320, rank=6, lane=WEIGHTS),
                              span("stage wait", 0, 3, 9, begin=100, end=132, rank=6, block=2, lane=MATH + 3),
                              span("main loop", 0, 3, 9, begin=132, end=900, rank=6, block=2, lane=MATH + 3)]


def test_full_lanes_drop_spans_and_count_them():
    buffer = timeline.allocate(2, 2, "cpu")
    put(buffer, 0, PULL, *(("pull", 0, 1, i, i, i + 1) for i in range(5)))
    put(buffer, 1, FOLD, *(("fold", 0, 1, i, i, i + 1) for i in range(2)))
    spans, num_dropped = timeline.decode(buffer, 0)
    assert num_dropped == 3
    assert [(s["block"], s["part"]) for s in spans] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_an_empty_buffer_has_no_spans():
    spans, num_dropped = timeline.decode(timeline.allocate(2, 3, "cpu"), 0)
    assert (len(spans), num_dropped) == (0, 0)
    assert timeline.align(spans)[1] == {}


def test_other_tensors_are_refused():
    message = ("timeline: buffer must be [num_blocks, 8, 1 + capacity, 4] int64, got [2, 7, 3, 4] torch.int64; use allocate()")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        timeline.decode(torch.zeros(2, 7, 3, 4, dtype=torch.int64), 0)


def test_clocks_meet_where_the_ranks_do():
    spans = two_ranks()
    aligned, shifts = timeline.align(spans)
    assert shifts == {0: 0, 1: -40}, "rank 0 first leaves at 9500, rank 1 at 9540"
    assert aligned["begin_ns"].tolist() == [0, 1000, 3000, 8000, 500, 1500, 200, 3500]
    assert aligned["end_ns"].tolist() == [2000, 3000, 8000, 8500, 1500, 8600, 3500, 8500]
    assert spans["begin_ns"][0] == 1000, "the argument is left alone"


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_trace_file(tmp_path, name):
    spans, _ = timeline.align(two_ranks())
    timeline.write_trace(tmp_path / name, spans, ABOUT)
    raw = (tmp_path / name).read_bytes()
    trace = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "M"}
    found = [event for event in events if event["ph"] == "X"]
    assert len(found) == 8
    for event in found:
        assert {"ph", "name", "cat", "cname", "pid", "tid", "ts", "dur", "args"} == set(event)
        assert event["dur"] >= 0 and isinstance(event["pid"], int) and isinstance(event["tid"], int)
    assert [(e["name"], e["cat"], e["ts"], e["dur"], e["args"]) for e in found if e["pid"] == 1] == [
        ("main loop, linear 1", "math", 0.2, 3.3, {"tile": 2, "part": 1}), ("meet peers", "math", 3.5, 5.0, {"tile": 0, "part": 0})]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    used = {(e["pid"], e["tid"]) for e in found}
    assert set(names) == set(order) == used
    in_order = ["SM 0 pull", "SM 0 pull (2)", "SM 0 math 0", "SM 1 math 1"]
    assert [names[thread] for thread in sorted(names, key=order.get) if thread[0] == 0] == in_order
    assert [name for (pid, _), name in names.items() if pid == 1] == ["SM 0 math 0"]
    assert {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"} == {0: "rank 0", 1: "rank 1"}
    for thread in used:  # Perfetto wants the spans of a thread one after the other
        ends = [(e["ts"], e["ts"] + e["dur"]) for e in found if (e["pid"], e["tid"]) == thread]
        assert all(end <= begin + 1e-9 for (_, end), (begin, _) in zip(ends, ends[1:]))
    back, about = timeline.read_trace(tmp_path / name)
    assert about == ABOUT
    assert sorted(back.tolist()) == sorted(spans.tolist())


def test_labels_are_distinct_and_have_a_colour_each():
    assert len(LABELS) == 7 * 2 + 6
    assert LABELS["main loop, linear 2"] == (KIND_INDEX["main loop"], 1) and LABELS["sum slots"] == (KIND_INDEX["sum slots"], 0)
    colors = [color for kind in KINDS for color in kind.colors]
    assert len(set(colors)) == len(colors) == len(LABELS)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.image import imread

    spans = np.array([span("main loop", 0, begin=0, end=5000), span("main loop", 1, begin=5000, end=10_000),
                      span("weights", 0, begin=0, end=10_000, block=1, lane=WEIGHTS)], SPAN)
    timeline.draw(tmp_path / "trace.png", spans, "a title")
    pixels = (imread(tmp_path / "trace.png")[..., :3] * 255).round().astype(int)
    # Columns in which each colour is found, without the legend under the axes.
    where = {color: np.flatnonzero((pixels[:-80] == [int(color[i:i + 2], 16) for i in (1, 3, 5)]).all(2).any(0))
             for color in (*KINDS[KIND_INDEX["main loop"]].colors, KINDS[KIND_INDEX["weights"]].colors[0])}
    first, second, whole = where.values()
    assert len(first) > 300 and abs(len(first) - len(second)) <= 2 and first.max() <= second.min()
    assert abs(len(whole) - len(first) - len(second)) <= 4, "time is to scale"


def test_without_matplotlib_it_says_how(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    message = ("timeline: a picture must have matplotlib, got none; pip install 'megamoe[trace]' here, or copy the trace file and run "
               "launch/trace_moe.py --from TRACE --png FILE where it is installed")
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        timeline.draw(tmp_path / "trace.png", two_ranks(), "")
