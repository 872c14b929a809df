"""What mega_moe is launched with, without a GPU: layout of the parameters, the order of work, addresses, and what is kept between calls."""

import ctypes
import gc
import math
import re
import weakref
from dataclasses import replace

import pytest
import torch

from megamoe.comm.device_calls import CallStateParams, DeviceCalls
from megamoe.comm.protocol import ArenaDims, pack
from megamoe.formats import layout_sm90, quantize_fp4
from megamoe.kernels import compiler, fp4_gemm, mega_moe, moe_sources
from megamoe.kernels.driver import TensorMap
from megamoe.kernels.mega_moe_config import MegaMoeConfig, with_most_stages
from megamoe.kernels.moe_dispatch import RoutedRows

DIMS = ArenaDims(num_ranks=2, max_tokens=16, num_topk=3, num_experts=6, hidden=96, intermediate=64, precision="fp8xfp4", pool_rows=256)
V4_PRO = ArenaDims(num_ranks=4, max_tokens=8192, num_topk=6, num_experts=384, hidden=7168, intermediate=3072, precision="fp8xfp4",
                   pool_rows=50688)
CONFIG = with_most_stages(num_math_warpgroups=2, token_tiles=(8, 16), max_groups=4, has_down_bias=True, hidden=96, intermediate=64)
NVCC = pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")


def config_for(dims: ArenaDims, num_math_warpgroups: int, *token_tiles: int) -> MegaMoeConfig:
    return with_most_stages(num_math_warpgroups=num_math_warpgroups, token_tiles=token_tiles, max_groups=128, has_down_bias=False,
                            hidden=dims.hidden, intermediate=dims.intermediate)


def layout_claims(name: str, struct: type) -> list[str]:
    members = [member for member, _ in struct._fields_ if not member.startswith("_pad")]
    return [f"sizeof({name}) == {ctypes.sizeof(struct)}",
            *(f"__builtin_offsetof({name}, {member}) == {getattr(struct, member).offset}" for member in members)]


@NVCC
def test_parameters_lie_where_the_kernel_reads_them():
    structs = (mega_moe.MegaMoeParams, mega_moe.MoeStreamShape, mega_moe.TileRing, mega_moe.TileFlow, mega_moe.CallEnd,
               mega_moe.TimelineBuffer, moe_sources.Symm, CallStateParams, fp4_gemm.Fp4GemmParams)
    claims = [claim for struct in structs for claim in layout_claims(f"megamoe::{struct.__name__}", struct)]
    claims += [*layout_claims("VirtualParams", mega_moe.VirtualParams), f"alignof(megamoe::MegaMoeParams) == {TensorMap.alignment}",
               f"sizeof(megamoe::SlotCounters) == {4 * mega_moe._COUNTERS_PER_SLOT}"]
    assert len(claims) > 60
    lines = [mega_moe.source(CONFIG, DIMS), *(f'static_assert({claim}, "{claim}");' for claim in claims)]
    compiler.compile_cubin("\n".join([*lines, ""]), compiler="nvcc")


@NVCC
@pytest.mark.parametrize("is_virtual", (False, True))
def test_the_kernel_compiles_without_spills(is_virtual):
    text = mega_moe.source(CONFIG, DIMS, is_virtual)
    assert f"kBytes == {CONFIG.smem_bytes}," in text
    cubin = compiler.compile_cubin(text)
    assert (cubin.spill_bytes, cubin.warnings) == (0, [])


def shape_of(dims: ArenaDims, config: MegaMoeConfig, num_blocks: int) -> mega_moe.MoeStreamShape:
    return mega_moe.stream_shape(config, dims, num_blocks)


def test_stream_of_v4_pro():
    shape = shape_of(V4_PRO, config_for(V4_PRO, 4, 8, 16, 24, 32), 132)
    assert (list(shape.row_tiles), list(shape.k_blocks)) == ([24, 28], [56, 24])
    assert (shape.band_tiles, shape.lag_tiles) == (8, 16), "six rounds of 132 blocks are 792 of 52 tasks per tile"
    assert (shape.ring.num_slots, shape.ring.slot_rows) == (1024, 32)
    shape = shape_of(V4_PRO, config_for(V4_PRO, 2, 128, 160, 176), 33)
    assert (list(shape.row_tiles), shape.lag_tiles, shape.ring.num_slots, shape.ring.slot_rows) == ([48, 56], 2, 288, 176)


def test_stream_of_clusters():
    config = replace(config_for(V4_PRO, 2, 128, 160, 176), cluster_blocks=2, num_stages=3)
    shape = shape_of(V4_PRO, config, 132)
    assert (list(shape.row_tiles), shape.lag_tiles) == ([24, 28], 8), "six rounds of 66 clusters are 396 of 52 tasks per tile"
    message = "mega_moe: num_blocks must be a multiple of 2, got 33; take a config without clusters"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shape_of(V4_PRO, config, 33)


