"""Benchmark of fp4_gemm on one GPU, beside its peers: `python launch/bench_gemm.py [--op ...] [--shapes ...] [--json out.jsonl]`.

Per case: operands from a fixed seed; weights rotated over buffers that together exceed L2, and L2 flushed by reading 256 MB before each
launch; CUDA events around one launch, contenders in turns; median and p10-p90. Ours is first compared with FP64 in three groups and must be
within 1.05 x the error of its plain-torch twin.
"""

import argparse
import sys
from pathlib import Path

import torch
from bench_gemm_cases import OPS, Case, config_text, parse_config, select
from bench_gemm_report import OURS, Record, make_record, markdown_table, terminal_table
from tqdm import tqdm

from megamoe.testing.bench import FLOOR_FORMULA, CudaTimer, measure, provenance
from megamoe.testing.report import append_records, read_records, update_page

PAGE = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"
NUM_RUNS, NUM_QUICK_RUNS = 30, 20


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_gemm.py", description=f"{__doc__}\n{FLOOR_FORMULA}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, help="only these (default: all; with four-part shapes: masked)")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="MxNxK (dense) or GxMxNxK (M rows per group), not the default set")
    parser.add_argument("--config", help="WARPGROUPS:TILE,TILE,...[:STAGES] for every case, instead of what tuning chooses")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a record per case and provider")
    parser.add_argument("--quick", action="store_true", help=f"only cases with a goal, {NUM_QUICK_RUNS} runs instead of {NUM_RUNS}")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--commit", help="recorded as the commit, where the files measured are not in a git checkout")
    parser.add_argument("--markdown", nargs="+", type=Path, metavar="JSONL", help="only rewrite the table in docs/PERFORMANCE.md")
    args = parser.parse_args(argv)
    try:
        args.cases = select(args.op, args.shapes, args.quick)
        for case in args.cases if args.config else ():
            parse_config(args.config, case.epilogue, case.num_groups)
    except ValueError as error:
        parser.error(str(error))
    return args


def run_case(case: Case, config: str | None, num_runs: int, with_peers: bool, about: dict[str, str], timer: CudaTimer) -> list[Record]:
    """Check and time one case; the first record is ours."""
    from bench_gemm_peers import make_peers
    from bench_gemm_run import check_outputs, make_launches, make_operands

    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    chosen = parse_config(config, case.epilogue, case.num_groups) if config else case.choose(num_sms)
    operands = make_operands(case)
    launches, outputs = make_launches(case, operands, chosen)
    error = check_outputs(case, operands, launches, outputs)
    contenders = {OURS: launches}
    if with_peers:
        try:
            contenders |= make_peers(case, operands.counts)
        except Exception as problem:  # a peer of another version must not end the run
            print(f"{case.name}: peers left out: {type(problem).__name__}: {problem}", file=sys.stderr)
    timings = measure(contenders, num_runs, timer)
    work = case.work(operands.counts)
    return [make_record(case, name, operands.counts, work, timing, about, config=config_text(chosen) if name == OURS else None,
                        error=error if name == OURS else None) for name, timing in timings.items()]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a result is wrong or there is no GPU."""
    args = parse_args(argv)
    if args.markdown:
        update_page(PAGE, "bench_gemm.py", markdown_table(read_records(args.markdown, Record)))
        print(f"{PAGE} updated")
        return 0
    if not torch.cuda.is_available():
        print("bench_gemm: a CUDA device must be there to measure, found none; --markdown works without", file=sys.stderr)
        return 1
    about, timer, records, num_wrong = provenance(commit=args.commit), CudaTimer(), [], 0
    for case in tqdm(args.cases, unit="case"):
        try:
            found = run_case(case, args.config, NUM_QUICK_RUNS if args.quick else NUM_RUNS, not args.no_peers, about, timer)
        except AssertionError as wrong:
            num_wrong += 1
            print(f"WRONG {case.name}: {wrong}", file=sys.stderr)
            continue
        records += found
        if args.json:
            append_records(args.json, found)
    if records:
        print(terminal_table(records))
    print(f"{about['gpu']}, torch {about['torch']}, commit {about['commit']}; {FLOOR_FORMULA}")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
