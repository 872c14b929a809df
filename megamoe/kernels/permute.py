"""megamoe.permute_tokens and unpermute_tokens: token order <-> expert order. Kernels on Hopper, else their plain-torch twins.

Legend: T tokens, K top-k slots, M source rows, R rows in expert order, H hidden.
"""

import ctypes

import torch

from megamoe.errors import check
from megamoe.kernels import device_errors, devices, jit
from megamoe.kernels.device_errors import DeviceErrors
from megamoe.kernels.launch import params_struct
from megamoe.kernels.library import INDICES, Operands, register
from megamoe.kernels.row_bounds import Indices
from megamoe.reference import permute as reference

PERMUTE, UNPERMUTE = "permute_tokens", "unpermute_tokens"
ROW_DTYPES = (torch.bfloat16, torch.float8_e4m3fn, torch.uint8)
# Bytes of a load -> its type. A kernel uses the widest that rows and addresses are multiples of.
VECTORS = {16: "uint4", 8: "uint2", 4: "megamoe::uint32", 2: "megamoe::uint16", 1: "megamoe::uint8"}
THREADS = 256
MIN_BLOCKS = 3  # per SM; without it the compiler sinks loads to their uses, to fit more blocks than the loads in flight need
_PERMUTE_VECTORS = 4 * 32  # of a warp
_UNPERMUTE_CHANNELS = 2 * 8 * 32

_u32, _pointer = ctypes.c_uint32, ctypes.c_void_p
PermuteTokensParams = params_struct("PermuteTokensParams", [
    ("rows", _pointer), ("out", _pointer), ("index", Indices), ("errors", DeviceErrors),
    ("num_rows", _u32), ("num_out", _u32), ("row_bytes", _u32),
])
UnpermuteTokensParams = params_struct("UnpermuteTokensParams", [
    ("rows", _pointer), ("out", _pointer), ("index", Indices), ("weights", _pointer), ("errors", DeviceErrors),
    ("num_rows", _u32), ("num_tokens", _u32), ("num_topk", _u32), ("num_channels", _u32),
])


def permute_source(vector_bytes: int) -> str:
    """One translation unit with permute_tokens for loads of `vector_bytes`."""
    return _source("permute", "PermuteTokensParams", f"{PERMUTE}<{VECTORS[vector_bytes]}>", PERMUTE)


def unpermute_source() -> str:
    """One translation unit with unpermute_tokens."""
    return _source("unpermute", "UnpermuteTokensParams", UNPERMUTE, UNPERMUTE)


def _source(header: str, params: str, function: str, entry: str) -> str:
    bounds = f"__launch_bounds__({THREADS}, {MIN_BLOCKS})"
    return "\n".join([
        f"#include <megamoe/kernels/{header}.cuh>",
        f'extern "C" __global__ void {bounds} {entry}(const __grid_constant__ megamoe::{params} params) {{',
        f"  megamoe::{function}(params);",
        "}",
        "",
    ])


