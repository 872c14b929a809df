"""fp4_gemm: source, parameters and launch of csrc/include/megamoe/kernels/fp4_gemm.cuh.

Legend: R rows of x, G groups, N weight rows, K input channels, I = N / 2.
"""

import ctypes
import functools
import math

import torch

from megamoe.errors import check
from megamoe.formats import Sm90Weight
from megamoe.kernels import devices, jit
from megamoe.kernels.codegen import emit_struct
from megamoe.kernels.driver import TensorMap
from megamoe.kernels.fp4_gemm_config import (
    BLOCK_K, MAX_TOKEN_TILE_SIZES, OP, UNIT_MAP_LINES, Fp4GemmConfig, GemmBlock, largest_workspace_bytes,
)
from megamoe.kernels.launch import Params, params_struct, tensor_map
from megamoe.kernels.wgmma_source import wgmma_e5m2_e4m3

ENTRY = "fp4_gemm"
_MAX_LAUNCHES = 4096
FLAG_BYTES = 16  # per block, at the start of a workspace (roles/tail_sums.cuh)

_u32, _f32, _pointer = ctypes.c_uint32, ctypes.c_float, ctypes.c_void_p
Grouping = params_struct("Grouping", [
    ("offsets", _pointer), ("bounds", _pointer), ("counts", _pointer), ("num_groups", _u32), ("num_rows", _u32), ("group_stride", _u32),
])
Fp4GemmParams = params_struct("Fp4GemmParams", [
    ("x_maps", TensorMap * MAX_TOKEN_TILE_SIZES), ("w_map", TensorMap), ("w_row_base", _pointer), ("x_sf", _pointer), ("out", _pointer),
    ("row_dst", _pointer), ("grouping", Grouping), ("n", _u32), ("num_row_blocks", _u32), ("num_k_blocks", _u32), ("workspace", _pointer),
    ("bias", _pointer), ("row_weight", _pointer), ("a_codes", _pointer), ("a_sf", _pointer), ("limit", _f32), ("alpha", _f32),
    ("up_bias", _f32),
])

# Parameters by everything that they are made of: allocators hand out the same addresses again and again.
_launches: dict[tuple, Params] = {}
_workspaces: dict[tuple[int, int], torch.Tensor] = {}  # by device and stream: launches that may overlap must not share one


def source(config: Fp4GemmConfig) -> str:
    """One translation unit with the kernel for `config`."""
    tiles = ", ".join(map(str, config.token_tiles))
    return "\n".join([
        "#include <megamoe/ptx/wgmma.cuh>",
        *map(wgmma_e5m2_e4m3, config.token_tiles),
        "#include <megamoe/kernels/fp4_gemm.cuh>",
        "",
        emit_struct("Constants", _constants(config)),
        f"struct Config : Constants {{ using TokenTiles = megamoe::Sizes<{tiles}>; }};",
        f"static_assert(megamoe::SmemPlan<Config>::kBytes <= {config.smem_bytes}, \"fp4_gemm_config.py and SmemPlan disagree\");",
        "",
        'extern "C" __global__ void __launch_bounds__(Config::kThreads, 1)',
        f"{ENTRY}(const __grid_constant__ megamoe::Fp4GemmParams params) {{",
        "  megamoe::fp4_gemm<Config>(params);",
        "}",
        "",
    ])


def _constants(config: Fp4GemmConfig) -> dict[str, int | bool]:
    return {**block_constants(config), "swiglu": config.epilogue == "swiglu", "accumulate": config.epilogue == "accumulate",
            "has_bias": config.has_bias, "scatter": config.scatter}


def block_constants(config: GemmBlock) -> dict[str, int | bool]:
    """The static facts of every kernel around the main loop, as csrc reads them: math_warpgroups is kMathWarpgroups."""
    return {
        "math_warpgroups": config.num_math_warpgroups, "threads": config.num_threads, "math_registers": config.math_registers,
        "aux_registers": config.aux_registers, "stages": config.num_stages, "max_groups": config.max_groups,
        "max_double_buffered": config.max_double_buffered, "loads_ahead": config.loads_ahead, "unit_map_lines": UNIT_MAP_LINES,
        "cluster_blocks": config.cluster_blocks, "thread_order": config.thread_order,
    }


