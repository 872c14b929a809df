"""MegaMoE as the experts of a Hugging Face transformers model (>= 5.0), through its ExpertsInterface.

Only the experts module changes: the router, the shared experts and everything around them stay the model's own code. The stock
weights of the experts are freed; each rank keeps those of its own experts, in the precision asked for.
Shapes: T tokens on this rank, K top-k, E experts, e local experts, H hidden, I intermediate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.comm import Arena
from megamoe.config import MoEConfig
from megamoe.errors import check
from megamoe.formats import ExpertWeights
from megamoe.layers import MegaMoE

IMPLEMENTATION = "megamoe"  # the name in transformers' ExpertsInterface and in config._experts_implementation
_WEIGHTS = ("gate_up_proj", "down_proj")
_BIASES = ("gate_up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class _Family:
    """How one experts class stores its weights and gates them.

    `is_interleaved`: rows of gate and up alternate, gate first. `is_transposed`: weights are [E, H, 2I] and [E, I, H].
    `has_limit`, `has_alpha`: the module's `limit` and `alpha` attributes take part in its gate.
    """

    model: str
    is_interleaved: bool = False
    is_transposed: bool = False
    has_bias: bool = False
    has_limit: bool = False
    has_alpha: bool = False
    up_bias: float = 0.0


_FAMILIES = {
    "Qwen3MoeExperts": _Family("Qwen3-MoE"),
    "MixtralExperts": _Family("Mixtral"),
    "DeepseekV3Experts": _Family("DeepSeek-V3"),
    "DeepseekV3NaiveMoe": _Family("DeepSeek-V3"),  # its name before transformers 5.2
    "DeepseekV4Experts": _Family("DeepSeek-V4", has_limit=True),
    "GptOssExperts": _Family("gpt-oss", is_interleaved=True, is_transposed=True, has_bias=True, has_limit=True, has_alpha=True,
                             up_bias=1.0),
}
SUPPORTED_MODELS = tuple(dict.fromkeys(family.model for family in _FAMILIES.values()))


def stock_experts(model: nn.Module) -> list[nn.Module]:
    """The experts modules of `model` that `replace_experts` would replace, in layer order.

    Raises:
        ValueError: the model has none of a supported family.
    """
    found = [module for module in model.modules() if type(module).__name__ in _FAMILIES and hasattr(module, "gate_up_proj")]
    check(bool(found), "replace_experts", "model", f"one with experts of {', '.join(SUPPORTED_MODELS)}", type(model).__name__,
          "pass a model of one of these families that has not been replaced yet")
    return found


def moe_config(experts: nn.Module, *, precision: str, max_tokens_per_rank: int) -> MoEConfig:
    """What one stock experts module computes, as a MoEConfig. Raises ValueError for an activation other than SiLU."""
    family, config = _FAMILIES[type(experts).__name__], experts.config
    check(config.hidden_act in ("silu", "swish"), "replace_experts", "hidden_act", "'silu'", repr(config.hidden_act),
          "no other activation is implemented")
    gate_up = experts.gate_up_proj.transpose(1, 2) if family.is_transposed else experts.gate_up_proj  # [E, 2I, H]
    return MoEConfig(
        hidden=gate_up.shape[2], intermediate=gate_up.shape[1] // 2, num_experts=gate_up.shape[0], num_topk=config.num_experts_per_tok,
        max_tokens_per_rank=max_tokens_per_rank, precision=precision, swiglu_limit=experts.limit if family.has_limit else None,
        swiglu_alpha=experts.alpha if family.has_alpha else None, swiglu_up_bias=family.up_bias,
    )


def canonical_experts(experts: nn.Module, first: int, last: int) -> ExpertWeights:
    """Experts [first, last) of a stock experts module in canonical order: copies, in the model's dtype."""
    family = _FAMILIES[type(experts).__name__]
    names = _WEIGHTS + _BIASES if family.has_bias else _WEIGHTS
    gate_up, down, *biases = (getattr(experts, name).detach()[first:last] for name in names)
    if family.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gate_up_bias, down_bias = biases or (None, None)
    if family.is_interleaved:
        gate_up, gate_up_bias = _gate_then_up(gate_up), _gate_then_up(gate_up_bias)
    # Copies even where a view would do: a view would keep the memory of all experts alive.
    parts = (gate_up, down, gate_up_bias, down_bias)
    return ExpertWeights(*(None if part is None else part.clone(memory_format=torch.contiguous_format) for part in parts))