def permute_tokens(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather rows[index], e.g. tokens or their scales into the order of the experts.

    Args:
        rows: [M, H] bfloat16, float8_e4m3fn or uint8.
        index: [R] int32 or int64 in [-1, M); -1 gives a row of zeros.

    Returns:
        [R, H] like rows.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, is not contiguous or requires grad; or an index is out of range (the
            kernel finds that later: see Sync).

    Sync: on Hopper stream-ordered, no host sync, CUDA-graph safe once the kernel is loaded; an index out of range gives a row of zeros and
    raises at the next op or in `megamoe.check`. Otherwise reads the index on the host.
    """
    operands = Operands(PERMUTE)
    operands.tensor("rows", rows, "M H", ROW_DTYPES)
    operands.tensor("index", index, "R", INDICES)
    out = rows.new_empty(len(index), rows.shape[1])
    torch.ops.megamoe.permute_tokens(rows, index, out)
    return out


def unpermute_tokens(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum the rows of every token's slots: y[t] = sum of weights[t, k] * rows[index[t, k]] over k in order, in FP32, rounded once.

    Args:
        rows: [R, H] bfloat16, H a multiple of 8.
        index: [T, K] int32 or int64 in [-1, R); -1 skips the slot.
        weights: [T, K] float32; None: ones.

    Returns:
        [T, H] bfloat16, the same bits on every device and in every run (a NaN may differ in its payload).

    Raises:
        ValueError: as `permute_tokens` does.

    Sync: as `permute_tokens`; a slot whose index is out of range is skipped.
    """
    operands = Operands(UNPERMUTE)
    operands.tensor("rows", rows, "R H", (torch.bfloat16,))
    operands.tensor("index", index, "T K", INDICES)
    operands.optional("weights", weights, "T K", (torch.float32,))
    check(rows.shape[1] % 8 == 0, UNPERMUTE, "H", "a multiple of 8", rows.shape[1], "pad the rows with zeros")
    out = rows.new_empty(len(index), rows.shape[1])
    torch.ops.megamoe.unpermute_tokens(rows, index, weights, out)
    return out


def _permute(rows, index, out) -> None:
    if not devices.runs_kernel(rows.device):
        _check_index(PERMUTE, "index", index, len(rows), "M", "-1 gives a row of zeros")
        out.copy_(reference.permute_tokens(rows, index))
        return
    device, row_bytes = rows.device.index, rows.shape[1] * rows.element_size()
    with devices.current(device):
        device_errors.raise_pending(device)
        if not out.numel():
            return
        vector_bytes = next(size for size in VECTORS if not (row_bytes | rows.data_ptr() | out.data_ptr()) % size)
        params = PermuteTokensParams.allocate(
            rows=rows.data_ptr(), out=out.data_ptr(), index=Indices(index.data_ptr(), index.dtype == torch.int64),
            errors=device_errors.target(PERMUTE, device), num_rows=len(rows), num_out=len(out), row_bytes=row_bytes)
        num_warps = len(out) * -(-row_bytes // (vector_bytes * _PERMUTE_VECTORS))
        kernel = jit.build(PERMUTE, vector_bytes, lambda: permute_source(vector_bytes), PERMUTE, device)
        kernel.launch(-(-num_warps // (THREADS // 32)), THREADS, 0, params, devices.stream(device))


def _unpermute(rows, index, weights, out) -> None:
    if not devices.runs_kernel(rows.device):
        _check_index(UNPERMUTE, "index.flatten()", index.flatten(), len(rows), "R", "-1 skips a slot")
        out.copy_(reference.unpermute_tokens(rows, index, weights))
        return
    device, offset = rows.device.index, rows.data_ptr() % 16
    check(offset == 0, UNPERMUTE, "rows.data_ptr()", "a multiple of 16", f"{offset} more than one", "copy it with .clone()")
    with devices.current(device):
        device_errors.raise_pending(device)
        if not out.numel():
            return
        params = UnpermuteTokensParams.allocate(
            rows=rows.data_ptr(), out=out.data_ptr(), index=Indices(index.data_ptr(), index.dtype == torch.int64),
            weights=0 if weights is None else weights.data_ptr(), errors=device_errors.target(UNPERMUTE, device),
            num_rows=len(rows), num_tokens=len(out), num_topk=index.shape[1], num_channels=rows.shape[1])
        num_warps = len(out) * -(-rows.shape[1] // _UNPERMUTE_CHANNELS)
        kernel = jit.build(UNPERMUTE, None, unpermute_source, UNPERMUTE, device)
        kernel.launch(-(-num_warps // (THREADS // 32)), THREADS, 0, params, devices.stream(device))


def _check_index(op: str, what: str, index: torch.Tensor, num_rows: int, size: str, fix: str) -> None:
    """Raise the ValueError that the kernel reports later. Sync: reads the index on the host."""
    wrong = torch.where((index < -1) | (index >= num_rows))[0].tolist()
    if wrong:
        check(False, op, f"{what}[{wrong[0]}]", f"in [-1, {size})", index[wrong[0]].item(), fix)


register("permute_tokens(Tensor rows, Tensor index, Tensor(a!) out) -> ()", _permute)
register("unpermute_tokens(Tensor rows, Tensor index, Tensor? weights, Tensor(a!) out) -> ()", _unpermute)
