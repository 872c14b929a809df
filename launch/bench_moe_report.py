"""What the MoE benchmark writes: records, the table on the terminal, and the table of docs/PERFORMANCE.md made from records."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from bench_moe_cases import GOAL_RANKS, GOAL_ROUTING, GOALS, MODELS, ROUTINGS, Goal, LayerWork

from megamoe.testing.bench import summarize
from megamoe.testing.report import table

INCLUDES = "quantisation of x, dispatch, both linears, combine, reduce"


@dataclass(frozen=True)
class About:
    """What is the same for every record of one contender in one run."""

    model: str
    num_ranks: int
    engine: str
    backend: str
    routing: str
    graph: bool
    act_group: int | str | None  # None: nothing is quantised
    max_tokens: int  # per rank
    arena_bytes: int  # of one rank
    num_calls: int  # of each routing
    includes: str
    gpu: str
    torch: str
    commit: str
    command: str
    date: str


@dataclass(frozen=True)
class Record(About):
    """One contender at one number of tokens; a line of the JSONL. Times are those of the slowest rank, over the routings."""

    tokens: int  # of each rank
    num_routings: int
    us: float  # mean
    p10_us: float
    p90_us: float
    host_us: float  # median; part of `us` only where the engine waits for the host
    floor_us: float  # mean
    percent_of_floor: float
    tflops: float  # useful, mean of a rank
    weights_gbps: float  # FP4 weights of experts with rows, mean of a rank
    nvlink_bytes: float  # busier direction of the busiest rank
    median_error: float | None  # relative, per token, against FP64
    max_error: float | None


def make_record(about: About, tokens: int, times_us: Sequence[float], host_us: float, works: Sequence[LayerWork],
                errors: tuple[float, float] | None) -> Record:
    """`times_us` and `works` have one entry per routing."""
    spread, us = summarize(times_us), statistics.fmean(times_us)
    flop, weight_bytes, nvlink_bytes, floor_us = (
        statistics.fmean(getattr(work, name) for work in works)
        for name in ("mean_flop", "mean_weight_bytes", "nvlink_bytes", "floor_us"))
    median_error, max_error = errors or (None, None)
    return Record(**asdict(about), tokens=tokens, num_routings=len(times_us), us=us, p10_us=spread.p10_us, p90_us=spread.p90_us,
                  host_us=host_us, floor_us=floor_us, percent_of_floor=100 * floor_us / us, tflops=flop / us / 1e6,
                  weights_gbps=weight_bytes / us / 1e3, nvlink_bytes=nvlink_bytes, median_error=median_error, max_error=max_error)


def terminal_table(records: Sequence[Record]) -> str:
    header = ("T", "engine", "us", "p10-p90", "host us", "floor us", "of floor", "TFLOPS", "GB/s", "NVLink MB", "error")
    return table(header, [(str(r.tokens), _engine(r), f"{r.us:.1f}", f"{r.p10_us:.1f}-{r.p90_us:.1f}", f"{r.host_us:.0f}",
                           f"{r.floor_us:.1f}", f"{r.percent_of_floor:.0f} %", f"{r.tflops:.1f}", f"{r.weights_gbps:.0f}",
                           f"{r.nvlink_bytes / 1e6:.1f}", _error(r)) for r in records])


def markdown_table(records: Iterable[Record]) -> str:
    """One row per model, ranks, routing, engine and T, from the last record of each; goals without a record say "not measured"."""
    last = {_row_key(record): record for record in records}
    rows = dict(sorted((key, _measured_row(record)) for key, record in last.items()))
    measured = {(r.model, r.engine, r.tokens) for r in last.values() if _goal(r)}
    for model, engine, tokens, goal in ((*key, tokens, goal) for key, goals in GOALS.items() for tokens, goal in goals.items()):
        if (model, engine, tokens) not in measured:
            key = (list(MODELS).index(model), GOAL_RANKS, ROUTINGS.index(GOAL_ROUTING), tokens, engine, False)
            cells = [model, str(GOAL_RANKS), GOAL_ROUTING, str(tokens), engine, "not measured", *_goal_cells(goal, None)]
            rows[key] = _row(cells + [""] * 10)
    header = ("model", "ranks", "routing", "T", "engine", "us", "required", "reached", "best released", "p10-p90 us", "host us", "floor us",
              "of floor", "TFLOPS", "GB/s of weights", "NVLink MB", "arena GB", "error median / max", "commit")
    rule = "|---|--:|---|--:|---|" + "--:|--:|---|--:|" + "--:|" * 8 + "---|---|"
    sources = (f"- {r.gpu}, torch {r.torch}, commit {r.commit}, {r.date}: `{r.command}`" for _, r in sorted(last.items()))
    return "\n".join([_row(header), rule, *(rows[key] for key in sorted(rows)), "", *dict.fromkeys(sources)]).rstrip() + "\n"


def _row_key(record: Record) -> tuple:
    return (list(MODELS).index(record.model), record.num_ranks, ROUTINGS.index(record.routing), record.tokens, record.engine, record.graph)


def _goal(r: Record) -> Goal | None:
    is_measured = (r.num_ranks, r.routing) == (GOAL_RANKS, GOAL_ROUTING)
    return GOALS.get((r.model, r.engine), {}).get(r.tokens) if is_measured else None


def _measured_row(r: Record) -> str:
    goal = _goal(r)
    cells = _goal_cells(goal, r.us) if goal else ["", "", ""]
    return _row([r.model, str(r.num_ranks), r.routing, str(r.tokens), _engine(r), f"{r.us:.0f}", *cells, f"{r.p10_us:.0f}-{r.p90_us:.0f}",
                 f"{r.host_us:.0f}", f"{r.floor_us:.0f}", f"{r.percent_of_floor:.0f} %", f"{r.tflops:.0f}", f"{r.weights_gbps:.0f}",
                 f"{r.nvlink_bytes / 1e6:.1f}", f"{r.arena_bytes / 1e9:.2f}", _error(r), r.commit])


def _goal_cells(goal: Goal, us: float | None) -> list[str]:
    """required, reached, best released"""
    best_released = "" if goal.best_released is None else f"{goal.best_released:g}"
    return [f"{goal.required:g}", "" if us is None else "yes" if us <= goal.required else "no", best_released]


def _engine(record: Record) -> str:
    return f"{record.engine}, graph" if record.graph else record.engine


def _error(record: Record) -> str:
    return "-" if record.median_error is None else f"{record.median_error:.1e} / {record.max_error:.1e}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
