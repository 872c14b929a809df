"""MegaMoeConfig: the static facts of one compiled mega_moe, and which of them are legal on sm_90a. Pure: no torch, no CUDA."""

from dataclasses import dataclass
from functools import cached_property

from megamoe.errors import check
from megamoe.kernels.fp4_gemm_config import BLOCK_K, MAX_SMEM_BYTES, TILE_SLOTS, GemmBlock, round_up

OP = "mega_moe"
# (math, aux) registers per thread by number of math warpgroups: the aux warps do more here than in fp4_gemm. The sum over the block must
# fit 64 K registers, or setmaxnreg hangs.
REGISTERS = {2: (224, 56), 3: (152, 56), 4: (104, 64)}
# Largest token tile that compiles without a spill (nvcc 13.0), and, by thread order, largest one that leaves registers for two expanded
# fragments: natural order needs some for its tables.
MAX_TOKEN_TILE = {2: 176, 3: 104, 4: 48}
MAX_DOUBLE_BUFFERED = {True: {2: 176, 3: 96, 4: 48}, False: {2: 176, 3: 96, 4: 40}}
# Largest token tile with registers for the packed weights of a block ahead, with two warpgroups.
LOADS_AHEAD = 128
# Rows that a block folds for one publication where token tiles go up to MANY_TOKENS or more; 4 and 8 are as fast as 2. Where there are few
# rows, linear 2 wants them as soon as can be.
MANY_TOKENS, FOLD_RUN = 56, 2
_TOKEN_FLOATS = 4  # scale, weight and the address of a destination
_SLICE = 32  # of H and I: the channels that share an exponent


@dataclass(frozen=True, kw_only=True)
class MegaMoeConfig(GemmBlock):
    """One compiled mega_moe.

    Args:
        num_math_warpgroups: 2, 3 or 4, of 64 weight rows each.
        token_tiles: ascending multiples of 8; per expert the kernel takes the smallest that needs no more tiles than the largest.
        num_stages: K = 128 blocks in flight.
        max_groups: capacity of the table of local experts, a power of two.
        has_down_bias: linear 2 adds bias times row weight; linear 1 always takes a bias.
        hidden, intermediate: H and I, multiples of 32.
        pull_buffers: rows on their way between ranks per block.
        cluster_blocks: blocks that work on neighbouring row tiles of one token tile, 1 or 2. Each brings a part of its tokens to all of
            them.

    Raises:
        ValueError: an argument is out of range, or shared memory does not hold the stages.
    """

    registers = REGISTERS

    num_math_warpgroups: int
    token_tiles: tuple[int, ...]
    num_stages: int
    max_groups: int
    has_down_bias: bool
    hidden: int
    intermediate: int
    pull_buffers: int = 2
    cluster_blocks: int = 1

    def __post_init__(self):
        for size in ("hidden", "intermediate"):
            value = getattr(self, size)
            self._need(OP, value > 0 and value % _SLICE == 0, size, f"a positive multiple of {_SLICE}", "pad the layer")
        self._need(OP, self.pull_buffers >= 1, "pull_buffers", "at least 1", "a row needs one")
        self._need(OP, self.cluster_blocks in (1, 2), "cluster_blocks", "1 or 2", "larger clusters have not been measured")
        self._check_block(OP, MAX_TOKEN_TILE)

    @property
    def thread_order(self) -> bool:
        return has_thread_order(self.hidden, self.intermediate)

    @property
    def max_double_buffered(self) -> int:
        """Largest token tile that expands into two fragments."""
        return MAX_DOUBLE_BUFFERED[self.thread_order][self.num_math_warpgroups]

    @property
    def loads_ahead(self) -> bool:
        return self.num_math_warpgroups == 2 and self.max_token_tile <= LOADS_AHEAD

    @property
    def fold_run(self) -> int:
        """Rows that a block folds and publishes together."""
        return 1 if self.max_token_tile < MANY_TOKENS else FOLD_RUN

    @property
    def fixed_bytes(self) -> int:
        return self._bytes_beside_stages(_TOKEN_FLOATS, self.has_down_bias)

    @property
    def max_gemm_bytes(self) -> int:
        return (MAX_SMEM_BYTES - self._mega_bytes) // 128 * 128

    @cached_property
    def smem_bytes(self) -> int:
        """MegaSmemPlan::kBytes: that of the GEMM, a buffer and two barriers per row in flight, a barrier per task handed over, and in a cluster
        a ticket with its two barriers."""
        return round_up(self.gemm_bytes, 128) + self._mega_bytes

    @property
    def _mega_bytes(self) -> int:
        ticket_bytes = 24 if self.cluster_blocks > 1 else 0
        return self.pull_buffers * (self.hidden + 16) + 8 * TILE_SLOTS + ticket_bytes


def has_thread_order(hidden: int, intermediate: int) -> bool:
    """Whether tokens, activated rows and weights of a layer are in thread order (formats/thread_order.py) on their way through mega_moe:
    where K of both linears is whole blocks. Otherwise they are in natural order, which costs 1.5 to 3 % from 512 tokens on."""
    return hidden % BLOCK_K == 0 and intermediate % BLOCK_K == 0


def with_most_stages(*, limit: int = 16, **shape) -> MegaMoeConfig:
    """The config of `shape` with as many stages as shared memory holds, at most `limit`. Raises ValueError if it does not hold two."""
    return MegaMoeConfig(**shape, num_stages=min(limit, MegaMoeConfig(**shape, num_stages=2).fitting_stages))


def table_capacity(num_groups: int) -> int:
    """The smallest legal max_groups for `num_groups` local experts."""
    check(num_groups > 0, OP, "num_groups", "positive", num_groups, "use fewer ranks")
    return 1 << (num_groups - 1).bit_length()
