"""The gated activation between the two linears of an expert, in FP32. Step 3 of the numerics contract without the top-k weight."""

import torch


def swiglu(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    limit: float | None = None,
    alpha: float | None = None,
    up_bias: float = 0.0,
) -> torch.Tensor:
    """Gate `up` by `gate`.

    Args:
        gate: [..., I] any float dtype; computed in FP32.
        up: [..., I] like gate.
        limit: c in gate <= c, -c <= up <= c; NaN passes through the clamp. None: no clamp.
        alpha: None: silu(gate) * up. Otherwise gate * sigmoid(alpha * gate) * (up + up_bias).
        up_bias: added to the clamped up in the second form.

    Returns:
        [..., I] float32.
    """
    gate, up = gate.float(), up.float()
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if alpha is None:
        return torch.nn.functional.silu(gate) * up
    return gate * torch.sigmoid(alpha * gate) * (up + up_bias)
