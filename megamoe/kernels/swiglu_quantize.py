"""megamoe.swiglu_quantize: the gated activation of an expert, quantised. A kernel on Hopper, else its plain-torch twin.

Legend: M rows, I channels after the gate.
"""

import ctypes
import math

import torch

from megamoe.errors import check
from megamoe.formats import QuantizedTokens
from megamoe.kernels import devices
from megamoe.kernels.launch import params_struct
from megamoe.kernels.library import FLOATS, TOKEN_GROUPS, Operands, register
from megamoe.kernels.quantize_tokens import CHANNELS, QuantizedRows, config, copy_tokens, empty_tokens, launch, quantized_rows
from megamoe.reference import swiglu_quantize as reference

OP = "swiglu_quantize"
PARAMS = "SwigluQuantizeParams"

_float, _pointer = ctypes.c_float, ctypes.c_void_p
SwigluQuantizeParams = params_struct(PARAMS, [
    ("gate_up", _pointer), ("row_weight", _pointer), ("out", QuantizedRows), ("limit", _float), ("alpha", _float), ("up_bias", _float),
])


def swiglu_quantize(
    gate_up: torch.Tensor,
    *,
    row_weight: torch.Tensor | None = None,
    limit: float | None = None,
    alpha: float | None = None,
    up_bias: float = 0.0,
    group: int | str = 32,
) -> QuantizedTokens:
    """Gate, weight and quantise rows: what comes between the two linears of an expert.

    Args:
        gate_up: [M, 2I] BF16 or FP32, the I gate channels first; I a multiple of 32. Computed in FP32.
        row_weight: [M] FP32, multiplies the activated row, e.g. the top-k weight of its slot.
        limit: c in gate <= c, -c <= up <= c; NaN passes through the clamp. None: no clamp.
        alpha, up_bias: None and 0: silu(gate) * up. Otherwise gate * sigmoid(alpha * gate) * (up + up_bias).
        group: channels per scale: 32, 128 or "token".

    Returns:
        QuantizedTokens [M, I], as `quantize_tokens` gives it. The kernel's exponential is accurate to some 1e-6, so next to a rounding
        boundary its codes differ from the twin's by one step.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, is not contiguous or requires grad; limit is not positive, up_bias is
            given without alpha, or the group is none of these.

    Sync: stream-ordered, no host sync. CUDA-graph safe once the kernel is loaded.
    """
    operands = Operands(OP)
    operands.tensor("gate_up", gate_up, "M 2I", FLOATS)
    width = operands.sizes["2I"]
    check(width > 0 and width % (2 * CHANNELS) == 0, OP, "2I", f"a positive multiple of {2 * CHANNELS}", width, "pad I with zeros")
    operands.optional("row_weight", row_weight, "M", (torch.float32,))
    check(limit is None or limit > 0, OP, "limit", "positive or None", limit, "None does not clamp")
    check(alpha is not None or up_bias == 0, OP, "up_bias", "0 without alpha", up_bias, "pass alpha too")
    check(group in TOKEN_GROUPS, OP, "group", f"one of {TOKEN_GROUPS}", repr(group), "pick one of them")
    num_channels = width // 2
    out = empty_tokens(gate_up, torch.Size((len(gate_up), num_channels)), group)
    channels_per_sf = num_channels if group == "token" else group
    torch.ops.megamoe.swiglu_quantize(gate_up, row_weight, limit, alpha, up_bias, channels_per_sf, out.codes, out.sf)
    return out


def _launch_op(gate_up, row_weight, limit, alpha, up_bias, channels_per_sf, codes, sf) -> None:
    group = "token" if channels_per_sf == codes.shape[-1] else channels_per_sf
    out = QuantizedTokens(codes, sf, group)
    if not devices.runs_kernel(gate_up.device):
        gate = {"limit": limit, "alpha": alpha, "up_bias": up_bias}
        copy_tokens(out, reference.swiglu_quantize(gate_up, row_weight=row_weight, **gate, group=group))
        return
    offset = gate_up.data_ptr() % 16
    check(offset == 0, OP, "gate_up.data_ptr()", "a multiple of 16", f"{offset} more than one", "copy it with .clone()")
    if len(gate_up):
        params = SwigluQuantizeParams.allocate(
            gate_up=gate_up.data_ptr(), row_weight=0 if row_weight is None else row_weight.data_ptr(), out=quantized_rows(out),
            limit=math.inf if limit is None else limit, alpha=1.0 if alpha is None else alpha, up_bias=up_bias)
        with devices.current(gate_up.device.index):
            launch(OP, PARAMS, config(gate_up.dtype, group), params, out)


register(
    "swiglu_quantize(Tensor gate_up, Tensor? row_weight, float? limit, float? alpha, float up_bias, int channels_per_sf, "
    "Tensor(a!) codes, Tensor(b!) sf) -> ()",
    _launch_op,
)
