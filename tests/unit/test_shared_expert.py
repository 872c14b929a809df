"""SharedExpert against an FP64 twin and the transformers MLPs."""

import re
from types import SimpleNamespace

import pytest
import torch

from megamoe.layers.shared_expert import SharedExpert

T, H, I = 19, 24, 40


def tokens(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(3)) * scale


def seeded(seed: int = 4, **options) -> SharedExpert:
    torch.manual_seed(seed)
    return SharedExpert(H, I, **options)


def test_against_fp64():
    expert = seeded()
    x, gate, up, down = (t.double() for t in (tokens(), *expert.gate_up.split(I), expert.down))
    g = x @ gate.T
    expected = (g / (1 + (-g).exp()) * (x @ up.T)) @ down.T
    torch.testing.assert_close(expert(tokens()).double(), expected, rtol=1e-4, atol=1e-6)


def test_limit_clamps_gate_above_and_up_on_both_sides():
    expert = SharedExpert(1, 1, swiglu_limit=2.0)
    expert.gate_up.data.copy_(torch.tensor([[1.0], [-3.0]]))
    expert.down.data.fill_(1.0)
    x = torch.tensor([[5.0], [-5.0], [0.5]])
    gate, up = torch.tensor([[2.0], [-5.0], [0.5]]), torch.tensor([[-2.0], [2.0], [-1.5]])
    torch.testing.assert_close(expert(x), gate * torch.sigmoid(gate) * up)


def test_gated_scales_each_token():
    plain, gated = seeded(), seeded(gated=True)
    gated.gate_up.data.copy_(plain.gate_up), gated.down.data.copy_(plain.down)
    scale = 1 / (1 + (-(tokens() @ gated.sigmoid_gate.detach().T)).exp())  # [T, 1]
    torch.testing.assert_close(gated(tokens()), plain(tokens()) * scale)


@pytest.mark.parametrize("model, name, limit", [("deepseek_v3", "DeepseekV3MLP", None), ("deepseek_v4", "DeepseekV4MLP", 1.5)])
def test_against_transformers(model, name, limit):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    config = SimpleNamespace(hidden_size=H, intermediate_size=I, moe_intermediate_size=I, hidden_act="silu", swiglu_limit=limit,
                             mlp_bias=False)
    stock = getattr(modeling, name)(config)
    expert = seeded(swiglu_limit=limit)
    stock.gate_proj.weight.data, stock.up_proj.weight.data = expert.gate_up.detach().split(I)
    stock.down_proj.weight.data = expert.down.detach()
    torch.testing.assert_close(expert(tokens(4.0)), stock(tokens(4.0)), rtol=1e-5, atol=1e-6)


def test_keeps_leading_dims_and_dtype():
    expert = seeded(dtype=torch.bfloat16)
    y = expert(tokens().bfloat16().view(1, T, H))
    assert y.dtype == torch.bfloat16 and torch.equal(y[0], expert(tokens().bfloat16()))


def test_compiles_without_graph_breaks():
    expert = seeded(gated=True, swiglu_limit=1.0)
    compiled = torch.compile(expert, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens()), expert(tokens()))


@pytest.mark.parametrize("make, message", [
    (lambda: SharedExpert(0, I), "SharedExpert: hidden must be positive, got 0; pass the width of the model"),
    (lambda: SharedExpert(H, -1), "SharedExpert: intermediate must be positive, got -1; pass the width of the shared expert"),
    (lambda: SharedExpert(H, I, swiglu_limit=0.0), "SharedExpert: swiglu_limit must be None or positive, got 0.0; None means no clamp"),
    (lambda: SharedExpert(H, I)(torch.zeros(2, 7)), "SharedExpert: x must be [..., 24], got [2, 7]; pass tokens of the model's width"),
])
def test_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
