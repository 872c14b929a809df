"""mega_moe: text, parameters and launch of csrc/include/megamoe/kernels/mega_moe.cuh.

Legend: W ranks, T tokens of this rank, e local experts, R rows received, H hidden, I intermediate, P pool rows.
"""

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from megamoe.comm.device_calls import CallStateParams, DeviceCalls
from megamoe.comm.protocol import ArenaDims, Layout, emit_struct, pack
from megamoe.errors import check
from megamoe.formats import Sm90Weight
from megamoe.kernels import codegen, devices, jit
from megamoe.kernels.fp4_gemm import Fp4GemmParams, Grouping, block_constants, gemm_params
from megamoe.kernels.fp4_gemm_config import BLOCK_K
from megamoe.kernels.launch import Params, params_struct
from megamoe.kernels.loading import KernelText, load_kernels
from megamoe.kernels.mega_moe_config import OP, MegaMoeConfig
from megamoe.kernels.moe_dispatch import RoutedRows
from megamoe.kernels.moe_sources import Symm, num_entries
from megamoe.kernels.wgmma_source import wgmma_e5m2_e4m3

MAX_SLOTS = 1024  # more would not overlap better
MAX_BAND_TILES = 8
# Linear 2 of a tile comes so many rounds of the card after its linear 1: a round is short where the tasks of linear 2 are, and the rows
# wait for the longest task of linear 1, its publication and the fold. v3 at 128 tokens with 2, 3, 4, 6, 10 and 21 rounds: 439, 405, 398,
# 391, 387, 385 us (one H200 with the load of a rank of four, 4c67c10); from 2048 tokens on the drift of the clock hides it.
LAG_ROUNDS = 6
_COUNTERS_PER_SLOT = 4

_u32, _pointer = ctypes.c_uint32, ctypes.c_void_p
TileRing = params_struct("TileRing", [("num_slots", _u32), ("slot_rows", _u32)])
MoeStreamShape = params_struct("MoeStreamShape", [
    ("row_tiles", _u32 * 2), ("k_blocks", _u32 * 2), ("band_tiles", _u32), ("lag_tiles", _u32), ("ring", TileRing),
])
TileFlow = params_struct("TileFlow", [("counters", _pointer), ("ring", TileRing), ("row_blocks", _u32 * 2)])
CallEnd = params_struct("CallEnd", [("num_tickets", _pointer), ("num_finished", _pointer), ("num_expected", _u32)])
TimelineBuffer = params_struct("TimelineBuffer", [("records", _pointer), ("capacity", _u32)])
MegaMoeParams = params_struct("MegaMoeParams", [
    ("linear", Fp4GemmParams * 2), ("symm", Symm), ("calls", CallStateParams), ("stream", MoeStreamShape), ("flow", TileFlow),
    ("end", CallEnd), ("row_entry", _pointer), ("pool_codes", _pointer), ("pool_sf", _pointer), ("row_weight", _pointer),
    ("row_dst", _pointer), ("act_row_sf", _pointer), ("y", _pointer), ("num_tokens", _u32), ("num_blocks", _u32),
    ("timeline", TimelineBuffer),
])
VirtualParams = params_struct("VirtualParams", [("ranks", _pointer), ("num_blocks", _u32)])


@dataclass(frozen=True, eq=False)
class MegaExperts:
    """The local experts as mega_moe reads them, and their gate as `reference.swiglu` has it.

    Args:
        gate_up: [e, 2I, H], interleaved. down: [e, H, I]. Both in thread order if `has_thread_order`.
        gate_up_bias: [e, 2I] float32, interleaved, or None. down_bias: [e, H] float32 or None.
        limit: +inf for none. alpha: 1 with up_bias 0 is SiLU.
    """

    gate_up: Sm90Weight
    down: Sm90Weight
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    limit: float
    alpha: float
    up_bias: float


def source(config: MegaMoeConfig, dims: ArenaDims, is_virtual: bool = False, has_timeline: bool = False) -> str:
    """One translation unit with the kernel for arenas of `dims`.

    Args:
        is_virtual: for several ranks on one GPU, a range of blocks each.
        has_timeline: a slower build whose roles record what they do (csrc/include/megamoe/timeline.cuh).
    """
    constants = {**block_constants(config), "pull_buffers": config.pull_buffers, "fold_run": config.fold_run, "hidden": config.hidden,
                 "intermediate": config.intermediate, "num_topk": dims.num_topk, "num_experts": dims.num_experts,
                 "max_tokens": dims.max_tokens, "swiglu": True, "accumulate": False, "has_bias": config.has_down_bias, "scatter": True,
                 "timeline": has_timeline}
    params, arguments = "megamoe::MegaMoeParams", "params, blockIdx.x"
    if is_virtual:
        params, arguments = "VirtualParams", "params.ranks[blockIdx.x / params.num_blocks], blockIdx.x % params.num_blocks"
    return "\n".join([
        "#include <megamoe/ptx/wgmma.cuh>",
        *map(wgmma_e5m2_e4m3, config.token_tiles),
        "#include <megamoe/kernels/mega_moe.cuh>",
        "",
        emit_struct(pack(dims)),
        codegen.emit_struct("Constants", constants),
        f"struct Config : Constants {{ using TokenTiles = megamoe::Sizes<{', '.join(map(str, config.token_tiles))}>; }};",
        f"static_assert(megamoe::MegaSmemPlan<Config>::kBytes == {config.smem_bytes}, \"mega_moe_config.py and MegaSmemPlan disagree\");",
        "struct VirtualParams {",
        "  const megamoe::MegaMoeParams* ranks;",
        "  megamoe::uint32 num_blocks;  // of each rank",
        "};",
        "",
        'extern "C" __global__ void __launch_bounds__(Config::kThreads, 1)',
        f"{_entry(is_virtual)}(const __grid_constant__ {params} params) {{",
        f"  megamoe::mega_moe<Layout, Config>({arguments});",
        "}",
        "",
    ])


