"""The GEMM benchmark as data: cases, goals, shapes and configs from the command line, records. Touches no GPU.

Legend: G groups, n weight rows, k input channels, rows: tokens of one group.
"""

from dataclasses import dataclass

from megamoe.kernels.fp4_gemm_config import Fp4GemmConfig, with_most_stages
from megamoe.kernels.tuning.sm90 import choose_fp4_gemm
from megamoe.testing.bench import Work, fp4_gemm_work, group_counts

OPS = ("dense", "contiguous", "masked", "swiglu")
METRICS = {"us": "us", "weights_gbps": "GB/s of weights", "tflops": "TFLOPS"}


@dataclass(frozen=True)
class Goal:
    """What a case must and should reach. Of times less is better, of rates more."""

    metric: str
    required: float
    aim: float

    def reached(self, value: float) -> str:
        """"aim", "required" or "no"."""
        sign = -1 if self.metric == "us" else 1
        return "aim" if sign * value >= sign * self.aim else "required" if sign * value >= sign * self.required else "no"


@dataclass(frozen=True)
class Case:
    """One shape. `counts` says how the rows of the groups are drawn; masked and swiglu have room for the largest count in every group."""

    op: str
    num_groups: int
    rows: int
    n: int
    k: int
    counts: str
    goal: Goal | None = None
    peer_us: float | None = None  # DeepGEMM 2.6.1 FP8 x FP8 on an H200, from another run

    @property
    def name(self) -> str:
        if self.op == "dense":
            return f"dense {self.rows}x{self.n}x{self.k}"
        return f"{self.op} {self.num_groups} x ~{self.rows} ({self.counts}), n={self.n} k={self.k}"

    @property
    def epilogue(self) -> str:
        return "swiglu" if self.op == "swiglu" else "store"

    def draw(self, seed: int = 0) -> list[int]:
        return group_counts(self.counts, self.num_groups, self.rows, seed)

    def work(self, counts: list[int]) -> Work:
        return fp4_gemm_work(counts, self.n, self.k, is_swiglu=self.op == "swiglu")

    def choose(self, num_sms: int) -> Fp4GemmConfig:
        return choose_fp4_gemm(self.n, self.k, self.num_groups, self.num_groups * self.rows, self.rows, self.epilogue, num_sms)


def _masked(rows: int, n: int, k: int, goal: Goal, peer_us: float | None = None) -> list[Case]:
    return [Case("masked", 32, rows, n, k, "uniform", goal, peer_us), Case("masked", 32, rows, n, k, "routing")]


LINEAR1, LINEAR2 = (6144, 7168), (7168, 3072)
_DECODE = [Goal("us", 205, 195), Goal("us", 112, 105)]
_STREAM64, _STREAM96 = Goal("weights_gbps", 3550, 4200), Goal("weights_gbps", 2950, 4200)
DEFAULT_CASES: tuple[Case, ...] = (
    *_masked(20, *LINEAR1, _DECODE[0], 356), *_masked(20, *LINEAR2, _DECODE[1], 193),
    *_masked(64, *LINEAR1, _STREAM64), *_masked(64, *LINEAR2, _STREAM64),
    *_masked(96, *LINEAR1, _STREAM96), *_masked(96, *LINEAR2, _STREAM96),
    *_masked(192, *LINEAR1, Goal("us", 537, 0.9 * 537), 537), *_masked(192, *LINEAR2, Goal("us", 287, 0.9 * 287), 287),
    Case("contiguous", 8, 4096, 4096, 7168, "routing", Goal("tflops", 1150, 1300), 1418),
    Case("contiguous", 8, 4096, 6144, 7168, "routing", Goal("tflops", 1150, 1300), 2133),
    Case("contiguous", 8, 4096, 7168, 2048, "routing", Goal("tflops", 1080, 1300), 833),
    Case("contiguous", 8, 4096, 7168, 3072, "routing", Goal("tflops", 1080, 1300), 1063),
    Case("contiguous", 32, 256, *LINEAR1, "routing", None, 695), Case("contiguous", 32, 256, *LINEAR2, "routing", None, 387),
    Case("dense", 1, 4096, 7168, 16384, "exact", Goal("tflops", 1100, 1300), 647),
    Case("dense", 1, 4096, 4096, 7168, "exact", Goal("tflops", 1100, 1300), 165),
    Case("dense", 1, 128, 7168, 16384, "exact", None, 43.6), Case("dense", 1, 128, 4096, 7168, "exact", None, 13.8),
    Case("swiglu", 32, 20, *LINEAR1, "uniform"), Case("swiglu", 32, 96, *LINEAR1, "uniform"), Case("swiglu", 8, 4096, *LINEAR1, "routing"),
)


def select(ops: list[str] | None, shapes: list[str] | None, is_quick: bool) -> list[Case]:
    """The cases of a command line: shapes MxNxK or GxMxNxK, or the default set; reduced to `ops`; quick leaves out cases without a goal.

    Raises:
        ValueError: a shape does not parse or does not fit an op.
    """
    if not shapes:
        return [case for case in DEFAULT_CASES if (not ops or case.op in ops) and (not is_quick or case.goal is not None)]
    return [case for shape in shapes for case in _cases_of(shape, ops)]


def _cases_of(shape: str, ops: list[str] | None) -> list[Case]:
    try:
        sizes = [int(part) for part in shape.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (3, 4) or min(sizes) < 1 or sizes[-1] % 32 or sizes[-2] % 64:
        expected = "MxNxK or GxMxNxK with n a multiple of 64 and k of 32"
        raise ValueError(f"bench_gemm: shape must be {expected}, got {shape!r}; e.g. 32x20x6144x7168")
    if len(sizes) == 3:
        if ops not in (None, ["dense"]):
            wanted = " ".join(ops)
            raise ValueError(f"bench_gemm: shape {shape} must have four sizes for --op {wanted}, got three; put the number of groups first")
        return [Case("dense", 1, *sizes, "exact")]
    if "dense" in (ops or ()):
        raise ValueError(f"bench_gemm: shape {shape} must have three sizes for --op dense, got four; leave out the number of groups")
    return [Case(op, *sizes, "uniform" if op == "masked" else "routing") for op in ops or ["masked"]]


def parse_config(text: str, epilogue: str, num_groups: int) -> Fp4GemmConfig:
    """`WARPGROUPS:TILE,TILE,...[:STAGES]` -> config, e.g. "3:48,64,88" or "2:160:5". Without stages: as many as fit.

    Raises:
        ValueError: it does not parse, or the config is not legal.
    """
    parts = text.split(":")
    try:
        warpgroups, tiles = int(parts[0]), tuple(int(tile) for tile in parts[1].split(","))
        stages = [int(part) for part in parts[2:]]
        if len(stages) > 1:
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"bench_gemm: config must be WARPGROUPS:TILE,TILE,...[:STAGES], got {text!r}; e.g. 2:160:5") from None
    max_groups = 1 << (num_groups - 1).bit_length()
    shape = {"num_math_warpgroups": warpgroups, "token_tiles": tiles, "epilogue": epilogue, "max_groups": max_groups}
    return Fp4GemmConfig(**shape, num_stages=stages[0]) if stages else with_most_stages(**shape)


def config_text(config: Fp4GemmConfig) -> str:
    """The inverse of `parse_config`, for tables."""
    return f"{config.num_math_warpgroups}:{','.join(map(str, config.token_tiles))}:{config.num_stages}"
