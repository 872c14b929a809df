"""What mega_moe's roles record when its timeline is on (csrc/include/megamoe/timeline.cuh): buffer -> spans -> trace file -> picture.

A trace file is JSON that Perfetto and chrome://tracing open, and holds everything the picture needs.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megamoe.errors import check

LANES = ("weights", "tokens", "pull", "fold", "math 0", "math 1", "math 2", "math 3")  # TimelineLane
SPAN = np.dtype([("rank", "i4"), ("block", "i4"), ("lane", "i4"), ("kind", "i4"), ("linear", "i4"), ("tile", "i4"), ("part", "i4"),
                 ("begin_ns", "i8"), ("end_ns", "i8")])
_WORDS = 4  # of 64 bits, a record
_MAX_TRACKS = 10  # of a lane whose spans overlap


@dataclass(frozen=True)
class Kind:
    """A SpanKind: its role and colours, one for each linear if it belongs to a task. `cname` is the nearest colour of chrome://tracing."""

    name: str
    role: str
    colors: tuple[str, ...]
    cname: str

    def label(self, linear: int) -> str:
        return self.name if len(self.colors) == 1 else f"{self.name}, linear {linear + 1}"


KINDS = (
    Kind("weights", "weights", ("#4c9be8", "#1f5fa8"), "rail_load"),
    Kind("tokens wait", "tokens", ("#e3f1f1", "#cfe4e4"), "white"),
    Kind("tokens", "tokens", ("#3fb8af", "#1b7f79"), "rail_animation"),
    Kind("pull wait", "pull", ("#dff0d8",), "white"),
    Kind("pull", "pull", ("#5cb85c",), "good"),
    Kind("fold wait", "fold", ("#ece2f2",), "white"),
    Kind("fold", "fold", ("#9b59b6",), "cq_build_passed"),
    Kind("stage wait", "math", ("#e4e4e4", "#d2d2d2"), "grey"),
    Kind("main loop", "math", ("#f0883e", "#d1402f"), "thread_state_running"),
    Kind("epilogue", "math", ("#f7d154", "#b8860b"), "yellow"),
    Kind("skipped task", "math", ("#bbbbbb", "#a5a5a5"), "grey"),
    Kind("meet peers", "math", ("#f3e5d8",), "white"),
    Kind("sum slots", "math", ("#6b4226",), "olive"),
)
KIND_INDEX = {kind.name: i for i, kind in enumerate(KINDS)}
# (kind, linear) by label, in the order of tables and legends.
LABELS = {kind.label(linear): (i, linear) for i, kind in enumerate(KINDS) for linear in range(len(kind.colors))}


def allocate(num_blocks: int, capacity: int, device: torch.device | str) -> torch.Tensor:
    """A buffer for one call with room for `capacity` spans per lane: zeros, [num_blocks, len(LANES), 1 + capacity, 4] int64.

    Zero it again before another call is recorded.
    """
    return torch.zeros(num_blocks, len(LANES), 1 + capacity, _WORDS, dtype=torch.int64, device=device)


def decode(buffer: torch.Tensor, rank: int) -> tuple[np.ndarray, int]:
    """Read what one rank has recorded.

    Args:
        buffer: from `allocate`, on the CPU.
        rank: written into the spans.

    Returns:
        spans [n] of dtype SPAN, times by the clock of the GPU; the number of spans that found no room.
    """
    check(buffer.dtype == torch.int64 and buffer.dim() == 4 and (buffer.shape[1], buffer.shape[3]) == (len(LANES), _WORDS), "timeline",
          "buffer", f"[num_blocks, {len(LANES)}, 1 + capacity, {_WORDS}] int64", f"{list(buffer.shape)} {buffer.dtype}", "use allocate()")
    capacity, counts = buffer.shape[2] - 1, buffer[:, :, 0, 0]
    block, lane, idx = torch.nonzero(torch.arange(capacity) < counts[..., None], as_tuple=True)
    words = buffer[block, lane, 1 + idx].numpy()
    spans = np.empty(len(words), SPAN)
    spans["rank"], spans["block"], spans["lane"] = rank, block.numpy(), lane.numpy()
    spans["begin_ns"], spans["end_ns"] = words[:, 0], words[:, 1]
    for word, (low, high) in ((2, ("kind", "tile")), (3, ("linear", "part"))):
        spans[low], spans[high] = words[:, word] & 0xffffffff, words[:, word] >> 32
    return spans, (counts - capacity).clamp(min=0).sum().item()