def _entry(is_virtual: bool) -> str:
    return f"{OP}_virtual" if is_virtual else OP


def stream_shape(config: MegaMoeConfig, dims: ArenaDims, num_blocks: int) -> Params:
    """The MoeStreamShape of a rank with `num_blocks` blocks: how its tiles share the pool, and how far linear 2 trails linear 1.

    Raises:
        ValueError: the pool does not hold one token tile, or the blocks do not make whole clusters.
    """
    tile, rows, cluster = config.max_token_tile, dims.pool_rows, config.cluster_blocks
    check(num_blocks % cluster == 0, OP, "num_blocks", f"a multiple of {cluster}", num_blocks, "take a config without clusters")
    check(rows >= tile, OP, "pool_rows", f"at least {tile}, one token tile", rows, "raise arena_bytes")
    num_slots = min(rows // tile, MAX_SLOTS)
    sizes = (2 * config.intermediate, config.hidden), (config.hidden, config.intermediate)  # (N, K) of both linears
    row_tiles = [-(-n // (config.tile_rows * cluster)) for n, _ in sizes]
    # INVARIANT: num_slots >= lag + 2 * band - 1 (schedule/moe_tasks.cuh).
    lag = min(-(-LAG_ROUNDS * (num_blocks // cluster) // sum(row_tiles)), (num_slots - 1) // 2)
    band = min(MAX_BAND_TILES, (num_slots - lag + 1) // 2)
    return MoeStreamShape.allocate(
        row_tiles=(_u32 * 2)(*row_tiles), k_blocks=(_u32 * 2)(*(-(-k // BLOCK_K) for _, k in sizes)), band_tiles=band, lag_tiles=lag,
        ring=TileRing.allocate(num_slots=num_slots, slot_rows=tile))


def kernel_text(config: MegaMoeConfig, dims: ArenaDims, is_virtual: bool = False, has_timeline: bool = False) -> KernelText:
    """The kernel as `load_kernels` and `jit.build` take it."""
    return OP, (config, dims, is_virtual, has_timeline), lambda: source(config, dims, is_virtual, has_timeline), _entry(is_virtual)


class MegaMoe:
    """mega_moe of one rank on one arena: its counters and the tables of its rows. Layers that share the arena share it.

    Allocates at construction; afterwards all is stream-ordered and, once `load` has been called, capturable.

    Args:
        layout: of the arena; precision fp8xfp4.
        rank: this rank.
        peer_ptrs: address of every rank's arena as this rank loads and stores it.
        own_bytes: [num_bytes] uint8, this rank's arena.
        device: CUDA device; must be current at every call.
        calls: epoch and failures of the arena's calls.
        num_blocks: blocks of this rank: all SMs, or an equal part of them per virtual rank.
    """

    def __init__(self, layout: Layout, rank: int, peer_ptrs: Sequence[int], own_bytes: torch.Tensor, device: torch.device,
                 calls: DeviceCalls, num_blocks: int):
        self.dims, self.device, self.num_blocks = layout.dims, device, num_blocks
        self._symm, self._calls = Symm.of(rank, peer_ptrs), calls.params()
        rows = self.dims.pool_rows
        self._pool = {name: layout.view(name, own_bytes) for name in ("pool_x", "pool_x_sf", "pool_a", "pool_a_sf")}
        # All zero between calls: per slot what sync/tile_flow.cuh counts, then tickets and finished warpgroups.
        self.counters = torch.zeros(MAX_SLOTS * _COUNTERS_PER_SLOT + 2, dtype=torch.int32, device=device)
        calls.clear_at_start_over(self.counters)
        self._row_weight = torch.empty(rows, dtype=torch.float32, device=device)
        self._row_dst = torch.zeros(rows, dtype=torch.int64, device=device)  # no address: a failed call may store rows it never pulled
        self._act_row_sf = torch.empty(rows, dtype=torch.uint8, device=device)
        # By experts, as long as these live; a block holds everything that calls have in common.
        self._params: weakref.WeakKeyDictionary[MegaExperts, dict[tuple, Params]] = weakref.WeakKeyDictionary()

    def load(self, configs: Iterable[MegaMoeConfig]) -> None:
        """Load the kernels of `configs`, so that `launch` neither compiles nor allocates."""
        load_kernels((kernel_text(config, self.dims) for config in dict.fromkeys(configs)), self.device.index)

    def params(self, config: MegaMoeConfig, experts: MegaExperts, routed: RoutedRows, y: torch.Tensor,
               timeline: torch.Tensor | None = None) -> Params:
        """The MegaMoeParams of a call, valid until the next call of this method.

        Args:
            config: for this layer's sizes. experts: of this rank. routed: the call's rows.
            y: [T, H] bfloat16, contiguous; becomes the sum over slots, NaN if the call fails.
            timeline: from testing.timeline.allocate, on the device and zero: what a kernel built with one records.
        """
        of_experts = self._params.setdefault(experts, {})
        key = config, routed.row_entry.data_ptr(), routed.offsets.data_ptr()
        if key not in of_experts:
            of_experts[key] = self._make_params(config, experts, routed)
        params = of_experts[key]
        params.y, params.num_tokens = y.data_ptr(), y.shape[0]
        if timeline is not None:
            params.timeline = TimelineBuffer.allocate(records=timeline.data_ptr(), capacity=timeline.shape[2] - 1)
        return params

    def launch(self, config: MegaMoeConfig, experts: MegaExperts, routed: RoutedRows, y: torch.Tensor,
               timeline: torch.Tensor | None = None) -> None:
        """Run the experts on the routed rows of all ranks, and combine; see `params`. The first call with a timeline compiles.

        Sync: stream-ordered; the device waits for every rank's partials, at most calls.timeout_s.
        """
        kernel = jit.build(*kernel_text(config, self.dims, has_timeline=timeline is not None), self.device.index)
        params = self.params(config, experts, routed, y, timeline)
        stream = devices.stream(self.device.index)
        kernel.launch(self.num_blocks, config.num_threads, config.smem_bytes, params, stream, cluster=config.cluster_blocks,
                      cooperative=True)

    def _make_params(self, config: MegaMoeConfig, experts: MegaExperts, routed: RoutedRows) -> Params:
        dims, pool, counters = self.dims, self._pool, self.counters.data_ptr()
        for name in ("gate_up", "down"):
            has_order = getattr(experts, name).thread_order
            check(has_order == config.thread_order, OP, f"{name}.thread_order", config.thread_order, has_order, "pack it as has_thread_order says")
        grouping = Grouping.allocate(offsets=routed.offsets.data_ptr(), num_groups=dims.num_experts // dims.num_ranks,
                                     num_rows=num_entries(dims))
        pool_sf, has_bias = pool["pool_x_sf"].view(-1), experts.down_bias is not None
        gate_up = gemm_params(pool["pool_x"], experts.gate_up, config, grouping, x_sf=pool_sf, bias=experts.gate_up_bias,
                              row_weight=self._row_weight, a_codes=pool["pool_a"], a_sf=pool["pool_a_sf"], limit=experts.limit,
                              alpha=experts.alpha, up_bias=experts.up_bias)
        down = gemm_params(pool["pool_a"], experts.down, config, grouping, x_sf=self._act_row_sf, row_dst=self._row_dst,
                           bias=experts.down_bias, row_weight=self._row_weight if has_bias else None)
        stream = stream_shape(config, dims, self.num_blocks)
        row_blocks = (_u32 * 2)(gate_up.num_row_blocks, down.num_row_blocks)
        end_of_slots = counters + 4 * MAX_SLOTS * _COUNTERS_PER_SLOT
        return MegaMoeParams.allocate(
            linear=(Fp4GemmParams * 2)(gate_up, down), symm=self._symm, calls=self._calls, stream=stream,
            flow=TileFlow.allocate(counters=counters, ring=stream.ring, row_blocks=row_blocks),
            end=CallEnd.allocate(num_tickets=end_of_slots, num_finished=end_of_slots + 4, num_expected=self.num_blocks),
            row_entry=routed.row_entry.data_ptr(), pool_codes=pool["pool_x"].data_ptr(), pool_sf=pool_sf.data_ptr(),
            row_weight=self._row_weight.data_ptr(), row_dst=self._row_dst.data_ptr(), act_row_sf=self._act_row_sf.data_ptr(),
            num_blocks=self.num_blocks)


def launch_virtual(config: MegaMoeConfig, dims: ArenaDims, params: Sequence[Params], num_blocks: int, device: torch.device,
                   has_timeline: bool = False) -> None:
    """Launch several ranks of one GPU, `num_blocks` blocks each, together: rank i of `params` is the i-th range of blocks.

    Sync: stream-ordered after a copy of the parameters to the device.
    """
    ranks = torch.frombuffer(bytearray(b"".join(map(bytes, params))), dtype=torch.uint8).to(device)
    kernel = jit.build(*kernel_text(config, dims, True, has_timeline), device.index)
    block = VirtualParams.allocate(ranks=ranks.data_ptr(), num_blocks=num_blocks)
    stream = devices.stream(device.index)
    kernel.launch(len(params) * num_blocks, config.num_threads, config.smem_bytes, block, stream, cluster=config.cluster_blocks,
                  cooperative=True)