def test_sizes_that_are_no_multiple_of_a_tile():
    dims = ArenaDims(1, 8, 4, 8, 2880, 2880, "fp8xfp4", pool_rows=1024)
    shape = shape_of(dims, config_for(dims, 3, 64), 132)
    assert (list(shape.row_tiles), list(shape.k_blocks)) == ([30, 15], [23, 23])
    shape = shape_of(DIMS, CONFIG, 132)
    assert (list(shape.row_tiles), list(shape.k_blocks)) == ([1, 1], [1, 1]), "padded to one storage unit"


@pytest.mark.parametrize("num_slots", range(1, 40))
@pytest.mark.parametrize("num_blocks", (1, 16, 132))
def test_a_ring_of_any_size_cannot_deadlock(num_slots, num_blocks):
    dims = ArenaDims(2, 16, 3, 6, 96, 64, "fp8xfp4", pool_rows=16 * num_slots + 15)
    shape = shape_of(dims, CONFIG, num_blocks)
    assert shape.ring.num_slots == num_slots and shape.band_tiles >= 1
    assert num_slots >= shape.lag_tiles + 2 * shape.band_tiles - 1
    if num_slots >= max(6 * num_blocks + 1, 3 * num_blocks + 15):
        assert (shape.band_tiles, shape.lag_tiles) == (8, 3 * num_blocks)


def test_a_pool_without_a_tile():
    dims = ArenaDims(2, 16, 3, 6, 96, 64, "fp8xfp4", pool_rows=8)
    message = "mega_moe: pool_rows must be at least 16, one token tile, got 8; raise arena_bytes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shape_of(dims, CONFIG, 132)


class Rank:
    """One rank on the CPU, with what a launch would have taken. Tensor maps are (address, shape, box) hashed into 16 words."""

    def __init__(self, monkeypatch, has_bias: bool = True):
        self.maps = []
        monkeypatch.setattr(fp4_gemm, "tensor_map", self.tensor_map)
        self.layout, cpu = pack(DIMS), torch.device("cpu")
        self.bytes = torch.zeros(self.layout.num_bytes, dtype=torch.uint8)
        self.calls = DeviceCalls(cpu, 1, 2, 0.5)
        pointers = [self.bytes.data_ptr() + 4096, self.bytes.data_ptr()]
        self.mega = mega_moe.MegaMoe(self.layout, 1, pointers, self.bytes, cpu, self.calls, num_blocks=66)
        self.routed = RoutedRows(torch.zeros(96, dtype=torch.int32), torch.zeros(4, dtype=torch.int32))
        self.experts = self.make_experts(has_bias)

    def tensor_map(self, tensor, box, **options):
        self.maps.append((tensor.data_ptr(), tuple(tensor.shape), box))
        return TensorMap((ctypes.c_uint64 * 16)(*[len(self.maps)] * 16))

    def make_experts(self, has_bias: bool) -> mega_moe.MegaExperts:
        gate_up, down = (layout_sm90.pack(quantize_fp4(torch.randn(3, n, k)), interleave_gate_up=interleave)
                         for n, k, interleave in ((128, 96, True), (96, 64, False)))
        biases = (torch.zeros(3, 128), torch.zeros(3, 96)) if has_bias else (None, None)
        return mega_moe.MegaExperts(gate_up, down, *biases, limit=7.0, alpha=1.702, up_bias=1.0)

    def params(self, num_tokens: int = 5) -> mega_moe.MegaMoeParams:
        self.y = torch.zeros(num_tokens, 96, dtype=torch.bfloat16)
        return self.mega.params(CONFIG, self.experts, self.routed, self.y)

    def address(self, name: str) -> int:
        return self.layout.view(name, self.bytes).data_ptr()


