"""ExpertWeights: the experts one rank holds, in any precision, in canonical order (gate rows first, then up rows).

Shapes: `e` local experts, `H` hidden, `I` intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megamoe.config import PRECISIONS
from megamoe.errors import check
from megamoe.formats.checks import WEIGHT_DTYPES
from megamoe.formats.fp4_weight import FP4Weight, quantize_fp4
from megamoe.formats.fp8_weight import FP8Weight, quantize_fp8

Weight = Tensor | FP4Weight | FP8Weight


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of `e` experts: y = down @ activation(gate_up @ x + gate_up_bias) + down_bias.

    Args:
        gate_up: [e, 2I, H], FP4Weight, FP8Weight or a bfloat16, float16 or float32 tensor; gate = first I rows, up = last I rows.
        down: [e, H, I], likewise.
        gate_up_bias: [e, 2I] floating point, or None.
        down_bias: [e, H] floating point, or None.

    Raises:
        ValueError: shapes, dtypes or devices do not agree.
    """

    gate_up: Weight
    down: Weight
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self):
        op = "ExpertWeights"
        for what, weight in (("gate_up", self.gate_up), ("down", self.down)):
            usable = not isinstance(weight, Tensor) or weight.dtype in WEIGHT_DTYPES
            check(usable, op, what, "FP4Weight, FP8Weight or a bfloat16, float16 or float32 tensor", getattr(weight, "dtype", None),
                  "wrap packed codes in FP4Weight")
        shape = list(self.gate_up.shape)
        check(len(shape) == 3 and shape[1] % 2 == 0, op, "gate_up", "[e, 2I, H]", shape, "stack the gate rows on the up rows")
        e, two_i, h = shape
        self._check_part("down", [e, h, two_i // 2])
        for what, expected in (("gate_up_bias", [e, two_i]), ("down_bias", [e, h])):
            bias = getattr(self, what)
            if bias is not None:
                self._check_part(what, expected)
                check(bias.is_floating_point(), op, f"{what} dtype", "floating point", bias.dtype, "cast it")

    def _check_part(self, what: str, expected: list[int]) -> None:
        part, op = getattr(self, what), "ExpertWeights"
        check(list(part.shape) == expected, op, f"{what} shape", expected, list(part.shape), f"gate_up is {list(self.gate_up.shape)}")
        check(part.device == self.device, op, f"{what} device", self.device, part.device, "move all parts to one device")

    @property
    def num_local_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate_up.shape[2]

    @property
    def intermediate(self) -> int:
        return self.down.shape[2]

    @property
    def device(self) -> torch.device:
        return self.gate_up.device

    def to(self, device: torch.device | str) -> "ExpertWeights":
        parts = (self.gate_up, self.down, self.gate_up_bias, self.down_bias)
        return ExpertWeights(*(None if part is None else part.to(device) for part in parts))

    def dequantized(self, expert: int) -> tuple[Tensor, Tensor]:
        """The matrices of one local expert: gate_up [2I, H] and down [H, I], float32."""
        return _values(self.gate_up[expert], torch.float32), _values(self.down[expert], torch.float32)

    def to_precision(self, precision: str) -> "ExpertWeights":
        """The same experts with weights in the form `precision` computes with; what already has that form is not copied.

        Args:
            precision: "fp8xfp4" (FP4Weight), "fp8xfp8" (FP8Weight, new ones with UE8M0 scales), "bf16" or "fp32" (tensors). A weight in
                another quantised form is quantised again from its values. Biases stay as they are.

        Raises:
            ValueError: `precision` is unknown, or a weight cannot be quantised (FormatError).

        Sync: reads the device where it quantises.
        """
        check(precision in PRECISIONS, "ExpertWeights.to_precision", "precision", f"one of {PRECISIONS}", repr(precision),
              "pick one of them")
        convert = _CONVERTERS[precision]
        return ExpertWeights(convert(self.gate_up), convert(self.down), self.gate_up_bias, self.down_bias)


def _values(weight: Weight, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def _to_tensor(dtype: torch.dtype) -> Callable[[Weight], Tensor]:
    def convert(weight: Weight) -> Tensor:
        if isinstance(weight, Tensor):
            return weight.to(dtype)
        values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for expert in range(len(values)):  # one at a time: FP32 temporaries of all experts would not fit beside them
            values[expert] = weight[expert].dequantize(dtype)
        return values

    return convert


def _to_quantized(kind: type, quantize: Callable[[Tensor], Weight]) -> Callable[[Weight], Weight]:
    def convert(weight: Weight) -> Weight:
        if isinstance(weight, kind):
            return weight
        if isinstance(weight, Tensor):
            return quantize(weight)
        experts = [quantize(weight[expert].dequantize()) for expert in range(weight.shape[0])]
        return kind(torch.stack([w.codes for w in experts]), torch.stack([w.scales for w in experts]), check_nan=False)

    return convert


_CONVERTERS: dict[str, Callable[[Weight], Weight]] = {
    "fp8xfp4": _to_quantized(FP4Weight, quantize_fp4),
    "fp8xfp8": _to_quantized(FP8Weight, quantize_fp8),
    "bf16": _to_tensor(torch.bfloat16),
    "fp32": _to_tensor(torch.float32),
}
