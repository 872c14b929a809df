"""What the GEMM benchmark writes: records, the table on the terminal, and the table of docs/PERFORMANCE.md made from records."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from bench_gemm_cases import DEFAULT_CASES, METRICS, Case

from megamoe.testing.bench import Timing, Work
from megamoe.testing.report import table

OURS = "megamoe"
PEER_NOTE = "DeepGEMM, 2026-11-21, another run"


@dataclass(frozen=True)
class Record:
    """One contender on one case; a line of the JSONL."""

    case: str
    op: str
    provider: str
    counts: list[int]
    n: int
    k: int
    config: str | None  # ours only
    us: float
    p10_us: float
    p90_us: float
    num_runs: int
    tflops: float  # useful: padding does not count
    gbps: float  # all bytes of `Work`, of our formats: a rate that peers with larger weights can be compared by
    weights_gbps: float
    floor_us: float
    percent_of_floor: float
    error: float | None  # relative, against FP64
    gpu: str
    torch: str
    commit: str
    command: str
    date: str


def make_record(case: Case, provider: str, counts: list[int], work: Work, timing: Timing, provenance: dict[str, str], *,
                config: str | None = None, error: float | None = None) -> Record:
    us = timing.us
    return Record(case=case.name, op=case.op, provider=provider, counts=counts, n=case.n, k=case.k, config=config, **asdict(timing),
                  tflops=work.flop / us / 1e6, gbps=work.num_bytes / us / 1e3, weights_gbps=work.weight_bytes / us / 1e3,
                  floor_us=work.floor_us, percent_of_floor=100 * work.floor_us / us, error=error, **provenance)



def terminal_table(records: list[Record]) -> str:
    header = ("case", "provider", "us", "p10-p90", "TFLOPS", "GB/s", "floor us", "of floor", "config")
    return table(header, [(r.case, r.provider, f"{r.us:.1f}", f"{r.p10_us:.1f}-{r.p90_us:.1f}", f"{r.tflops:.0f}", f"{r.gbps:.0f}",
                           f"{r.floor_us:.0f}", f"{r.percent_of_floor:.0f} %", r.config or "-") for r in records])


def markdown_table(records: list[Record], cases: Iterable[Case] = DEFAULT_CASES) -> str:
    """One row per case, from its last record of ours and the last of the fastest peer of the same command; cases without records say so."""
    lines = ["| case | ours | required | aim | reached | peer | floor us | of floor | p10-p90 us | GPU | commit |",
             "|---|" + "--:|" * 3 + "---|" + "--:|" * 4 + "---|---|"]
    commands = []
    for case in cases:
        mine = [r for r in records if r.case == case.name and r.provider == OURS]
        if not mine:
            lines.append(f"| {case.name} | not measured |{_goal_cells(case, None)} {_peer(case, [])} | | | | | |")
            continue
        last = mine[-1]
        commands.append(f"{last.gpu}, commit {last.commit}, {last.date}: `{last.command}`")
        peers = [r for r in records if r.case == case.name and r.provider != OURS and _run(r) == _run(last)]
        lines.append(f"| {case.name} | {_ours(case, last)} |{_goal_cells(case, last)} {_peer(case, peers)} | {last.floor_us:.0f} "
                     f"| {last.percent_of_floor:.0f} % | {last.p10_us:.0f}-{last.p90_us:.0f} | {last.gpu} | {last.commit} |")
    return "\n".join([*lines, "", *(f"- {command}" for command in dict.fromkeys(commands))]).rstrip() + "\n"


def _run(record: Record) -> tuple:
    """What the records of one run have in common."""
    return record.gpu, record.command, record.commit, record.date


def _ours(case: Case, record: Record) -> str:
    metric = case.goal.metric if case.goal else "us"
    value = getattr(record, metric)
    return f"{value:.0f} us ({record.tflops:.0f} TFLOPS)" if metric == "us" else f"{value:.0f} {METRICS[metric]} ({record.us:.0f} us)"


def _goal_cells(case: Case, record: Record | None) -> str:
    if case.goal is None:
        return " | | |"
    sign, unit = ("<=" if case.goal.metric == "us" else ">="), METRICS[case.goal.metric]
    reached = case.goal.reached(getattr(record, case.goal.metric)) if record else ""
    return f" {sign} {case.goal.required:g} {unit} | {case.goal.aim:g} | {reached} |"


def _peer(case: Case, peers: list[Record]) -> str:
    if peers:
        best = min({r.provider: r for r in peers}.values(), key=lambda r: r.us)
        return f"{best.us:.0f} us ({best.provider}, same run)"
    return f"{case.peer_us:g} us ({PEER_NOTE})" if case.peer_us else ""
