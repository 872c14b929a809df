"""Writes small checkpoints in the exact layout of each family, tensor by tensor as their authors ship them.

Legend: E experts, H hidden, I intermediate, K top-k.
"""

import json

import torch
from safetensors.torch import save_file

E, H, I, K, LAYER = 4, 64, 96, 2, 3
SMALL = dict(hidden_size=H, num_experts_per_tok=K, hidden_act="silu")
CONFIGS = {
    "gpt_oss": SMALL | dict(model_type="gpt_oss", num_local_experts=E, intermediate_size=I, swiglu_limit=7.0),
    "deepseek_v4": SMALL | dict(model_type="deepseek_v4", n_routed_experts=E, moe_intermediate_size=I, expert_dtype="fp4",
                                swiglu_limit=10.0),
    "deepseek_v3": SMALL | dict(model_type="deepseek_v3", n_routed_experts=E, moe_intermediate_size=256, intermediate_size=512),
    "qwen3_moe": SMALL | dict(model_type="qwen3_moe", num_experts=E, moe_intermediate_size=I, intermediate_size=512),
    "mixtral": SMALL | dict(model_type="mixtral", num_local_experts=E, intermediate_size=I),
    "olmoe": SMALL | dict(model_type="olmoe", num_experts=E, intermediate_size=I, clip_qkv=None),
}


class Draw:
    """Random tensors from one seed."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def bytes(self, *shape, low=0, high=256):
        return torch.randint(low, high, shape, generator=self.generator, dtype=torch.uint8)

    def exponents(self, *shape):
        return self.bytes(*shape, low=120, high=135)

    def bf16(self, *shape):
        return torch.randn(shape, generator=self.generator).bfloat16()

    def e4m3(self, *shape):
        return torch.randn(shape, generator=self.generator).to(torch.float8_e4m3fn)


def gpt_oss_tensors(layer=LAYER) -> dict[str, torch.Tensor]:
    draw, prefix = Draw(layer), f"model.layers.{layer}.mlp.experts."
    tensors = {}
    for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
        tensors[f"{prefix}{name}_blocks"] = draw.bytes(E, rows, columns // 32, 16)
        tensors[f"{prefix}{name}_scales"] = draw.exponents(E, rows, columns // 32)
        tensors[f"{prefix}{name}_bias"] = draw.bf16(E, rows)
    return tensors


def per_expert_tensors(prefix, names, make) -> dict[str, torch.Tensor]:
    """`make(rows, columns)` gives the parts of one matrix by suffix; names are those of gate, up and down."""
    gate, up, down = names
    config_i = 256 if "weight_scale_inv" in make(128, 128) else I
    shapes = {gate: (config_i, H), up: (config_i, H), down: (H, config_i)}
    return {f"{prefix}{expert}.{name}.{suffix}": tensor for expert in range(E) for name, shape in shapes.items()
            for suffix, tensor in make(*shape).items()}


def deepseek_v4_tensors(layer=LAYER):
    draw = Draw(layer)
    return per_expert_tensors(f"layers.{layer}.ffn.experts.", ("w1", "w3", "w2"), lambda rows, columns: {
        "weight": draw.bytes(rows, columns // 2).view(torch.int8), "scale": draw.exponents(rows, columns // 32).view(torch.float8_e8m0fnu)})


def deepseek_v3_tensors(layer=LAYER, scale_dtype=torch.float32):
    draw = Draw(layer)

    def make(rows, columns):
        scale = draw.exponents(-(-rows // 128), -(-columns // 128))
        scale = scale.view(torch.float8_e8m0fnu) if scale_dtype == torch.float8_e8m0fnu else scale.float() / 3
        return {"weight": draw.e4m3(rows, columns), "weight_scale_inv": scale}

    return per_expert_tensors(f"model.layers.{layer}.mlp.experts.", ("gate_proj", "up_proj", "down_proj"), make)


def bf16_tensors(family, layer=LAYER):
    draw = Draw(layer)
    block, names = ("block_sparse_moe", ("w1", "w3", "w2")) if family == "mixtral" else ("mlp", ("gate_proj", "up_proj", "down_proj"))
    return per_expert_tensors(f"model.layers.{layer}.{block}.experts.", names, lambda rows, columns: {"weight": draw.bf16(rows, columns)})


def tensors_of(family) -> dict[str, torch.Tensor]:
    makers = {"gpt_oss": gpt_oss_tensors, "deepseek_v4": deepseek_v4_tensors, "deepseek_v3": deepseek_v3_tensors}
    return makers[family]() if family in makers else bf16_tensors(family)


def write(path, config, tensors):
    """A checkpoint in one file. Returns its directory."""
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def write_shards(path, config, tensors, num_shards=2):
    """A checkpoint in shards, names dealt out in turn. Returns its directory."""
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {name: f"model-{i % num_shards + 1:05}-of-{num_shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name, file in weight_map.items() if file == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def checkpoint(path, family, **config):
    return write(path, CONFIGS[family] | config, tensors_of(family))