def fp4_gemm(codes: torch.Tensor, sf: torch.Tensor, weight: Sm90Weight, config: Fp4GemmConfig, *, offsets: torch.Tensor | None = None,
             bounds: torch.Tensor | None = None, counts: torch.Tensor | None = None, out: torch.Tensor | None = None,
             row_dst: torch.Tensor | None = None, a_codes: torch.Tensor | None = None, a_sf: torch.Tensor | None = None,
             bias: torch.Tensor | None = None, row_weight: torch.Tensor | None = None, limit: float = math.inf, alpha: float = 1.0,
             up_bias: float = 0.0, workspace: torch.Tensor | None = None) -> None:
    """Launch the kernel on the current stream; nothing for zero rows or groups. At most one of offsets, bounds and counts; none: one group.

    Args:
        codes: [R, K] float8_e4m3fn. sf: [R] or [R, 1] uint8, one exponent per token.
        weight: [G, N, K], interleaved for the swiglu epilogue.
        config: its epilogue says which outputs are written.
        offsets: [G+1] int32. bounds: [G, 2] int32, first and one past the last row. counts: [G] int32, groups R / G rows apart. What leads
            out of x is cut off, and rows of no group leave their outputs alone.
        out: [R, N] bfloat16: store, accumulate.
        row_dst: [R] int64, in place of `out` for a config that scatters: row r goes to the N BF16 values at address row_dst[r], a multiple
            of 16, which may be the memory of another GPU. The caller vouches for the addresses.
        a_codes, a_sf: [R, I] float8_e4m3fn and [R, I/32] uint8: swiglu.
        bias: [G, N] float32 in kernel row order, given exactly with config.has_bias or swiglu. row_weight: [R] float32, multiplies the
            bias (store, accumulate) or the activated row (swiglu). limit, alpha, up_bias: as `reference.swiglu` has them; alpha = 1
            with up_bias = 0 is SiLU.
        workspace: `allocate_workspace(device)`, for launches that follow each other, whatever their configs. None: one per stream.

    Raises:
        ValueError: an operand does not fit.

    Sync: stream-ordered, no host sync; capture-safe once the kernel is loaded.
    """
    tensors = (codes, sf, offsets, bounds, counts, out, row_dst, a_codes, a_sf, bias, row_weight)
    if not codes.shape[0] or not weight.shape[0]:
        return
    device = codes.device.index
    kernel = jit.build(OP, config, lambda: source(config), ENTRY, device)
    stream = devices.stream(device)
    if workspace is None:
        workspace = _workspace(device, stream, config.workspace_bytes(num_sms(device)))
    key = (kernel, workspace.data_ptr(), weight.storage_key, limit, alpha, up_bias,
           *[t if t is None else (t.data_ptr(), t.shape, t.dtype) for t in tensors])
    params = _launches.get(key)
    if params is None:
        _check(weight, config, *tensors)
        if len(_launches) >= _MAX_LAUNCHES:
            _launches.clear()
        params = _launches[key] = _params(weight, config, workspace, limit, alpha, up_bias, *tensors)
    # Always all SMs: blocks without a tile of their own take part of the last ones, and the flags in a workspace lie where the grid says.
    kernel.launch(num_sms(device), config.num_threads, config.smem_bytes, params, stream)


def _workspace(device: int, stream: int, num_bytes: int) -> torch.Tensor:
    """Where blocks exchange the sums of tiles that are cut along K, at least `num_bytes`, its flags zeroed. About 12 MB per stream."""
    is_capturing = torch.cuda.is_current_stream_capturing()
    found = None if is_capturing else _workspaces.get((device, stream))
    if found is None or found.nbytes < num_bytes:
        found = allocate_workspace(device, num_bytes)
        # A graph has its own, which every replay zeroes: it may run beside the stream it was captured on.
        if not is_capturing:
            _workspaces[device, stream] = found
    return found


def allocate_workspace(device: int, num_bytes: int | None = None) -> torch.Tensor:
    """A workspace of `num_bytes`, None: enough for every config, with its flags zeroed."""
    blocks = num_sms(device)
    num_bytes = largest_workspace_bytes(blocks) if num_bytes is None else num_bytes
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", device))
    workspace[: FLAG_BYTES * blocks] = 0
    return workspace


