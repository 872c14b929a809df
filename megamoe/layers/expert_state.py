"""Experts <-> state dict.

The canonical form is stored, whatever layout the engine keeps, so a checkpoint moves between engines and GPUs.
"""

import torch

from megamoe.formats import ExpertWeights, FP4Weight, FP8Weight

_MATRICES = ("gate_up", "down")
_BIASES = ("gate_up_bias", "down_bias")
# Which tensors each stored form has, and how to build the weight from them.
_FORMS = {"codes": FP4Weight, "fp8_codes": FP8Weight}


def expert_weights_to_state(weights: ExpertWeights) -> dict[str, torch.Tensor]:
    """Name every tensor of the experts: gate_up / down (plain), *.codes + *.scales (FP4), *.fp8_codes + *.scales (FP8), and the biases."""
    state = {}
    for name in _MATRICES:
        weight = getattr(weights, name)
        if isinstance(weight, torch.Tensor):
            state[f"experts.{name}"] = weight
        else:
            codes_name = next(key for key, form in _FORMS.items() if isinstance(weight, form))
            state[f"experts.{name}.{codes_name}"] = weight.codes
            state[f"experts.{name}.scales"] = weight.scales
    for name in _BIASES:
        if getattr(weights, name) is not None:
            state[f"experts.{name}"] = getattr(weights, name)
    return state


def expert_weights_from_state(state_dict: dict, prefix: str) -> tuple[ExpertWeights | None, set[str], list[str]]:
    """Return (experts or None if incomplete, the keys that belong to them, the keys that are missing)."""
    prefix += "experts."
    own = {key[len(prefix):]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
    parts, missing = {}, []
    for name in _MATRICES:
        if name in own:
            parts[name] = own[name]
            continue
        codes_name = next((key for key in _FORMS if f"{name}.{key}" in own), None)
        if codes_name is None or f"{name}.scales" not in own:
            missing.append(prefix + name)
        else:
            parts[name] = _FORMS[codes_name](own[f"{name}.{codes_name}"], own[f"{name}.scales"])
    weights = None if missing else ExpertWeights(**parts, **{name: own.get(name) for name in _BIASES})
    return weights, {prefix + name for name in own}, missing