def align(spans: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
    """Bring the ranks' clocks together, and let time begin with the first span.

    Every rank leaves "meet peers" when the last one's signal arrives: at one moment, to within a microsecond or two. GPU clocks may
    differ by more.

    Returns:
        A copy of the spans; ns added to each rank's clock so that it agrees with the lowest rank's. Ranks that never met are not moved.
    """
    spans, shifts = spans.copy(), {}
    meets = spans["kind"] == KIND_INDEX["meet peers"]
    met_ns = {rank: spans["end_ns"][meets & (spans["rank"] == rank)].min() for rank in np.unique(spans["rank"][meets]).tolist()}
    for rank, met in met_ns.items():
        shifts[rank] = int(met_ns[min(met_ns)] - met)
        spans["begin_ns"][spans["rank"] == rank] += shifts[rank]
        spans["end_ns"][spans["rank"] == rank] += shifts[rank]
    first = spans["begin_ns"].min() if len(spans) else 0
    spans["begin_ns"] -= first
    spans["end_ns"] -= first
    return spans, shifts


def write_trace(path: Path, spans: np.ndarray, about: Mapping[str, object]) -> None:
    """Write a trace file: pid is the rank, a thread per block and lane, times in us. Spans that overlap get threads of their own.

    Args:
        path: gzipped if it ends in .gz, which Perfetto reads too.
        spans: of all ranks, aligned.
        about: any facts that JSON has, kept as otherData.
    """
    with (gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")) as file:
        file.write(f'{{"displayTimeUnit": "ns", "otherData": {json.dumps(dict(about))}, "traceEvents": [\n')
        file.writelines(("" if i == 0 else ",\n") + json.dumps(event) for i, event in enumerate(_events(spans)))
        file.write("\n]}\n")


def read_trace(path: Path) -> tuple[np.ndarray, dict[str, object]]:
    """The spans of a file that `write_trace` made, sorted by rank, block, lane and begin, and its `about`."""
    with (gzip.open(path, "rt") if path.suffix == ".gz" else open(path)) as file:
        trace = json.load(file)
    rows = []
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            block, lane, _ = _thread(event["tid"])
            begin, length = round(event["ts"] * 1000), round(event["dur"] * 1000)
            rows.append((event["pid"], block, lane, *LABELS[event["name"]], event["args"]["tile"], event["args"]["part"], begin,
                         begin + length))
    return _in_order(np.array(rows, SPAN)), trace["otherData"]


def draw(path: Path, spans: np.ndarray, title: str) -> None:
    """Draw one rank as a PNG: a panel per role, in each time to the right and SMs downwards, coloured by kind of span.

    Raises:
        ImportError: matplotlib, which is optional, is missing; says how to get the picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError("timeline: a picture must have matplotlib, got none; pip install 'megamoe[trace]' here, or copy the trace file "
                          "and run launch/trace_moe.py --from TRACE --png FILE where it is installed") from missing
    roles = list(dict.fromkeys(kind.role for kind in KINDS))
    figure = Figure(figsize=(16, 14), dpi=150, layout="constrained")
    panels = figure.subplots(len(roles), sharex=True, height_ratios=[2 if role == "math" else 1 for role in roles])
    role_of_span = np.array([kind.role for kind in KINDS])[spans["kind"]]
    for panel, role in zip(panels, roles, strict=True):
        _draw_role(panel, spans[role_of_span == role])
        panel.set(ylim=(int(spans["block"].max()) + 1, 0), ylabel=f"{role}: SM")
    panels[-1].set(xlim=(spans["begin_ns"].min() / 1000, spans["end_ns"].max() / 1000), xlabel="us")
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=7, frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def _draw_role(panel, spans: np.ndarray) -> None:
    """The spans of one role as boxes; the row of an SM is shared by the role's lanes."""
    from matplotlib.collections import PolyCollection
    lanes = np.unique(spans["lane"])
    height = 1 / max(1, len(lanes))
    top = spans["block"] + height * np.searchsorted(lanes, spans["lane"])
    begin, end = spans["begin_ns"] / 1000, spans["end_ns"] / 1000
    corners = np.stack((begin, top, end, top, end, top + height, begin, top + height), axis=1).reshape(-1, 4, 2)
    for label, (kind, linear) in LABELS.items():
        mine = (spans["kind"] == kind) & (spans["linear"] == linear)
        if mine.any():
            panel.add_collection(PolyCollection(corners[mine], facecolors=KINDS[kind].colors[linear], linewidths=0, label=label))


def _in_order(spans: np.ndarray) -> np.ndarray:
    return spans[np.lexsort([spans[name] for name in ("end_ns", "begin_ns", "lane", "block", "rank")])]


def _thread_id(block: int, lane: int, track: int) -> int:
    return (block * len(LANES) + lane) * _MAX_TRACKS + track


def _thread(thread_id: int) -> tuple[int, int, int]:
    """block, lane, track"""
    return thread_id // _MAX_TRACKS // len(LANES), thread_id // _MAX_TRACKS % len(LANES), thread_id % _MAX_TRACKS


def _events(spans: np.ndarray) -> Iterator[dict[str, object]]:
    """Spans first, then the names of what they have used."""
    threads: dict[tuple[int, int, int], list[int]] = {}  # end of the last span of each track
    for rank, block, lane, kind, linear, tile, part, begin, end in _in_order(spans).tolist():
        tracks = threads.setdefault((rank, block, lane), [])
        track = next((i for i, last_end in enumerate(tracks) if last_end <= begin), len(tracks))
        tracks[track:track + 1] = [end]
        yield {"ph": "X", "name": KINDS[kind].label(linear), "cat": KINDS[kind].role, "cname": KINDS[kind].cname, "pid": rank,
               "tid": _thread_id(block, lane, track), "ts": begin / 1000, "dur": (end - begin) / 1000, "args": {"tile": tile, "part": part}}
    for rank in sorted({rank for rank, _, _ in threads}):
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
    for (rank, block, lane), tracks in threads.items():
        for track in range(len(tracks)):
            thread, suffix = {"pid": rank, "tid": _thread_id(block, lane, track)}, f" ({track + 1})" if track else ""
            yield {"ph": "M", "name": "thread_name", **thread, "args": {"name": f"SM {block} {LANES[lane]}{suffix}"}}
            yield {"ph": "M", "name": "thread_sort_index", **thread, "args": {"sort_index": thread["tid"]}}
