"""What fp4_gemm and its two small kernels are launched with, without a GPU: layout of the parameters, launch shape, refusals."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megamoe.formats import layout_sm90, quantize_fp4
from megamoe.kernels import compiler, device_errors, devices, fold_tokens, fp4_gemm, jit, row_bounds
from megamoe.kernels.fp4_gemm_config import MAX_SMEM_BYTES, with_most_stages

STRUCTS = {
    "kernels/fp4_gemm.cuh": (fp4_gemm.Grouping, fp4_gemm.Fp4GemmParams),
    "kernels/row_bounds.cuh": (device_errors.DeviceErrors, row_bounds.Indices, row_bounds.PaddingFill, row_bounds.RowBoundsParams,
                               row_bounds.GroupBoundsParams),
    "kernels/fold_tokens.cuh": (fold_tokens.FoldTokensParams,),
}


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("header", STRUCTS)
def test_parameters_lie_where_the_kernel_reads_them(header):
    lines = [f"#include <megamoe/{header}>"]
    for struct in STRUCTS[header]:
        name = f"megamoe::{struct.__name__}"
        lines.append(f'static_assert(sizeof({name}) == {fp4_gemm.ctypes.sizeof(struct)}, "size of {name}");')
        for member in (member for member, _ in struct._fields_ if not member.startswith("_pad")):
            offset = getattr(struct, member).offset
            lines.append(f'static_assert(__builtin_offsetof({name}, {member}) == {offset}, "{name}::{member}");')
    assert len(lines) > 5
    compiler.compile_cubin("\n".join([*lines, 'extern "C" __global__ void nothing() {}', ""]), compiler="nvcc")


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
def test_the_small_kernels_compile_without_spills():
    for text in (fold_tokens.source(), row_bounds.source("row_bounds"), row_bounds.source("group_bounds")):
        cubin = compiler.compile_cubin(text)
        assert cubin.spill_bytes == 0 and cubin.num_registers <= 64


STORE = with_most_stages(num_math_warpgroups=2, token_tiles=(16, 64), max_groups=4)
SWIGLU = with_most_stages(num_math_warpgroups=3, token_tiles=(48, 88), max_groups=4, epilogue="swiglu")


WORKSPACE = torch.zeros(16)


@pytest.fixture
def launches(monkeypatch) -> list:
    """(grid, block, smem_bytes, params) of every launch; tensors of the CPU stand for those of a GPU with 8 SMs."""
    recorded = []
    kernel = SimpleNamespace(launch=lambda grid, block, smem, params, stream: recorded.append((grid, block, smem, params)))
    monkeypatch.setattr(jit, "build", lambda op, config, make_source, entry, device: HashableKernel(kernel.launch))
    monkeypatch.setattr(fp4_gemm, "num_sms", lambda device: 8)
    monkeypatch.setattr(fp4_gemm, "_workspace", lambda device, stream, num_bytes: WORKSPACE)
    monkeypatch.setattr(devices, "stream", lambda device: 0)
    monkeypatch.setattr(fp4_gemm, "tensor_map", lambda x, box, **options: fp4_gemm.TensorMap((x.data_ptr(), *box)))
    fp4_gemm._launches.clear()
    yield recorded
    fp4_gemm._launches.clear()


class HashableKernel:
    def __init__(self, launch):
        self.launch = launch

    def __eq__(self, other):
        return isinstance(other, HashableKernel)

    def __hash__(self):
        return 1


def weight(num_groups: int, n: int = 192, k: int = 160, interleaved: bool = False):
    return layout_sm90.pack(quantize_fp4(torch.randn(num_groups, n, k)), interleaved)


def operands(num_rows: int, w, swiglu: bool = False) -> dict:
    _, n, k = w.shape
    x = {"codes": torch.zeros(num_rows, k, dtype=torch.float8_e4m3fn), "sf": torch.zeros(num_rows, dtype=torch.uint8), "weight": w}
    if swiglu:
        return x | {"a_codes": torch.zeros(num_rows, n // 2, dtype=torch.float8_e4m3fn),
                    "a_sf": torch.zeros(num_rows, n // 64, dtype=torch.uint8)}
    return x | {"out": torch.zeros(num_rows, n, dtype=torch.bfloat16)}


def test_what_a_launch_gets(launches):
    w = weight(3)
    given = operands(30, w)
    bounds = torch.zeros(3, 2, dtype=torch.int32)
    for _ in range(2):
        fp4_gemm.fp4_gemm(**given, config=STORE, bounds=bounds)
    (grid, block, smem, params), again = launches
    assert again[3] is params, "built once"
    assert (grid, block, smem) == (8, 384, STORE.smem_bytes) and smem <= MAX_SMEM_BYTES
    x = given["codes"].data_ptr()
    assert [list(params.x_maps[i].opaque[:3]) for i in range(3)] == [[x, 16, 128], [x, 64, 128], [0, 0, 0]]
    assert list(params.w_map.opaque[:5]) == [w.blocks.data_ptr(), 1, 2, 4, 136], "all row blocks of a tile, one block of K"
    assert (params.w_row_base, params.x_sf, params.out) == tuple(t.data_ptr() for t in (w.row_base, given["sf"], given["out"]))
    assert params.workspace == WORKSPACE.data_ptr()
    assert (params.n, params.num_row_blocks, params.num_k_blocks) == (192, 3, 2)
    grouping = params.grouping
    assert (grouping.offsets, grouping.bounds, grouping.counts) == (None, bounds.data_ptr(), None)
    assert (grouping.num_groups, grouping.num_rows, grouping.group_stride) == (3, 30, 10)
    assert (params.bias, params.a_codes) == (None, None) and params.limit == math.inf


@pytest.mark.parametrize("change", (
    {"interleaved": True}, {"blocks": lambda w: w.blocks[:, :, :1]}, {"row_base": lambda w: w.row_base[:2]}))
def test_a_weight_that_changed_at_its_addresses_is_checked_anew(launches, change):
    w, bounds = weight(3), torch.zeros(3, 2, dtype=torch.int32)
    given = operands(30, w)
    fp4_gemm.fp4_gemm(**given, config=STORE, bounds=bounds)
    given["weight"] = replace(w, **{name: value(w) if callable(value) else value for name, value in change.items()})
    with pytest.raises(ValueError, match=r"fp4_gemm: weight\.(interleaved|blocks|row_base)"):
        fp4_gemm.fp4_gemm(**given, config=STORE, bounds=bounds)
    assert len(launches) == 1


def test_what_a_swiglu_launch_gets(launches):
    w = weight(2, interleaved=True)
    given = operands(400, w, swiglu=True)
    extra = {"bias": torch.zeros(2, 192), "row_weight": torch.zeros(400), "counts": torch.zeros(2, dtype=torch.int32)}
    fp4_gemm.fp4_gemm(**given, **extra, config=SWIGLU, limit=7.0, alpha=1.5, up_bias=1.0)
    grid, block, _, params = launches[0]
    assert (grid, block) == (8, 512)
    assert (params.bias, params.row_weight, params.a_codes, params.a_sf) == tuple(
        t.data_ptr() for t in (extra["bias"], extra["row_weight"], given["a_codes"], given["a_sf"]))
    assert (params.limit, params.alpha, params.up_bias, params.out) == (7.0, 1.5, 1.0, None)
    assert (params.grouping.counts, params.grouping.group_stride) == (extra["counts"].data_ptr(), 200)


def test_workspaces_grow_per_stream_and_graphs_have_their_own(monkeypatch):
    is_capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(fp4_gemm, "num_sms", lambda device: 8)
    monkeypatch.setattr(fp4_gemm, "_workspaces", {})
    monkeypatch.setattr(torch, "device", lambda *args: "cpu")
    small = fp4_gemm._workspace(0, 1, 1000)
    assert small.nbytes == 1000 and not small[: 8 * 16].any()
    assert fp4_gemm._workspace(0, 1, 900) is small and fp4_gemm._workspace(0, 2, 900) is not small
    large = fp4_gemm._workspace(0, 1, 2000)
    assert large.nbytes == 2000 and fp4_gemm._workspace(0, 1, 1000) is large
    is_capturing = True
    assert fp4_gemm._workspace(0, 1, 1000) is not large
    is_capturing = False
    assert fp4_gemm._workspace(0, 1, 1000) is large


def test_no_rows_and_no_groups_launch_nothing(launches):
    fp4_gemm.fp4_gemm(**operands(0, weight(1)), config=STORE)
    empty = weight(1)
    empty = layout_sm90.Sm90Weight(empty.blocks[:0], empty.row_base[:0], torch.Size((0, 192, 160)), False)
    fp4_gemm.fp4_gemm(**operands(3, empty), config=STORE)
    assert not launches


W3 = weight(3)
BOUNDS = torch.zeros(3, 2, dtype=torch.int32)
GOOD = operands(30, W3) | {"config": STORE, "bounds": BOUNDS}
MISALIGNED = torch.zeros(30 * 192 + 1, dtype=torch.bfloat16)[1:].view(30, 192)
ERRORS = [
    (dict(bounds=None), "grouping must be one of offsets, bounds and counts, or none for one group, got None; pass one of them"),
    (dict(counts=BOUNDS[:, 0].contiguous()),
     "grouping must be one of offsets, bounds and counts, or none for one group, got ['bounds', 'counts']; pass one of them"),
    (dict(config=with_most_stages(num_math_warpgroups=2, token_tiles=(16,), max_groups=2)),
     "config.max_groups must be at least 3, got 2; round G up to a power of two"),
    (dict(config=SWIGLU), "weight.interleaved must be True, got False; pack the weight for this epilogue"),
    (dict(weight=replace(W3, thread_order=True)), "weight.thread_order must be False, got True; pack the weight in natural order"),
    (dict(weight=weight(3, n=130)), "N must be a multiple of 32, got 130; pad the weight with zeros"),
    (dict(weight=weight(3, k=128)), "codes.shape must be [30, 128], got [30, 160]; sizes must agree with the weight and the tokens"),
    (dict(sf=GOOD["sf"][:7]), "sf.shape must be [30], got [7]; sizes must agree with the weight and the tokens"),
    (dict(out=None), "out must be given for epilogue 'store', got None; pass it"),
    (dict(out=GOOD["out"].float()), "out.dtype must be torch.bfloat16, got torch.float32; convert it with .to(torch.bfloat16)"),
    (dict(bounds=BOUNDS.long()), "bounds.dtype must be torch.int32, got torch.int64; convert it with .to(torch.int32)"),
    (dict(out=GOOD["out"].T.contiguous().T), "out must be contiguous, got strides (1, 30); call .contiguous()"),
    (dict(codes=GOOD["codes"].to("meta")), "sf.device must be meta, got cpu; move it"),
    (dict(out=MISALIGNED), "out.data_ptr() must be a multiple of 16, got 2 more than one; copy it with .clone()"),
]


@pytest.mark.parametrize(("change", "message"), ERRORS, ids=[message[:30] for _, message in ERRORS])
def test_errors(launches, change, message):
    with pytest.raises(ValueError, match=f"^fp4_gemm: {re.escape(message)}$"):
        fp4_gemm.fp4_gemm(**{**GOOD, **change})
    assert not launches
