"""Measure fp4_gemm configs on one GPU and keep what beats the cost model: `python launch/tune_gemm.py [--op ...] [--shapes ...] [--write]`.

Per shape every candidate of tuning/sm90.py that the cost model puts within reach, and those of --configs, are timed in turns as bench_gemm
does. An entry goes to tuning/sm90_table.json only if it beats the model's choice by the margin: each further config is a compilation.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from bench_gemm import NUM_RUNS
from bench_gemm_cases import OPS, Case, config_text, parse_config, select
from tqdm import tqdm

from megamoe.kernels.fp4_gemm_config import Fp4GemmConfig
from megamoe.kernels.tuning.sm90 import candidates, predict_us
from megamoe.kernels.tuning.table import PATH, Entry, Table, read_table, write_table
from megamoe.testing.bench import CudaTimer, Timing, measure
from megamoe.testing.report import table

REACH = 1.5  # times the best prediction; the model ranks better than that
MARGIN = 0.01


@dataclass(frozen=True)
class Finding:
    """What was measured for one shape, fastest first, and what the cost model would have taken."""

    case: Case
    timings: dict[Fp4GemmConfig, Timing]
    predicted: Fp4GemmConfig

    @property
    def best(self) -> Fp4GemmConfig:
        return next(iter(self.timings))

    @property
    def is_worth_an_entry(self) -> bool:
        return self.timings[self.best].us < (1 - MARGIN) * self.timings[self.predicted].us


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tune_gemm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, help="only these cases of the default set of bench_gemm.py")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="MxNxK (dense) or GxMxNxK (M rows per group), not the default set")
    parser.add_argument("--configs", nargs="+", default=[], metavar="CONFIG", help="WARPGROUPS:TILE,TILE,...[:STAGES], tried too")
    parser.add_argument("--write", action="store_true", help=f"put what was found into {PATH.name}")
    args = parser.parse_args(argv)
    try:
        args.cases = select(args.op, args.shapes, is_quick=False)
        for case in args.cases:
            contenders(case, 132, args.configs)
    except ValueError as error:
        parser.error(str(error))
    return args


def contenders(case: Case, num_sms: int, extra: list[str]) -> list[Fp4GemmConfig]:
    """The model's choice first, then the other candidates within REACH of it by increasing prediction, then `extra`."""
    predicted = {c: predict_us(c, case.n, case.k, case.num_groups, case.rows, num_sms) for c in candidates(case.num_groups, case.epilogue)}
    ranked = sorted(predicted, key=predicted.get)
    near = [config for config in ranked if predicted[config] <= REACH * predicted[ranked[0]]]
    return list(dict.fromkeys([*near, *(parse_config(text, case.epilogue, case.num_groups) for text in extra)]))


def tune_case(case: Case, extra: list[str], timer: CudaTimer, num_sms: int) -> Finding:
    """Time every contender on the same operands, after checking what it computes."""
    from bench_gemm_run import check_outputs, make_launches, make_operands

    configs, operands, launches = contenders(case, num_sms, extra), make_operands(case), {}
    for config in configs:
        launches[config], outputs = make_launches(case, operands, config)
        check_outputs(case, operands, launches[config], outputs)
    timings = measure(launches, NUM_RUNS, timer)
    return Finding(case, dict(sorted(timings.items(), key=lambda item: item[1].us)), configs[0])


def updated(old: Table, findings: list[Finding], num_sms: int) -> Table:
    """`old` with what was found; where the model's choice is as good, the entry of that shape goes."""
    entries = {(e.shape, e.rows): e for e in old.entries()}
    for finding in findings:
        case, config = finding.case, finding.best
        entry = Entry(case.n, case.k, case.num_groups, case.rows, num_sms, round(finding.timings[config].us, 1), config)
        entries.pop((entry.shape, entry.rows), None)
        if finding.is_worth_an_entry:
            entries[entry.shape, entry.rows] = entry
    return Table.of(entries.values())


def findings_table(findings: list[Finding]) -> str:
    rows = []
    for finding in findings:
        for config, timing in finding.timings.items():
            note = "kept" if config == finding.best and finding.is_worth_an_entry else "model" if config == finding.predicted else ""
            rows.append((finding.case.name, config_text(config), f"{timing.us:.1f}", f"{timing.p10_us:.1f}-{timing.p90_us:.1f}", note))
    return table(("case", "config", "us", "p10-p90", ""), rows)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 without a GPU. A wrong result raises."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("tune_gemm: a CUDA device must be there to measure, found none", file=sys.stderr)
        return 1
    num_sms, timer = torch.cuda.get_device_properties("cuda").multi_processor_count, CudaTimer()
    findings = []
    # Routing and uniform counts of one shape have the same key in the table, so only one of them may speak for it.
    cases = list({(c.n, c.k, c.num_groups, c.rows, c.epilogue): c for c in reversed(args.cases)}.values())
    for case in tqdm(cases[::-1], unit="case"):
        findings.append(tune_case(case, args.configs, timer, num_sms))
    print(findings_table(findings))
    if args.write:
        write_table(updated(read_table(), findings, num_sms))
        print(f"{PATH} has {len(read_table().entries())} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