def set_stock_weights(experts: nn.Module, gate_up: Tensor, down: Tensor) -> None:
    """Overwrite the weights of all E experts of a stock module with canonical ones, e.g. with dequantised FP4 weights."""
    family = _FAMILIES[type(experts).__name__]
    if family.is_interleaved:
        gate_up = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)  # [E, 2I, H]
    if family.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    with torch.no_grad():
        experts.gate_up_proj.copy_(gate_up)
        experts.down_proj.copy_(down)


def replace_experts(model: nn.Module, *, group: dist.ProcessGroup | None = None, precision: str = "fp8xfp4", engine: str = "auto",
                    backend: str = "auto", max_tokens_per_rank: int = 4096, arena: Arena | None = None,
                    device: torch.device | str | None = None, progress: bool = False) -> nn.Module:
    """Replace the experts of every MoE block of `model` by a MegaMoE layer that holds this rank's share of them, in place.

    Args:
        model: a transformers model of one of SUPPORTED_MODELS, the same on every rank; its experts' weights are read and then freed.
        group: the EP group; None is the default group, or a single rank where there is none.
        precision: as in MoEConfig. The activations are cast to it and the result back to the model's dtype.
        engine, backend: as in MegaMoE.
        max_tokens_per_rank: most tokens (batch x sequence) of one forward on one rank.
        arena: symmetric memory to share; None creates one, shared by all layers of the model.
        device: where the layers live; None is where the model's experts are.
        progress: show a bar over the layers, on this rank.

    Returns:
        `model`. Each of its forwards is from now on collective: every rank of the group must run the same number of them.

    Raises:
        ValueError: the model is not supported, or its experts do not divide evenly among the ranks.

    Sync: collective over `group`.
    """
    from tqdm import tqdm
    from transformers.integrations.moe import ExpertsInterface

    modules = stock_experts(model)
    ExpertsInterface.register(IMPLEMENTATION, _experts_forward)
    for experts in tqdm(modules, desc="replace experts", unit="layer", disable=not progress):
        cfg = moe_config(experts, precision=precision, max_tokens_per_rank=max_tokens_per_rank)
        layer = MegaMoE(cfg, group=group, device=device or experts.gate_up_proj.device, engine=engine, backend=backend, arena=arena)
        arena = layer.arena
        first = arena.rank * layer.num_local_experts
        local = canonical_experts(experts, first, first + layer.num_local_experts)
        layer.load_experts(local.gate_up, local.down, local.gate_up_bias, local.down_bias)
        _free_stock_weights(experts)
        experts.mega_moe = layer
        experts.config._experts_implementation = IMPLEMENTATION
    return model


def expert_layers(model: nn.Module) -> Iterator[MegaMoE]:
    """The MegaMoE layers that `replace_experts` put into `model`, in layer order."""
    return (module for module in model.modules() if isinstance(module, MegaMoE))


def _experts_forward(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in place of the stock experts: [T, H], [T, K], [T, K] -> [T, H] in the dtype of `hidden_states`."""
    layer = experts.mega_moe
    x = hidden_states.to(torch.float32 if layer.cfg.precision == "fp32" else torch.bfloat16).contiguous()
    return layer(x, top_k_index.long().contiguous(), top_k_weights.float().contiguous()).to(hidden_states.dtype)


def _gate_then_up(interleaved: Tensor) -> Tensor:
    """[e, 2I, ...] with alternating gate and up rows -> gate rows first."""
    return torch.cat((interleaved[:, 0::2], interleaved[:, 1::2]), dim=1)


def _free_stock_weights(experts: nn.Module) -> None:
    for name in _WEIGHTS + _BIASES:
        if hasattr(experts, name):
            delattr(experts, name)
