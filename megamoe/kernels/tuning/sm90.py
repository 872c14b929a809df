"""Which fp4_gemm config a shape runs with on sm_90a: what was measured for it (sm90_table.json), else what a small cost model predicts.

Legend: G groups, n weight rows, k input channels, rows: tokens of one group. The tiles are those of schedule/grouped_tiles.cuh.
"""

import functools
import math

from megamoe.errors import check
from megamoe.kernels.fp4_gemm_config import BLOCK_K, EPILOGUES, OP, UNIT_BYTES, Fp4GemmConfig, with_most_stages
from megamoe.kernels.tuning.table import read_table

# (math warpgroups, token tiles) by epilogue. Few, since each is a compilation; a list serves any count up to its last entry with one tile,
# one size alone is for many rows per group. Which sizes fit in one kernel without a spill is found by make check-kernels.
_Tiles = tuple[tuple[int, tuple[int, ...]], ...]
_STORE_TILES: _Tiles = (
    (4, (16, 24, 32, 40, 48)),
    (3, (48, 56, 64, 72, 80, 88, 96, 104)),
    (3, (72, 80, 88, 96, 104, 112)),
    (2, (64, 80, 88, 96, 104, 112, 120, 128)),
    (2, (160,)),
    (2, (176,)),  # of equals the first is taken: one size compiles in a tenth of the time of many
    (2, (104, 112, 120, 128, 144, 160, 176)),
)
_SWIGLU_TILES: _Tiles = (
    (4, (16, 24, 32, 40)),
    (3, (48, 56, 64, 72, 80, 88)),
    (2, (80, 96, 112, 128)),
    (2, (112, 128, 144, 160)),
    (2, (160,)),
)
TILES = {"store": _STORE_TILES, "accumulate": _STORE_TILES, "swiglu": _SWIGLU_TILES}
CAPACITIES = (512, 256)  # of the group table, the first that costs no stage
# us per K = 128 block of a tile, by math warpgroups and tokens, weights in L2 (H200, 2026-11-21): the whole card divided by 132 SMs.
# 112 tokens with 3 warpgroups and 176 with 2 are fitted to whole launches.
STAGE_US = {
    2: ((16, 0.248), (32, 0.260), (64, 0.314), (96, 0.378), (128, 0.449), (160, 0.515), (176, 0.545)),
    3: ((16, 0.323), (32, 0.348), (48, 0.385), (64, 0.419), (96, 0.514), (104, 0.540), (112, 0.590)),
    4: ((16, 0.415), (32, 0.449), (48, 0.491)),
}
TILE_US = 0.9  # epilogue and start of a tile, what the next tile does not hide
LAUNCH_US = 5.0
# schedule/grouped_tiles.cuh cuts the last round along K if it fills less than this part of the card: every block then takes its share, at
# least so many K blocks, and tiles exchange sums.
SPLIT_BELOW, SPLIT_BLOCKS, SPLIT_US = 0.5, 4, 2.0
HBM_BYTES_PER_US = 4.25e6
# Reading weights and multiplying overlap, not quite perfectly: us = (a^p + b^p)^(1/p). With p = 6 within 15 % of what was measured.
OVERLAP_POWER = 6
# Rows that are sent to groups at random scatter by the square root of their mean; these deviations, equally likely, stand for them.
DEVIATIONS = (-1.59, -0.97, -0.59, -0.28, 0.0, 0.28, 0.59, 0.97, 1.59)


