"""What every benchmark shares: seeded group sizes, work and floor of a GEMM, interleaved cold-cache timing, and who measured.

Legend: G groups, n weight rows, k input channels.
"""

import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# What one H200 was measured to sustain: a device copy (read + write), and FP8 wgmma on resident data.
FLOOR_BYTES_PER_S = 4.2e12
FLOOR_FLOP_PER_S = 1.5e15
FLOOR_FORMULA = "floor = max((weight + token + output bytes) / 4.2e12 B/s, 2 * rows * n * k / 1.5e15 FLOP/s)"

COUNTS = ("exact", "uniform", "routing")
FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU this runs on
ROTATION_BYTES = 120 << 20


def group_counts(kind: str, num_groups: int, mean_rows: int, seed: int = 0) -> list[int]:
    """Rows per group.

    Args:
        kind: "exact": mean_rows each; "uniform": int(mean_rows * uniform(0.7, 1.3)), how DeepGEMM's benchmark draws them; "routing":
            num_groups * mean_rows rows, each to a group at random.
        num_groups, mean_rows: G and the mean.
        seed: the same seed gives the same counts on every machine.

    Raises:
        ValueError: another kind.
    """
    draw = random.Random(f"{kind} {num_groups} {mean_rows} {seed}")
    if kind == "exact":
        return [mean_rows] * num_groups
    if kind == "uniform":
        return [int(mean_rows * draw.uniform(0.7, 1.3)) for _ in range(num_groups)]
    if kind != "routing":
        raise ValueError(f"group_counts: kind must be one of {COUNTS}, got {kind!r}; pick one of them")
    counts = [0] * num_groups
    for group in draw.choices(range(num_groups), k=num_groups * mean_rows):
        counts[group] += 1
    return counts


@dataclass(frozen=True)
class Work:
    """What a GEMM has to do: useful operations, and bytes that must cross HBM once."""

    flop: int
    weight_bytes: int
    token_bytes: int
    output_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.token_bytes + self.output_bytes

    @property
    def floor_us(self) -> float:
        """See FLOOR_FORMULA."""
        return 1e6 * max(self.num_bytes / FLOOR_BYTES_PER_S, self.flop / FLOOR_FLOP_PER_S)


def fp4_gemm_work(counts: Sequence[int], n: int, k: int, *, is_swiglu: bool = False) -> Work:
    """FP8 tokens with one exponent each, FP4 weights with one per 32 (of groups that have rows, no padding), BF16 or E4M3 output."""
    rows, num_active = sum(counts), sum(count > 0 for count in counts)
    output = n // 2 + n // 64 if is_swiglu else 2 * n
    return Work(2 * rows * n * k, num_active * n * (k // 2 + k // 32), rows * (k + 1), rows * output)


@dataclass(frozen=True)
class Timing:
    """Of one contender, in us."""

    us: float  # median
    p10_us: float
    p90_us: float
    num_runs: int


def summarize(times_us: Sequence[float]) -> Timing:
    """Median and deciles (nearest rank) of at least one time."""
    ordered = sorted(times_us)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def measure(contenders: Mapping[str, Sequence[Callable[[], object]]], num_runs: int,
            time_once: Callable[[Callable[[], object]], float]) -> dict[str, Timing]:
    """Time contenders in turns, so that clocks and temperature are the same for all.

    Args:
        contenders: name -> launches that do the same work on different buffers, taken in rotation.
        num_runs: timed launches of each.
        time_once: us of one launch, e.g. a CudaTimer.
    """
    for launches in contenders.values():
        for launch in launches:  # compiles, loads, allocates
            launch()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in range(num_runs):
        for name, launches in contenders.items():
            times[name].append(time_once(launches[run % len(launches)]))
    return {name: summarize(values) for name, values in times.items()}


def num_buffers(weight_bytes: int) -> int:
    """Copies of the weights to rotate over, so that L2 never holds the ones a launch reads."""
    return max(2, -(-ROTATION_BYTES // weight_bytes))


class CudaTimer:
    """us of one launch between two events, L2 filled with other data first. The flush only reads: no dirty lines are written back later."""

    def __init__(self):
        self._flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device="cuda")

    def __call__(self, launch: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU is still busy with the reduction when the launch is enqueued, so the time of the host does not count.
        self._flush.max()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3


def provenance(argv: Sequence[str] = tuple(sys.argv), commit: str | None = None) -> dict[str, str]:
    """Where and how a record was made: gpu, torch, commit (None: that of the checkout), command, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    command, date = shlex.join(["python", *argv]), time.strftime("%Y-%m-%d")
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit or _commit(), "command": command, "date": date}


def _commit() -> str:
    """Short hash of the checkout, with + when files differ from it; "unknown" outside a checkout."""
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
