"""fold_tokens: source and launch of csrc/include/megamoe/kernels/fold_tokens.cuh. A scale per group of channels -> one per token."""

import ctypes

import torch

from megamoe.errors import check
from megamoe.formats import QuantizedTokens
from megamoe.kernels import devices, jit
from megamoe.kernels.fp4_gemm import num_sms
from megamoe.kernels.launch import params_struct

OP = "fold_tokens"
ENTRY = "fold_tokens"
_WARPS = 8
_BLOCKS_PER_SM = 8

_u32, _pointer = ctypes.c_uint32, ctypes.c_void_p
FoldTokensParams = params_struct("FoldTokensParams", [
    ("codes", _pointer), ("sf", _pointer), ("folded", _pointer), ("token_sf", _pointer), ("bounds", _pointer),
    ("num_rows", _u32), ("num_channels", _u32), ("num_sf", _u32), ("channels_per_sf", _u32), ("group_stride", _u32),
])


def source() -> str:
    """One translation unit with the kernel."""
    return "\n".join([
        "#include <megamoe/kernels/fold_tokens.cuh>",
        f'extern "C" __global__ void __launch_bounds__({32 * _WARPS}) {ENTRY}(const __grid_constant__ megamoe::FoldTokensParams params) {{',
        "  megamoe::fold_tokens(params);",
        "}",
        "",
    ])


def fold_tokens(x: QuantizedTokens, bounds: torch.Tensor | None = None, out: QuantizedTokens | None = None) -> QuantizedTokens:
    """Give each token one scale, the largest of its groups; codes are shifted, rounded to nearest even.

    Args:
        x: [R, K] contiguous on a CUDA device with group 32, 64, 96 or 128, K a multiple of 16; group "token" is returned as it is.
        bounds: [G, 2] int32 from `group_bounds` for rows in groups of R / G: only rows inside are folded, the others are undefined.
        out: of x's shape with group "token", written and returned; its codes may be those of x. None: new tensors.

    Returns:
        QuantizedTokens with group "token". Values change by bits below 2^-9 of the token's scale only; NaN stays NaN.

    Sync: stream-ordered.
    """
    if x.group == "token":
        return x
    num_rows, num_channels = x.shape
    is_aligned = x.codes.data_ptr() % 16 == 0 and num_channels % 16 == 0
    check(is_aligned, OP, "rows of codes", "at multiples of 16 bytes", [x.codes.data_ptr() % 16, num_channels], "copy them with .clone()")
    if out is None:
        out = QuantizedTokens(torch.empty_like(x.codes), x.sf.new_empty(num_rows, 1), "token")
    check(out.shape == x.shape and out.group == "token", OP, "out", f"{list(x.shape)} with group 'token'",
          f"{list(out.shape)} with group {out.group!r}", "allocate it as x")
    if num_rows:
        device = x.device.index
        params = FoldTokensParams.allocate(
            codes=x.codes.data_ptr(), sf=x.sf.data_ptr(), folded=out.codes.data_ptr(), token_sf=out.sf.data_ptr(),
            bounds=0 if bounds is None else bounds.data_ptr(), num_rows=num_rows, num_channels=num_channels, num_sf=x.sf.shape[1],
            channels_per_sf=x.group, group_stride=0 if bounds is None else num_rows // len(bounds))
        kernel = jit.build(OP, None, source, ENTRY, device)
        grid = min(-(-num_rows // _WARPS), _BLOCKS_PER_SM * num_sms(device))
        kernel.launch(grid, 32 * _WARPS, 0, params, devices.stream(device))
    return out