@functools.lru_cache(maxsize=65536)
def choose_fp4_gemm(n: int, k: int, num_groups: int, max_rows: int, rows_hint: int | None, epilogue: str, num_sms: int) -> Fp4GemmConfig:
    """The config for y[row] = x[row] @ w[group].T.

    Args:
        n, k: shape of one group's weight, multiples of 32 (2I and H, or H and I).
        num_groups: G, 1 for a dense GEMM.
        max_rows: rows of x over all groups, padding included.
        rows_hint: expected rows per group; None: max_rows / num_groups.
        epilogue: "store", "accumulate" or "swiglu".
        num_sms: of the device.

    Returns:
        A legal config whose group table holds num_groups. Any config of it is correct for any counts; the hint is about speed only.

    Raises:
        ValueError: an argument is out of range.
    """
    for what, value, step in (("n", n, 32), ("k", k, 32), ("num_groups", num_groups, 1), ("num_sms", num_sms, 1)):
        check(value > 0 and value % step == 0, OP, what, "positive" if step == 1 else f"a positive multiple of {step}", value, "pad it")
    are_counts = max_rows >= 0 and (rows_hint is None or rows_hint >= 0)
    check(are_counts, OP, "max_rows and rows_hint", "at least 0", (max_rows, rows_hint), "count rows")
    check(epilogue in EPILOGUES, OP, "epilogue", f"one of {EPILOGUES}", repr(epilogue), "pick one of them")
    rows = max(1, -(-max_rows // num_groups) if rows_hint is None else rows_hint)
    found = read_table().find(n=n, k=k, num_groups=num_groups, rows=rows, epilogue=epilogue, num_sms=num_sms)
    if found is not None and found.max_groups >= num_groups:
        return found
    return min(candidates(num_groups, epilogue), key=lambda config: predict_us(config, n, k, num_groups, rows, num_sms))


@functools.cache
def candidates(num_groups: int, epilogue: str) -> tuple[Fp4GemmConfig, ...]:
    """Every config considered for this number of groups."""
    return tuple(_with_capacity(warpgroups, tiles, num_groups, epilogue) for warpgroups, tiles in TILES[epilogue])


def _with_capacity(warpgroups: int, tiles: tuple[int, ...], num_groups: int, epilogue: str) -> Fp4GemmConfig:
    """The largest group table that costs no stage, so that few configs serve all numbers of groups; a larger one where it is needed."""
    def config(max_groups: int) -> Fp4GemmConfig:
        return with_most_stages(num_math_warpgroups=warpgroups, token_tiles=tiles, epilogue=epilogue, max_groups=max_groups)

    most = config(1).num_stages
    for capacity in CAPACITIES:
        if capacity >= num_groups and config(capacity).num_stages == most:
            return config(capacity)
    return config(max(CAPACITIES[0], 1 << (num_groups - 1).bit_length()))


def token_tiles(config: Fp4GemmConfig, count: int) -> tuple[int, int]:
    """(number of token tiles, tokens of each) that the kernel cuts `count` rows into."""
    num_tiles = -(-count // config.max_token_tile)
    tokens = next(t for t in config.token_tiles if t * num_tiles >= count)
    return -(-count // tokens), tokens


def stage_us(num_math_warpgroups: int, tokens: int) -> float:
    """us per K = 128 block of one tile, interpolated; flat below the first measurement."""
    points = STAGE_US[num_math_warpgroups]
    if tokens <= points[0][0]:
        return points[0][1]
    for (t0, us0), (t1, us1) in zip(points, points[1:]):
        if tokens <= t1:
            return us0 + (us1 - us0) * (tokens - t0) / (t1 - t0)
    return points[-1][1] * tokens / points[-1][0]


def predict_us(config: Fp4GemmConfig, n: int, k: int, num_groups: int, rows: int, num_sms: int) -> float:
    """What the cost model says for `num_groups` groups of about `rows` rows. Made to rank configs, not to promise times."""
    row_tiles, k_blocks = -(-n // config.tile_rows), -(-k // BLOCK_K)
    counts = [max(1, round(rows + z * math.sqrt(rows))) for z in DEVIATIONS] if num_groups > 1 else [rows]
    cuts = [token_tiles(config, count) for count in counts]
    num_tiles = num_groups * row_tiles * sum(number for number, _ in cuts) / len(cuts)
    tile_us = sum(number * (k_blocks * stage_us(config.num_math_warpgroups, tokens) + TILE_US) for number, tokens in cuts)
    tile_us /= sum(number for number, _ in cuts)
    multiply_us = _rounds_us(num_tiles / num_sms, tile_us, k_blocks)
    out_bytes = n / 2 if config.epilogue == "swiglu" else 2 * n
    num_bytes = num_groups * (-(-n // 64) * k_blocks * UNIT_BYTES + rows * (k + out_bytes))
    read_us = num_bytes / HBM_BYTES_PER_US
    return LAUNCH_US + (multiply_us**OVERLAP_POWER + read_us**OVERLAP_POWER) ** (1 / OVERLAP_POWER)


def _rounds_us(tiles_per_sm: float, tile_us: float, k_blocks: int) -> float:
    """us that the blocks need for their rounds of tiles: full ones, then what is left, whole or cut along K."""
    full = math.floor(tiles_per_sm)
    left = tiles_per_sm - full
    if left == 0 or left >= SPLIT_BELOW or k_blocks <= SPLIT_BLOCKS:
        return math.ceil(tiles_per_sm) * tile_us
    return (full + max(left, SPLIT_BLOCKS / k_blocks)) * tile_us + SPLIT_US
