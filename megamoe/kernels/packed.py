"""What the public ops do with an Sm90Weight: run fp4_gemm where the GPU is a Hopper, else prepare the operands of the plain-torch twin.

Legend: R rows of x over all groups, G groups, N weight rows, K input channels.
"""

import functools

import torch

from megamoe.errors import check
from megamoe.formats import FP4Weight, QuantizedTokens, Sm90Weight, quantize_tokens
from megamoe.kernels import device_errors, devices
from megamoe.kernels.devices import runs_kernel as runs_kernel
from megamoe.kernels.fold_tokens import fold_tokens
from megamoe.kernels.fp4_gemm import fp4_gemm, num_sms
from megamoe.kernels.quantize_tokens import launch_quantize_tokens
from megamoe.kernels.row_bounds import group_bounds, row_bounds
from megamoe.kernels.tuning.sm90 import choose_fp4_gemm
from megamoe.reference.fold_tokens import fold_tokens as fold_tokens_twin
from megamoe.reference.gemm import Tokens


def is_packed(w: torch.Tensor) -> bool:
    """Whether `w` is the blocks of an Sm90Weight among the tensors that an op takes as weights."""
    return w.dim() == 4


def twin_operands(x: Tokens, w: Sm90Weight) -> tuple[QuantizedTokens, FP4Weight]:
    """What the twin multiplies in place of the kernel: tokens with one exponent each, and the canonical weight."""
    return (fold_tokens_twin(x) if isinstance(x, QuantizedTokens) else quantize_tokens(x, group="token")), w.unpack()


def multiply(
    op: str,
    x: Tokens,
    w: Sm90Weight,
    epilogue: str,
    *,
    expert_idx: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    num_rows: torch.Tensor | None = None,
    rows_hint: int | None = None,
    out: torch.Tensor | None = None,
    act: QuantizedTokens | None = None,
    bias: torch.Tensor | None = None,
    **gate: object,
) -> None:
    """Run fp4_gemm on checked operands of a public op. No grouping: one group of all rows.

    Args:
        op: named in errors that the device reports.
        x: [R, K] or [G, R / G, K].
        expert_idx, offsets, num_rows, rows_hint: as in `grouped_gemm`; their values are checked on the device.
        out: [..., N] bfloat16, for the epilogues store and accumulate. act: [..., N / 2] with group 32, for swiglu.
        bias: [G, N] BF16 or FP32, for swiglu FP32 in kernel row order. gate: row_weight, limit, alpha, up_bias of `fp4_gemm`.

    Raises:
        ValueError: an earlier op of the device was given a grouping that is out of range; or an operand is misaligned.

    Sync: stream-ordered, no host sync.
    """
    device, (num_groups, n, k) = w.device.index, w.shape
    outputs = {"out": out} if act is None else {"a_codes": act.codes, "a_sf": act.sf}
    outputs = {name: tensor.flatten(0, -2) for name, tensor in outputs.items()}
    for name, tensor in outputs.items():  # before row_bounds, which clears rows of it
        offset = tensor.data_ptr() % 16 if name != "a_sf" else 0
        check(offset == 0, op, f"{name}.data_ptr()", "a multiple of 16", f"{offset} more than one", "copy it with .clone()")
    with devices.current(device):
        device_errors.raise_pending(device)
        rows, scales = (out, None) if act is None else (act.codes, act.sf)
        x = _flat(x)
        if not x.shape[0] or not num_groups:
            if epilogue != "accumulate":
                rows.zero_()
            if scales is not None:
                scales.fill_(_scale_of_zeros())
            return
        if expert_idx is not None:
            fill = {} if epilogue == "accumulate" else {"rows": rows, "scales": scales, "scale": _scale_of_zeros()}
            bounds = row_bounds(op, expert_idx, num_groups, **fill)
        else:
            is_grouped = offsets is not None or num_rows is not None
            bounds = group_bounds(op, num_rows=x.shape[0], offsets=offsets, counts=num_rows) if is_grouped else None
        tokens = _with_one_exponent(x, bounds if num_rows is not None else None)
        config = choose_fp4_gemm(n, k, num_groups, x.shape[0], rows_hint, epilogue, num_sms(device))
        if epilogue != "swiglu" and bias is not None:
            config, bias = config.with_output(has_bias=True), bias.float().view(num_groups, n)
        fp4_gemm(tokens.codes, tokens.sf, w, config, bounds=bounds, bias=bias, **outputs, **gate)


def _flat(x: Tokens) -> Tokens:
    if isinstance(x, torch.Tensor):
        return x.flatten(0, -2)
    return x if x.codes.dim() == 2 else QuantizedTokens(x.codes.flatten(0, -2), x.sf.flatten(0, -2), x.group)


def _with_one_exponent(x: Tokens, bounds: torch.Tensor | None) -> QuantizedTokens:
    """x [R, K] with one scale per token. With `bounds`, rows that no group has may be left out."""
    return launch_quantize_tokens(x, "token") if isinstance(x, torch.Tensor) else fold_tokens(x, bounds)


@functools.cache
def _scale_of_zeros() -> int:
    """The scale byte that the quantiser gives a group of zeros."""
    return quantize_tokens(torch.zeros(1, 32)).sf.item()
