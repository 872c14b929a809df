"""reference.swiglu against the formula in float64."""

import math

import pytest
import torch

from megamoe.reference.swiglu import swiglu


def expected(gate: float, up: float, limit: float | None, alpha: float | None, up_bias: float) -> float:
    if limit is not None:
        gate, up = min(gate, limit), max(-limit, min(up, limit))
    if alpha is None:
        return gate / (1 + math.exp(-gate)) * up
    return gate / (1 + math.exp(-alpha * gate)) * (up + up_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("limit", "alpha", "up_bias"), [(None, None, 0.0), (2.0, None, 0.0), (None, 1.702, 1.0), (2.0, 1.702, 1.0)])
def test_matches_the_formula(limit, alpha, up_bias, dtype):
    generator = torch.Generator().manual_seed(1)
    gate, up = (4 * torch.randn(2, 64, generator=generator)).to(dtype)
    a = swiglu(gate, up, limit=limit, alpha=alpha, up_bias=up_bias)
    want = torch.tensor([expected(g, u, limit, alpha, up_bias) for g, u in zip(gate.tolist(), up.tolist())])
    assert a.dtype == torch.float32
    torch.testing.assert_close(a, want, rtol=2e-6, atol=1e-6)


def test_the_gate_has_no_lower_clamp():
    a = swiglu(torch.tensor([-3.0]), torch.tensor([1.0]), limit=1.0)
    assert a.item() == pytest.approx(-3.0 / (1 + math.exp(3.0)), rel=1e-6)


@pytest.mark.parametrize("alpha", [None, 1.702])
def test_nan_passes_the_clamp_and_stays_in_its_channel(alpha):
    gate, up = torch.tensor([math.nan, 1.0, 1.0]), torch.tensor([1.0, math.nan, 1.0])
    assert swiglu(gate, up, limit=2.0, alpha=alpha).isnan().tolist() == [True, True, False]