def test_both_linears_read_and_write_the_pool(monkeypatch):
    rank = Rank(monkeypatch)
    p = rank.params()
    gate_up, down = p.linear
    experts, mega = rank.experts, rank.mega
    weights = [(w.blocks.data_ptr(), (3, 2, 4, 136), (1, CONFIG.num_math_warpgroups, 4, 136)) for w in (experts.gate_up, experts.down)]
    x, a = rank.address("pool_x"), rank.address("pool_a")
    assert rank.maps == [(x, (256, 96), (8, 128)), (x, (256, 96), (16, 128)), weights[0],
                         (a, (256, 64), (8, 128)), (a, (256, 64), (16, 128)), weights[1]]
    assert [list(linear.x_maps[i].opaque)[0] for linear in p.linear for i in range(3)] == [1, 2, 0, 4, 5, 0]
    assert [linear.w_map.opaque[0] for linear in p.linear] == [3, 6]
    assert (gate_up.w_row_base, down.w_row_base) == (experts.gate_up.row_base.data_ptr(), experts.down.row_base.data_ptr())
    assert (gate_up.n, gate_up.num_row_blocks, gate_up.num_k_blocks) == (128, 2, 1)
    assert (down.n, down.num_row_blocks, down.num_k_blocks) == (96, 2, 1)
    assert gate_up.x_sf == p.pool_sf == rank.address("pool_x_sf") and p.pool_codes == rank.address("pool_x")
    assert (gate_up.a_codes, gate_up.a_sf) == (rank.address("pool_a"), rank.address("pool_a_sf"))
    assert down.x_sf == p.act_row_sf and down.row_dst == p.row_dst == mega._row_dst.data_ptr()
    assert gate_up.row_weight == down.row_weight == p.row_weight == mega._row_weight.data_ptr()
    assert (gate_up.bias, down.bias) == (experts.gate_up_bias.data_ptr(), experts.down_bias.data_ptr())
    assert (gate_up.limit, round(gate_up.alpha, 4), gate_up.up_bias) == (7.0, 1.702, 1.0)
    assert (gate_up.row_dst, gate_up.out, down.out, down.a_codes, gate_up.workspace, down.workspace) == (None,) * 6
    for linear in p.linear:
        grouping = linear.grouping
        assert (grouping.offsets, grouping.bounds, grouping.counts) == (rank.routed.offsets.data_ptr(), None, None)
        assert (grouping.num_groups, grouping.num_rows) == (3, 2 * 16 * 3)


def test_counters_and_sizes(monkeypatch):
    rank = Rank(monkeypatch)
    p = rank.params()
    counters = rank.mega.counters
    assert (p.flow.counters, p.end.num_tickets) == (counters.data_ptr(), counters.data_ptr() + 4 * 4 * 1024)
    assert p.end.num_finished == p.end.num_tickets + 4 == counters.data_ptr() + counters.nbytes - 4
    assert (p.end.num_expected, p.num_blocks) == (66, 66), "each block ends its part of the call"
    assert (p.flow.ring.num_slots, p.flow.ring.slot_rows) == (p.stream.ring.num_slots, p.stream.ring.slot_rows) == (16, 16)
    assert list(p.flow.row_blocks) == [2, 2]
    assert (p.symm.rank, p.symm.num_ranks, p.symm.base, list(p.symm.offsets[:2])) == (1, 2, rank.bytes.data_ptr(), [4096, 0])
    assert (p.calls.words, p.calls.timeout_ns) == (rank.calls.state.data_ptr(), 500_000_000)
    assert not rank.mega._row_dst.any(), "a row that was never pulled has no destination"


def test_without_bias_linear_2_takes_no_row_weight(monkeypatch):
    rank = Rank(monkeypatch, has_bias=False)
    gate_up, down = rank.params().linear
    assert (gate_up.bias, down.bias, down.row_weight) == (None, None, None) and gate_up.row_weight


def test_a_call_sets_only_what_is_its_own(monkeypatch):
    rank = Rank(monkeypatch)
    first = rank.params(num_tokens=5)
    assert (first.y, first.num_tokens, first.row_entry) == (rank.y.data_ptr(), 5, rank.routed.row_entry.data_ptr())
    again = rank.params(num_tokens=3)
    assert again is first and (again.y, again.num_tokens) == (rank.y.data_ptr(), 3) and len(rank.maps) == 6
    rank.routed = RoutedRows(rank.routed.row_entry, torch.zeros(4, dtype=torch.int32))
    moved = rank.params()
    assert moved is not first and moved.linear[1].grouping.offsets == rank.routed.offsets.data_ptr()


def test_experts_in_another_order_are_refused(monkeypatch):
    rank = Rank(monkeypatch)
    rank.experts = replace(rank.experts, down=replace(rank.experts.down, thread_order=True))
    with pytest.raises(ValueError, match=r"^mega_moe: down\.thread_order must be False, got True; pack it as has_thread_order says$"):
        rank.params()


def test_experts_are_not_kept_alive(monkeypatch):
    rank = Rank(monkeypatch)
    rank.params()
    old, rank.experts = weakref.ref(rank.experts), rank.make_experts(True)
    rank.params()
    gc.collect()
    assert old() is None and len(rank.mega._params) == 1


def test_start_over_zeroes_the_counters(monkeypatch):
    rank = Rank(monkeypatch)
    rank.mega.counters.fill_(7)
    rank.calls.start_over()
    assert not rank.mega.counters.any()


def test_limits_are_numbers(monkeypatch):
    rank = Rank(monkeypatch)
    rank.experts = mega_moe.MegaExperts(rank.experts.gate_up, rank.experts.down, None, None, limit=math.inf, alpha=1.0, up_bias=0.0)
    assert rank.params().linear[0].limit == math.inf
