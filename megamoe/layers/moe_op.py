"""The registered operator behind MegaMoE.forward, so that torch.compile sees one opaque call with a known result.

An operator cannot take a layer or a process group, so the layer passes a key into a process-local table. Calls are collective and must
neither be reordered nor merged nor dropped by a compiler: the operator therefore declares that it mutates `num_calls`, one counter per
arena, which chains all calls that share symmetric memory.
"""

import itertools
import weakref

import torch

from megamoe.kernels.library import library

_layers: "weakref.WeakValueDictionary[str, object]" = weakref.WeakValueDictionary()
_keys = itertools.count()

library.define("moe(Tensor x, Tensor? x_sf, Tensor topk_idx, Tensor topk_weights, Tensor(a!) expert_load, Tensor(b!) num_calls, "
               "str layer) -> Tensor")


def register(layer) -> str:
    """Make `layer._run` reachable from the operator; return the key to pass. The table holds the layer weakly."""
    key = f"moe{next(_keys)}"
    _layers[key] = layer
    return key


def output_dtype(x_dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if x_dtype == torch.float32 else torch.bfloat16


def _moe(x, x_sf, topk_idx, topk_weights, expert_load, num_calls, layer):
    return _layers[layer]._run(x, x_sf, topk_idx, topk_weights, expert_load, num_calls)


def _moe_fake(x, x_sf, topk_idx, topk_weights, expert_load, num_calls, layer):
    return x.new_empty(x.shape, dtype=output_dtype(x.dtype))


for _device in ("CPU", "CUDA"):
    library.impl("moe", _moe, _device)
torch.library.register_fake("megamoe::moe", _moe_fake, lib=library)

moe = torch.ops.megamoe.moe.default
