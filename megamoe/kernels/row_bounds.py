"""row_bounds, group_bounds: launch of csrc/include/megamoe/kernels/row_bounds.cuh. The caller's grouping -> [G, 2] int32 on the device.

Legend: M rows, G groups.
"""

import ctypes

import torch

from megamoe.kernels import device_errors, devices, jit
from megamoe.kernels.device_errors import DeviceErrors
from megamoe.kernels.launch import params_struct

ROWS_PER_BLOCK = 32
_THREADS = {"row_bounds": 128, "group_bounds": 256}

_u32, _pointer = ctypes.c_uint32, ctypes.c_void_p
Indices = params_struct("Indices", [("values", _pointer), ("is_wide", _u32)])
PaddingFill = params_struct("PaddingFill", [
    ("rows", _pointer), ("scales", _pointer), ("row_bytes", ctypes.c_uint64), ("scale_bytes", _u32), ("scale", _u32),
])
RowBoundsParams = params_struct("RowBoundsParams", [
    ("expert_idx", Indices), ("bounds", _pointer), ("fill", PaddingFill), ("errors", DeviceErrors),
    ("num_rows", _u32), ("num_groups", _u32),
])
GroupBoundsParams = params_struct("GroupBoundsParams", [
    ("values", Indices), ("bounds", _pointer), ("errors", DeviceErrors), ("num_rows", _u32), ("num_groups", _u32), ("group_stride", _u32),
])


def source(name: str) -> str:
    """One translation unit with the kernel `name`: "row_bounds" or "group_bounds"."""
    params = "RowBoundsParams" if name == "row_bounds" else "GroupBoundsParams"
    return "\n".join([
        "#include <megamoe/kernels/row_bounds.cuh>",
        f'extern "C" __global__ void __launch_bounds__({_THREADS[name]}) {name}(const __grid_constant__ megamoe::{params} params) {{',
        f"  megamoe::{name}(params);",
        "}",
        "",
    ])


def row_bounds(op: str, expert_idx: torch.Tensor, num_groups: int, *, rows: torch.Tensor | None = None, scales: torch.Tensor | None = None,
               scale: int = 0) -> torch.Tensor:
    """The bounds of groups whose rows lie together, from the group of each row; clears the output rows of padding rows.

    Args:
        op: named in errors, one of device_errors.OPS.
        expert_idx: [M] int32 or int64, -1 for padding.
        num_groups: G.
        rows: [M, ...] of which the rows of padding are cleared; a row is a multiple of 16 bytes.
        scales: [M, S] uint8 of which the rows of padding are set to `scale`.

    Returns:
        [G, 2] int32; (-1, -1) for a group without rows.

    Sync: stream-ordered. An index out of [-1, G) or rows of a group that lie apart are reported to device_errors.
    """
    device = expert_idx.device.index
    bounds = torch.full((num_groups, 2), -1, dtype=torch.int32, device=expert_idx.device)
    fill = PaddingFill()
    if rows is not None:
        fill.rows, fill.row_bytes = rows.data_ptr(), rows[0].nbytes
    if scales is not None:
        fill.scales, fill.scale_bytes, fill.scale = scales.data_ptr(), scales.shape[1], scale
    params = RowBoundsParams.allocate(expert_idx=_indices(expert_idx), bounds=bounds.data_ptr(), fill=fill,
                                      errors=device_errors.target(op, device), num_rows=len(expert_idx), num_groups=num_groups)
    _launch("row_bounds", -(-len(expert_idx) // ROWS_PER_BLOCK), params, device)
    return bounds


def group_bounds(op: str, *, num_rows: int, offsets: torch.Tensor | None = None, counts: torch.Tensor | None = None) -> torch.Tensor:
    """The bounds of groups from offsets [G+1], or from counts [G] of groups that begin `num_rows` / G rows apart; int32 or int64.

    Returns:
        [G, 2] int32, in range whatever the values are.

    Sync: stream-ordered. Offsets that decrease or leave 0..num_rows and counts out of range are reported to device_errors.
    """
    values = counts if offsets is None else offsets
    num_groups = len(values) - (offsets is not None)
    stride = 0 if counts is None else num_rows // num_groups
    device = values.device.index
    bounds = torch.empty(num_groups, 2, dtype=torch.int32, device=values.device)
    params = GroupBoundsParams.allocate(values=_indices(values), bounds=bounds.data_ptr(), errors=device_errors.target(op, device),
                                        num_rows=num_rows, num_groups=num_groups, group_stride=stride)
    _launch("group_bounds", 1, params, device)
    return bounds


def _indices(values: torch.Tensor) -> Indices:
    return Indices(values.data_ptr(), is_wide=values.dtype == torch.int64)


def _launch(name: str, grid: int, params: ctypes.Structure, device: int) -> None:
    kernel = jit.build(name, None, lambda: source(name), name, device)
    kernel.launch(grid, _THREADS[name], 0, params, devices.stream(device))
