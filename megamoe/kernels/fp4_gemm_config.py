"""Fp4GemmConfig: the static facts of one compiled fp4_gemm, and which of them are legal on sm_90a. Pure: no torch, no CUDA."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

from megamoe.errors import check

OP = "fp4_gemm"
UNIT_BYTES = 4352  # 64 weight rows x 128 K
UNIT_MAP_LINES = 4  # of a unit in a tensor map, a side of whose box has 256 elements at most
BLOCK_K = 128
MAX_SMEM_BYTES = 232448
STAGING_PITCH = 64 * 2 + 16
EPILOGUES = ("store", "accumulate", "swiglu")
GROUP_ENTRY_BYTES = 16
TILE_SLOTS = 4
TILE_RING_BYTES = TILE_SLOTS * (48 + 16)
# (math, aux) registers per thread by number of math warpgroups. The sum over the block must fit 64 K registers, or setmaxnreg hangs.
REGISTERS = {2: (232, 40), 3: (152, 56), 4: (104, 56)}
# Largest token tile that leaves registers for two expanded fragments, by number of warpgroups; larger ones expand and multiply in turns.
MAX_DOUBLE_BUFFERED = {2: 176, 3: 104, 4: 48}
MAX_DOUBLE_BUFFERED_WITH_BIAS = {2: 176, 3: 96, 4: 48}
# Largest token tile with registers for the packed weights of a block ahead, by epilogue, with two warpgroups; more do not gain from it.
LOADS_AHEAD = {"store": 160, "accumulate": 160, "swiglu": 128}
# Largest token tile per epilogue that compiles without a spill (nvcc 13.0): two sets of sums, the fragments, the epilogue.
_STORE_TILE = {2: 176, 3: 112, 4: 48}
MAX_TOKEN_TILE = {"store": _STORE_TILE, "accumulate": _STORE_TILE, "swiglu": {2: 168, 3: 88, 4: 40}}
MAX_TOKEN_TILE_SIZES = 16


class GemmBlock:
    """Base of the configs of kernels around the FP4 main loop: threads of a block, and its shared memory as SmemPlan of csrc has it.

    Subclasses are dataclasses with these fields, and say in `registers` what their roles need, in `fixed_bytes` and `max_gemm_bytes` what
    their kernel needs beside the stages.
    """

    registers: ClassVar[Mapping[int, tuple[int, int]]]  # (math, aux) per thread by number of math warpgroups

    num_math_warpgroups: int
    token_tiles: tuple[int, ...]
    num_stages: int
    max_groups: int
    fixed_bytes: int
    smem_bytes: int
    cluster_blocks: int = 1
    thread_order: bool = False  # of the columns of tokens and weights (formats/thread_order.py)

    @property
    def math_registers(self) -> int:
        return self.registers[self.num_math_warpgroups][0]

    @property
    def aux_registers(self) -> int:
        return self.registers[self.num_math_warpgroups][1]

    @property
    def tile_rows(self) -> int:
        return 64 * self.num_math_warpgroups

    @cached_property
    def num_threads(self) -> int:
        return 128 * (self.num_math_warpgroups + 1)

    @property
    def max_token_tile(self) -> int:
        return self.token_tiles[-1]

    @property
    def stage_bytes(self) -> int:
        return round_up(self.num_math_warpgroups * UNIT_BYTES, 1024) + self.max_token_tile * BLOCK_K

    @property
    def gemm_bytes(self) -> int:
        """SmemPlan::kBytes."""
        return self.num_stages * (self.stage_bytes + 16) + self.fixed_bytes

    @property
    def max_gemm_bytes(self) -> int:
        return MAX_SMEM_BYTES

    @property
    def fitting_stages(self) -> int:
        return (self.max_gemm_bytes - self.fixed_bytes) // (self.stage_bytes + 16)

    def token_parts(self, tokens: int) -> list[int]:
        """Of a tile of `tokens`, what each block of a cluster brings (first_token_of in csrc)."""
        firsts = [round_up(tokens * rank // self.cluster_blocks, 8) for rank in range(self.cluster_blocks + 1)]
        return [end - first for first, end in pairwise(firsts)]

    def _bytes_beside_stages(self, token_floats: int, has_bias: bool) -> int:
        """Epilogue staging, values per token, biases, group table and tile ring. The kernel asserts that the sum is its own."""
        per_token = STAGING_PITCH + 4 * token_floats
        biases = 4 * self.tile_rows if has_bias else 0
        num_bytes = self.num_math_warpgroups * self.max_token_tile * per_token + biases + self.max_groups * GROUP_ENTRY_BYTES + 16
        return round_up(num_bytes, 16) + TILE_RING_BYTES

    def _need(self, op: str, ok: bool, what: str, expected: object, fix: str) -> None:
        check(ok, op, what, expected, getattr(self, what), fix)

    def _check_block(self, op: str, largest_tiles: dict[int, int]) -> None:
        """Raise ValueError unless tiles, group table and stages are legal; `largest_tiles` by number of math warpgroups."""
        self._need(op, self.num_math_warpgroups in largest_tiles, "num_math_warpgroups", f"one of {tuple(largest_tiles)}", "see REGISTERS")
        cluster, tiles = self.cluster_blocks, self.token_tiles
        largest, most, least = largest_tiles[self.num_math_warpgroups], MAX_TOKEN_TILE_SIZES // cluster, 8 * cluster
        is_legal = 0 < len(tiles) <= most and all(t % 8 == 0 and least <= t <= largest for t in tiles)
        self._need(op, is_legal and tiles == tuple(sorted(set(tiles))), "token_tiles",
                   f"at most {most} ascending multiples of 8 from {least} to {largest}", "use fewer sizes or fewer warpgroups")
        is_power = self.max_groups > 0 and self.max_groups & (self.max_groups - 1) == 0
        self._need(op, is_power, "max_groups", "a power of two", "round it up")
        self._need(op, 2 <= self.num_stages, "num_stages", "at least 2", "a ring needs two")
        fits = self.smem_bytes <= MAX_SMEM_BYTES
        self._need(op, fits, "num_stages", f"at most {self.fitting_stages} in {MAX_SMEM_BYTES} bytes", "use fewer stages")


@dataclass(frozen=True, kw_only=True)
class Fp4GemmConfig(GemmBlock):
    """One compiled fp4_gemm.

    Args:
        num_math_warpgroups: 2, 3 or 4, of 64 weight rows each. More hide the latency of expanding FP4, fewer leave registers
            for more tokens.
        token_tiles: ascending multiples of 8; per tile the kernel takes the smallest that needs no more tiles than the largest.
        num_stages: K = 128 blocks in flight.
        epilogue: "store" (BF16), "accumulate" (add to BF16) or "swiglu" (linear 1: gate, row weight, E4M3 per 32 channels).
        max_groups: capacity of the group table, a power of two.
        has_bias: "store" and "accumulate" add bias times row weight; "swiglu" always takes a bias.
        scatter: "store" writes each row where an address says instead of to one tensor.

    Raises:
        ValueError: an argument is out of range, or shared memory does not hold the stages.
    """

    registers = REGISTERS

    num_math_warpgroups: int
    token_tiles: tuple[int, ...]
    num_stages: int
    epilogue: str = "store"
    max_groups: int = 1
    has_bias: bool = False
    scatter: bool = False

    def __post_init__(self):
        self._need(OP, self.epilogue in EPILOGUES, "epilogue", f"one of {EPILOGUES}", "pick one of them")
        self._need(OP, not self.has_bias or self.epilogue != "swiglu", "has_bias", "False for swiglu", "it takes a bias as it is")
        can_scatter = not self.scatter or self.epilogue == "store"
        self._need(OP, can_scatter, "scatter", "False unless the epilogue is store", "accumulate into a tensor")
        self._check_block(OP, MAX_TOKEN_TILE[self.epilogue])

    @property
    def loads_ahead(self) -> bool:
        return self.num_math_warpgroups == 2 and self.max_token_tile <= LOADS_AHEAD[self.epilogue]

    @property
    def max_double_buffered(self) -> int:
        """Largest token tile that expands into two fragments."""
        return (MAX_DOUBLE_BUFFERED_WITH_BIAS if self.has_bias else MAX_DOUBLE_BUFFERED)[self.num_math_warpgroups]

    @property
    def fixed_bytes(self) -> int:
        token_floats = 4 if self.scatter else 2 if self.has_bias or self.epilogue == "swiglu" else 1
        return self._bytes_beside_stages(token_floats, self.has_bias)

    @cached_property  # every launch asks for it: 1 us of host time
    def smem_bytes(self) -> int:
        return self.gemm_bytes

    def workspace_bytes(self, num_blocks: int) -> int:
        """Workspace for tiles that are cut along K (roles/tail_sums.cuh): four flags per block, then a slot of sums per block and
        warpgroup. Its flags are zeroed once, whichever configs use it."""
        return num_blocks * self._workspace_block_bytes

    @cached_property
    def _workspace_block_bytes(self) -> int:
        return 4 * 4 + self.num_math_warpgroups * self.max_token_tile // 2 * 128 * 4

    def with_output(self, *, has_bias: bool = False, scatter: bool = False) -> "Fp4GemmConfig":
        """The same config with these options, and fewer stages where shared memory wants it."""
        changed = replace(self, has_bias=has_bias, scatter=scatter, num_stages=2)
        return replace(changed, num_stages=min(self.num_stages, changed.fitting_stages))


def largest_workspace_bytes(num_blocks: int) -> int:
    """What every legal config can work with."""
    per_block = max(warpgroups * tile for tiles in MAX_TOKEN_TILE.values() for warpgroups, tile in tiles.items())
    return num_blocks * (4 * 4 + per_block // 2 * 128 * 4)


def round_up(a: int, b: int) -> int:
    """`a`, or the next multiple of `b`."""
    return -(-a // b) * b


def with_most_stages(*, num_math_warpgroups: int, token_tiles: tuple[int, ...], epilogue: str = "store", max_groups: int = 1,
                     limit: int = 16) -> Fp4GemmConfig:
    """The config with as many stages as shared memory holds, at most `limit`."""
    shape = {"num_math_warpgroups": num_math_warpgroups, "token_tiles": token_tiles, "epilogue": epilogue, "max_groups": max_groups}
    return Fp4GemmConfig(**shape, num_stages=min(limit, Fp4GemmConfig(**shape, num_stages=2).fitting_stages))
