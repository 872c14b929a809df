"""Benchmark of the elementwise ops on one GPU, beside a device copy: `python launch/bench_elementwise.py [--json out.jsonl]`.

Per case: random data, L2 flushed by reading 256 MB before each launch, CUDA events around one launch, in turns with torch's copy_ of as
many bytes, read and written together; median and p10-p90. The result is first compared with the plain-torch twin.
H = 7168, I = 3072, K = 6.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megamoe import formats
from megamoe.formats import QuantizedTokens
from megamoe.kernels.quantize_tokens import empty_tokens
from megamoe.reference.permute import permute_tokens, unpermute_tokens
from megamoe.reference.swiglu_quantize import swiglu_quantize
from megamoe.testing.bench import CudaTimer, measure, provenance
from megamoe.testing.report import append_records, read_records, table, update_page

PAGE = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"
HIDDEN, INTERMEDIATE, NUM_TOPK = 7168, 3072, 6
ROWS = (4096, 8192, 49152)
GROUPS = (32, 128, "token")
LIMIT = 10.0
NUM_RUNS = 30
CHECKED_ROWS = 64
# Of the values that may be one step of E4M3 from the twin's, whose exponential rounds differently.
MAX_DIFFERENT = 1e-3


@dataclass(frozen=True)
class Case:
    """One op on its operands."""

    launch: Callable[[], object]
    num_bytes: int  # that must be read and written once
    result: Callable[[slice], torch.Tensor]  # these output rows as FP32
    twin: Callable[[slice], torch.Tensor]
    max_different: float = 0.0


@dataclass(frozen=True)
class Record:
    """One op at one size; a line of the JSONL."""

    op: str
    rows: int
    us: float
    p10_us: float
    p90_us: float
    num_runs: int
    num_bytes: int
    gbps: float
    copy_us: float  # of as many bytes
    percent_of_copy: float
    gpu: str
    torch: str
    commit: str
    command: str
    date: str


def num_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def rows_of(tokens: QuantizedTokens, rows: slice) -> torch.Tensor:
    return QuantizedTokens(tokens.codes[rows], tokens.sf[rows], tokens.group).dequantize()


def poisoned(like: torch.Tensor, width: int, group: int | str) -> QuantizedTokens:
    out = empty_tokens(like, torch.Size((len(like), width)), group)
    out.codes.view(torch.uint8).fill_(0x7F)
    out.sf.fill_(255)
    return out


def quantize_case(num_rows: int, group: int | str) -> Case:
    x = torch.randn(num_rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    out = poisoned(x, HIDDEN, group)
    args = (x, HIDDEN if group == "token" else group, out.codes, out.sf)
    return Case(lambda: torch.ops.megamoe.quantize_tokens(*args), num_bytes(x, out.codes, out.sf), lambda rows: rows_of(out, rows),
                lambda rows: formats.quantize_tokens(x[rows], group).dequantize())


def swiglu_case(num_rows: int, group: int | str) -> Case:
    x = torch.randn(num_rows, 2 * INTERMEDIATE, dtype=torch.bfloat16, device="cuda")
    weight = torch.rand(num_rows, device="cuda")
    out = poisoned(x, INTERMEDIATE, group)
    args = (x, weight, LIMIT, None, 0.0, INTERMEDIATE if group == "token" else group, out.codes, out.sf)
    return Case(lambda: torch.ops.megamoe.swiglu_quantize(*args), num_bytes(x, weight, out.codes, out.sf), lambda rows: rows_of(out, rows),
                lambda rows: swiglu_quantize(x[rows], row_weight=weight[rows], limit=LIMIT, group=group).dequantize(), MAX_DIFFERENT)


def permute_case(num_rows: int, dtype: torch.dtype) -> Case:
    rows = torch.randn(num_rows, HIDDEN, device="cuda").to(dtype)
    index = torch.randperm(num_rows, device="cuda")
    out = torch.full((num_rows, HIDDEN), torch.nan, device="cuda").to(dtype)
    return Case(lambda: torch.ops.megamoe.permute_tokens(rows, index, out), num_bytes(rows, index, out), lambda part: out[part].float(),
                lambda part: permute_tokens(rows, index[part]).float())


def unpermute_case(num_rows: int) -> Case:
    """`num_rows` rows, each in one slot of a token."""
    num_tokens = num_rows // NUM_TOPK
    rows = torch.randn(num_tokens * NUM_TOPK, HIDDEN, dtype=torch.bfloat16, device="cuda")
    index = torch.randperm(len(rows), device="cuda").view(num_tokens, NUM_TOPK)
    weights = torch.rand(num_tokens, NUM_TOPK, device="cuda")
    out = torch.full((num_tokens, HIDDEN), torch.nan, dtype=torch.bfloat16, device="cuda")
    return Case(lambda: torch.ops.megamoe.unpermute_tokens(rows, index, weights, out), num_bytes(rows, index, weights, out),
                lambda part: out[part].float(), lambda part: unpermute_tokens(rows, index[part], weights[part]).float())


OPS: dict[str, Callable[[int], Case]] = {
    **{f"quantize_tokens, group {group}": lambda rows, group=group: quantize_case(rows, group) for group in GROUPS},
    **{f"swiglu_quantize, group {group}": lambda rows, group=group: swiglu_case(rows, group) for group in GROUPS},
    "permute_tokens, BF16": lambda rows: permute_case(rows, torch.bfloat16),
    "permute_tokens, E4M3": lambda rows: permute_case(rows, torch.float8_e4m3fn),
    f"unpermute_tokens, K={NUM_TOPK}": unpermute_case,
}


def check_result(op: str, case: Case) -> None:
    """Raise AssertionError unless the first and the last rows are the twin's."""
    case.launch()
    for rows in (slice(0, CHECKED_ROWS), slice(-CHECKED_ROWS, None)):
        got, expected = case.result(rows), case.twin(rows)
        different = (got != expected).double().mean().item()  # true for NaN
        assert different <= case.max_different, f"{op}: {different:.2e} of the values are not the twin's, allowed {case.max_different:g}"


