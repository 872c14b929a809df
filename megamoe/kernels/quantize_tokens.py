"""megamoe.quantize_tokens: formats.quantize_tokens with a kernel behind it, csrc/include/megamoe/kernels/quantize_tokens.cuh.

Legend: M tokens, K channels.
"""

import ctypes

import torch

from megamoe import formats
from megamoe.formats import QuantizedTokens
from megamoe.formats.tokens import num_groups
from megamoe.kernels import devices, jit
from megamoe.kernels.launch import params_struct
from megamoe.kernels.library import FLOATS, TOKEN_GROUPS, register

OP = "quantize_tokens"
CPP_TYPES = {torch.bfloat16: "megamoe::Bf16", torch.float32: "float"}
WHOLE_TOKEN = 0  # group "token" in a config
CHANNELS = 32  # a row is a multiple of these
VECTOR = 8  # channels of one load
VECTORS_PER_THREAD = 4
THREADS = 256
# Per SM: what the registers allow. Without a number the compiler sinks loads to their uses, to fit more blocks than the loads in flight
# need. swiglu_quantize with group 32, 8192 rows: 33.9 us with four, 35.8 with three (H200, 420cbcf).
MIN_BLOCKS, MIN_BLOCKS_WHOLE_TOKEN = 4, 3

_u32, _pointer = ctypes.c_uint32, ctypes.c_void_p
QuantizedRows = params_struct("QuantizedRows", [("codes", _pointer), ("sf", _pointer), ("num_rows", _u32), ("num_channels", _u32)])
QuantizeTokensParams = params_struct("QuantizeTokensParams", [("x", _pointer), ("out", QuantizedRows)])


def config(dtype: torch.dtype, group: int | str) -> tuple[str, int]:
    """(C++ type of the input, channels per scale) of a kernel."""
    return CPP_TYPES[dtype], WHOLE_TOKEN if group == "token" else group


def source(op: str, params: str, config: tuple[str, int]) -> str:
    """One translation unit with the kernel `op`, of this file or of swiglu_quantize.py."""
    bounds = f"__launch_bounds__({THREADS}, {MIN_BLOCKS_WHOLE_TOKEN if config[1] == WHOLE_TOKEN else MIN_BLOCKS})"
    return "\n".join([
        f"#include <megamoe/kernels/{op}.cuh>",
        f'extern "C" __global__ void {bounds} {op}(const __grid_constant__ megamoe::{params} params) {{',
        f"  megamoe::{op}<{config[0]}, {config[1]}>(params);",
        "}",
        "",
    ])


def quantize_tokens(x: torch.Tensor, group: int | str = 32) -> QuantizedTokens:
    """Quantise tokens to E4M3, each group with the smallest power-of-two scale that keeps it below 448.

    The bytes are those of `formats.quantize_tokens`, on every device; NaN and Inf channels become NaN and leave the others as they are.

    Args:
        x: [..., K] bfloat16, float16 or float32. The kernel takes BF16 and FP32 with K a multiple of 32 and no gradient.
        group: channels per scale: 32, 64, 96, 128 or "token"; the kernel takes 32, 128 and "token".

    Returns:
        QuantizedTokens; scale = 2^ceil(log2(max(amax, 1e-4) / 448)), codes rounded to nearest even.

    Raises:
        ValueError: `group` is none of these.

    Sync: stream-ordered, no host sync. CUDA-graph safe once the kernel is loaded.
    """
    num_channels = x.shape[-1]
    is_kernel_input = x.dtype in FLOATS and group in TOKEN_GROUPS and num_channels > 0 and num_channels % CHANNELS == 0
    if not is_kernel_input or x.requires_grad and torch.is_grad_enabled():
        return formats.quantize_tokens(x, group)
    out = empty_tokens(x, x.shape, group)
    torch.ops.megamoe.quantize_tokens(x, num_channels if group == "token" else group, out.codes, out.sf)
    return out


def empty_tokens(like: torch.Tensor, shape: torch.Size, group: int | str) -> QuantizedTokens:
    """QuantizedTokens of `shape` on the device of `like`, undefined."""
    sf_shape = (*shape[:-1], num_groups(shape[-1], group))
    return QuantizedTokens(like.new_empty(shape, dtype=torch.float8_e4m3fn), like.new_empty(sf_shape, dtype=torch.uint8), group)


def launch_quantize_tokens(x: torch.Tensor, group: int | str, out: QuantizedTokens | None = None) -> QuantizedTokens:
    """Run the kernel.

    Args:
        x: [..., K] BF16 or FP32 on the current device, a Hopper; K a multiple of 32. Copied unless contiguous at a multiple of 16 bytes.
        group: 32, 128 or "token".
        out: takes the result; None: new tokens.

    Sync: stream-ordered.
    """
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    out = empty_tokens(x, x.shape, group) if out is None else out
    if x.numel():
        params = QuantizeTokensParams.allocate(x=x.data_ptr(), out=quantized_rows(out))
        launch(OP, "QuantizeTokensParams", config(x.dtype, group), params, out)
    return out


def quantized_rows(out: QuantizedTokens) -> QuantizedRows:
    num_channels = out.shape[-1]
    return QuantizedRows(out.codes.data_ptr(), out.sf.data_ptr(), out.codes.numel() // num_channels, num_channels)


def launch(op: str, params_name: str, config: tuple[str, int], params: ctypes.Structure, out: QuantizedTokens) -> None:
    """Launch a kernel that writes `out`: one block per row for group "token", else one warp per row and 1024 channels."""
    device, num_vectors = out.device.index, out.shape[-1] // VECTOR
    num_rows = out.codes.numel() // out.shape[-1]
    if config[1] == WHOLE_TOKEN:
        warps_per_row = -(-num_vectors // (32 * VECTORS_PER_THREAD))
        grid, block = num_rows, min(THREADS, 32 * warps_per_row)
    else:
        num_warps = num_rows * -(-num_vectors // (32 * VECTORS_PER_THREAD))
        grid, block = -(-num_warps // (THREADS // 32)), THREADS
    kernel = jit.build(op, config, lambda: source(op, params_name, config), op, device)
    kernel.launch(grid, block, 0, params, devices.stream(device))


def _launch_op(x, channels_per_sf, codes, sf) -> None:
    group = "token" if channels_per_sf == x.shape[-1] else channels_per_sf
    out = QuantizedTokens(codes, sf, group)
    if not devices.runs_kernel(x.device):
        copy_tokens(out, formats.quantize_tokens(x, group))
        return
    with devices.current(x.device.index):
        launch_quantize_tokens(x, group, out)


def copy_tokens(out: QuantizedTokens, tokens: QuantizedTokens) -> None:
    out.codes.copy_(tokens.codes)
    out.sf.copy_(tokens.sf)


register("quantize_tokens(Tensor x, int channels_per_sf, Tensor(a!) codes, Tensor(b!) sf) -> ()", _launch_op)