def _params(weight, config, workspace, limit, alpha, up_bias, codes, sf, offsets, bounds, counts, out, row_dst, a_codes, a_sf, bias,
            row_weight) -> Params:
    num_rows, num_groups = codes.shape[0], weight.shape[0]
    grouping = Grouping(_address(offsets), _address(bounds), _address(counts), num_groups=num_groups, num_rows=num_rows,
                        group_stride=num_rows // num_groups)
    return gemm_params(codes, weight, config, grouping, x_sf=sf, out=out, row_dst=row_dst, workspace=workspace, bias=bias,
                       row_weight=row_weight, a_codes=a_codes, a_sf=a_sf, limit=limit, alpha=alpha, up_bias=up_bias)


def gemm_params(x: torch.Tensor, weight: Sm90Weight, config: GemmBlock, grouping: Grouping,
                **operands: torch.Tensor | float | None) -> Params:
    """The parameter block for tokens x [R, K] and a weight. `operands`: other members, a tensor for its address."""
    num_groups, num_row_blocks, num_k_blocks, _ = weight.blocks.shape
    values = {name: value.data_ptr() if isinstance(value, torch.Tensor) else value for name, value in operands.items()}
    params = Fp4GemmParams.allocate(w_row_base=_address(weight.row_base), grouping=grouping,
                                    n=weight.shape[1], num_row_blocks=num_row_blocks, num_k_blocks=num_k_blocks, **values)
    boxes = [part for tokens in config.token_tiles for part in config.token_parts(tokens)]
    for i, tokens in enumerate(boxes):
        params.x_maps[i] = tensor_map(x, (tokens, BLOCK_K), swizzle_bytes=128, l2_bytes=256)
    # Units as UNIT_MAP_LINES lines of 8-byte words.
    units = weight.blocks.view(torch.int64).view(num_groups, num_row_blocks, num_k_blocks * UNIT_MAP_LINES, -1)
    params.w_map = tensor_map(units, (1, config.num_math_warpgroups, UNIT_MAP_LINES, units.shape[-1]))
    return params


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def num_sms(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(weight, config, codes, sf, offsets, bounds, counts, out, row_dst, a_codes, a_sf, bias, row_weight) -> None:
    """Raise ValueError unless every operand is what the kernel assumes."""
    blocks, row_base = weight.blocks, weight.row_base
    num_rows, (num_groups, n, k) = codes.shape[0], weight.shape
    is_swiglu = config.epilogue == "swiglu"
    groupings = [name for name, value in (("offsets", offsets), ("bounds", bounds), ("counts", counts)) if value is not None]
    has_one = len(groupings) == 1 or (num_groups == 1 and not groupings)
    check(has_one, OP, "grouping", "one of offsets, bounds and counts, or none for one group", groupings or None, "pass one of them")
    holds_groups = config.max_groups >= num_groups
    check(holds_groups, OP, "config.max_groups", f"at least {num_groups}", config.max_groups, "round G up to a power of two")
    check(weight.interleaved == is_swiglu, OP, "weight.interleaved", is_swiglu, weight.interleaved, "pack the weight for this epilogue")
    check(not weight.thread_order, OP, "weight.thread_order", False, True, "pack the weight in natural order")
    fits_bias = is_swiglu or config.has_bias == (bias is not None)
    check(fits_bias, OP, "bias", "given" if config.has_bias else "None", None if bias is None else "a tensor", "see config.has_bias")
    step = 64 if is_swiglu else 32
    check(n % step == 0, OP, "N", f"a multiple of {step}", n, "pad the weight with zeros")
    i32, f32, u8, e4m3 = torch.int32, torch.float32, torch.uint8, torch.float8_e4m3fn
    unit_shape = [num_groups, -(-n // 64), -(-k // BLOCK_K)]
    wanted = (
        ("codes", codes, [num_rows, k], e4m3, True), ("sf", sf, [num_rows], u8, True),
        ("weight.blocks", blocks, [*unit_shape, blocks.shape[-1]], u8, True),
        ("weight.row_base", row_base, [num_groups, 64 * unit_shape[1]], u8, True),
        ("offsets", offsets, [num_groups + 1], i32, False), ("bounds", bounds, [num_groups, 2], i32, False),
        ("counts", counts, [num_groups], i32, False), ("out", out, [num_rows, n], torch.bfloat16, not is_swiglu and not config.scatter),
        ("row_dst", row_dst, [num_rows], torch.int64, config.scatter),
        ("a_codes", a_codes, [num_rows, n // 2], e4m3, is_swiglu), ("a_sf", a_sf, [num_rows, n // 64], u8, is_swiglu),
        ("bias", bias, [num_groups, n], f32, False), ("row_weight", row_weight, [num_rows], f32, False),
    )
    for name, tensor, shape, dtype, is_needed in wanted:
        if tensor is None:
            check(not is_needed, OP, name, f"given for epilogue {config.epilogue!r}", None, "pass it")
            continue
        got = list(tensor.squeeze(-1).shape if name == "sf" and tensor.dim() == 2 else tensor.shape)
        check(tensor.device == codes.device, OP, f"{name}.device", codes.device, tensor.device, "move it")
        check(got == shape, OP, f"{name}.shape", shape, got, "sizes must agree with the weight and the tokens")
        check(tensor.dtype == dtype, OP, f"{name}.dtype", dtype, tensor.dtype, f"convert it with .to({dtype})")
        check(tensor.is_contiguous(), OP, name, "contiguous", f"strides {tensor.stride()}", "call .contiguous()")
    for name, tensor in (("codes", codes), ("weight.blocks", blocks), ("out", out), ("a_codes", a_codes)):
        offset = 0 if tensor is None else tensor.data_ptr() % 16
        check(offset == 0, OP, f"{name}.data_ptr()", "a multiple of 16", f"{offset} more than one", "copy it with .clone()")