def run_case(op: str, num_rows: int, about: dict[str, str], timer: CudaTimer) -> Record:
    """Check one op, then time it beside the copy."""
    torch.manual_seed(num_rows)
    case = OPS[op](num_rows)
    check_result(op, case)
    source = torch.randint(0, 256, (case.num_bytes // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timings = measure({"op": [case.launch], "copy": [lambda: target.copy_(source)]}, NUM_RUNS, timer)
    timing, copy_us = timings["op"], timings["copy"].us
    return Record(op=op, rows=num_rows, **asdict(timing), num_bytes=case.num_bytes, gbps=case.num_bytes / timing.us / 1e3,
                  copy_us=copy_us, percent_of_copy=100 * copy_us / timing.us, **about)


def cells(r: Record) -> tuple[str, ...]:
    return r.op, str(r.rows), f"{r.us:.1f}", f"{r.gbps:.0f}", f"{r.copy_us:.1f}", f"{r.percent_of_copy:.0f} %"


HEADER = ("op", "rows", "us", "GB/s", "copy us", "of copy")


def markdown_table(records: Iterable[Record]) -> str:
    """One row per op and size, from its last record."""
    last = {(record.op, record.rows): record for record in records}.values()
    lines = [f"| {' | '.join((*HEADER, 'p10-p90 us'))} |", "|---|" + "--:|" * len(HEADER)]
    lines += [f"| {' | '.join((*cells(r), f'{r.p10_us:.1f}-{r.p90_us:.1f}'))} |" for r in last]
    commands = dict.fromkeys(f"- {r.gpu}, commit {r.commit}, {r.date}: `{r.command}`" for r in last)
    return "\n".join([*lines, "", *commands]) + "\n"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_elementwise.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", metavar="NAME", default=[""], help="only ops whose name begins so")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help=f"default: {' '.join(map(str, ROWS))}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a record per op and size")
    parser.add_argument("--commit", help="recorded as the commit, where the files measured are not in a git checkout")
    parser.add_argument("--markdown", nargs="+", type=Path, metavar="JSONL", help="only rewrite the table in docs/PERFORMANCE.md")
    args = parser.parse_args(argv)
    args.ops = [op for op in OPS if op.startswith(tuple(args.op))]
    if not args.ops:
        parser.error(f"--op must be the beginning of one of {list(OPS)}, got {args.op}")
    if min(args.rows) < NUM_TOPK:
        parser.error(f"--rows must be at least {NUM_TOPK}, got {min(args.rows)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a result is wrong or there is no GPU."""
    args = parse_args(argv)
    if args.markdown:
        update_page(PAGE, "bench_elementwise.py", markdown_table(read_records(args.markdown, Record)))
        print(f"{PAGE} updated")
        return 0
    if not torch.cuda.is_available():
        print("bench_elementwise: a CUDA device must be there to measure, found none; --markdown works without", file=sys.stderr)
        return 1
    about, timer, records, num_wrong = provenance(commit=args.commit), CudaTimer(), [], 0
    for op, num_rows in tqdm([(op, num_rows) for op in args.ops for num_rows in args.rows], unit="case"):
        try:
            records.append(run_case(op, num_rows, about, timer))
        except AssertionError as wrong:
            num_wrong += 1
            print(f"WRONG {wrong}", file=sys.stderr)
    if args.json:
        append_records(args.json, records)
    if records:
        print(table(HEADER, [cells(record) for record in records]))
    print(f"{about['gpu']}, torch {about['torch']}, commit {about['commit']}; of copy: time of a cold device copy of as many bytes / time")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
