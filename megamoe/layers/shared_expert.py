"""The shared expert: a dense SwiGLU MLP that sees every token, beside the routed experts. Legend: H hidden, I intermediate."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.errors import check


class SharedExpert(nn.Module):
    """Dense SwiGLU MLP, computed in the dtype of its weights.

    Args:
        hidden: model width H.
        intermediate: width I after gating; several shared experts are one of their summed width.
        swiglu_limit: c in gate <= c, -c <= up <= c (DeepSeek-V4). None: no clamp.
        gated: scale each token's output by sigmoid(x . sigmoid_gate), as Qwen2-MoE does.
        device, dtype: of the parameters gate_up [2I, H] (gate rows, then up rows), down [H, I] and sigmoid_gate [1, H].

    Raises:
        ValueError: a size or the limit is not positive.
    """

    def __init__(self, hidden: int, intermediate: int, *, swiglu_limit: float | None = None, gated: bool = False,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check(hidden > 0, "SharedExpert", "hidden", "positive", hidden, "pass the width of the model")
        check(intermediate > 0, "SharedExpert", "intermediate", "positive", intermediate, "pass the width of the shared expert")
        check(swiglu_limit is None or swiglu_limit > 0, "SharedExpert", "swiglu_limit", "None or positive", swiglu_limit,
              "None means no clamp")
        self.hidden, self.intermediate, self.swiglu_limit = hidden, intermediate, swiglu_limit

        def weight(num_rows: int, num_columns: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(num_rows, num_columns, device=device, dtype=dtype))
            return nn.init.uniform_(parameter, -(num_columns**-0.5), num_columns**-0.5)

        self.gate_up = weight(2 * intermediate, hidden)
        self.down = weight(hidden, intermediate)
        self.sigmoid_gate = weight(1, hidden) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H], both in the dtype of the weights. Raises ValueError if the last dimension is not H."""
        check(x.shape[-1] == self.hidden, "SharedExpert", "x", f"[..., {self.hidden}]", list(x.shape), "pass tokens of the model's width")
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        if self.swiglu_limit is not None:
            gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        y = F.linear(F.silu(gate) * up, self.down)
        return y if self.sigmoid_gate is None else y * F.linear(x, self.sigmoid_gate).sigmoid()

    def extra_repr(self) -> str:
        return (f"hidden={self.hidden}, intermediate={self.intermediate}, swiglu_limit={self.swiglu_limit}, "
                f"gated={self.sigmoid_gate is not None}")
