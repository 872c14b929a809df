"""What the demo shows and what it must find to pass: its numbers as data, the table, and the verdict. Nothing here computes a model."""

from dataclasses import dataclass

from torch import Tensor

from megamoe.testing.compare import MAX_RELATIVE, MEDIAN_RELATIVE
from megamoe.testing.report import table

MAX_BF16_LOSS_DIFFERENCE = 2e-3  # nats per byte
MAX_FP4_LOSS_DIFFERENCE = 0.01  # relative


@dataclass(frozen=True)
class Score:
    """One model over the whole text. `predictions`: the most likely next byte at each of this rank's positions, [n] int64 on the CPU."""

    loss: float  # nats per byte, all ranks
    tokens_per_s: float  # all ranks
    predictions: Tensor


@dataclass(frozen=True)
class Comparison:
    """The original and the replaced model in one precision; all numbers are over all ranks, `layer_errors` the worst rank's."""

    precision: str
    num_ranks: int
    original: Score
    replaced: Score
    num_tokens: int
    num_mismatches: int
    layer_errors: list[tuple[float, float]]  # per MoE layer: median and maximum relative error against the FP64 oracle
    engine: str
    backend: str
    rows_moved: int | None  # None where the engine does not count
    bytes_moved: int | None
    arena_bytes: int  # per rank


@dataclass(frozen=True)
class Check:
    """`value` may be at most `limit`; NaN fails."""

    name: str
    value: float
    limit: float

    @property
    def is_passed(self) -> bool:
        return self.value <= self.limit


def verdict(comparisons: dict[str, Comparison], num_stock_mismatches: int) -> list[Check]:
    """Everything the demo promises, with the numbers found.

    Args:
        comparisons: by precision, "fp32", "bf16" and "fp8xfp4".
        num_stock_mismatches: next tokens in which stock eager and stock grouped_mm experts differ in BF16.
    """
    fp32, bf16, fp4 = (comparisons[precision] for precision in ("fp32", "bf16", "fp8xfp4"))
    checks = [
        Check("fp32: next tokens that differ", fp32.num_mismatches, 0),
        Check("bf16: held-out loss difference (nats/byte)", abs(bf16.replaced.loss - bf16.original.loss), MAX_BF16_LOSS_DIFFERENCE),
        Check("bf16: next tokens that differ (limit: 2x stock eager against grouped_mm)", bf16.num_mismatches, 2 * num_stock_mismatches),
        Check("fp8xfp4: relative held-out loss difference", abs(fp4.replaced.loss / fp4.original.loss - 1), MAX_FP4_LOSS_DIFFERENCE),
    ]
    for comparison in comparisons.values():
        for layer, (median, worst) in enumerate(comparison.layer_errors):
            checks += [Check(f"{comparison.precision}: layer {layer}, median error per token", median, MEDIAN_RELATIVE),
                       Check(f"{comparison.precision}: layer {layer}, largest error of a token", worst, MAX_RELATIVE)]
    return checks


def comparison_table(comparisons: dict[str, Comparison]) -> str:
    """One column per precision."""
    columns = list(comparisons.values())

    def row(name: str, cell) -> list[str]:
        return [name, *map(cell, columns)]

    rows = [
        row("engine", lambda c: c.engine),
        row("backend", lambda c: c.backend),
        row("ranks", lambda c: str(c.num_ranks)),
        row("held-out nats/byte, original", lambda c: f"{c.original.loss:.5f}"),
        row("held-out nats/byte, replaced", lambda c: f"{c.replaced.loss:.5f}"),
        row("next tokens that agree", lambda c: f"{100 * (1 - c.num_mismatches / c.num_tokens):.2f} % ({c.num_mismatches} differ)"),
        *(row(f"layer {i} error, median / max", lambda c, i=i: "{:.1e} / {:.1e}".format(*c.layer_errors[i]))
          for i in range(len(columns[0].layer_errors))),
        row("tokens/s, original", lambda c: f"{c.original.tokens_per_s:,.0f}"),
        row("tokens/s, replaced", lambda c: f"{c.replaced.tokens_per_s:,.0f}"),
        row("token rows pulled from peers", lambda c: _count(c.rows_moved)),
        row("bytes moved between ranks", lambda c: _count(c.bytes_moved)),
        row("arena bytes per rank", lambda c: f"{c.arena_bytes:,}"),
    ]
    return table(["precision", *comparisons], rows)


def _count(number: int | None) -> str:
    return "not counted" if number is None else f"{number:,}"


def verdict_lines(checks: list[Check]) -> list[str]:
    """One line per failed check with both numbers, then PASS or FAIL."""
    failed = [check for check in checks if not check.is_passed]
    lines = [f"FAILED  {check.name}: {check.value:.6g}, at most {check.limit:.6g}" for check in failed]
    return [*lines, f"{'FAIL' if failed else 'PASS'}: {len(checks) - len(failed)} of {len(checks)} checks passed"]
