"""Checkpoint readers on broken checkpoints and wrong arguments: the exact message of each failure."""

import json
import re

import pytest
import torch
from checkpoint_files import CONFIGS, LAYER, E, H, I, checkpoint, tensors_of, write, write_shards
from safetensors.torch import save_file

from megamoe.errors import CheckpointError
from megamoe.integrations.checkpoints import load_experts, moe_config


def fails(message, path, error=CheckpointError, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        load_experts(path, options.pop("layer_idx", LAYER), progress=False, **options)


def edited(path, family, edit, **config):
    tensors = tensors_of(family)
    edit(tensors)
    return write(path, CONFIGS[family] | config, tensors)


Q = f"model.layers.{LAYER}.mlp.experts."


def test_missing_tensor_is_named_also_on_ranks_that_do_not_hold_it(tmp_path):
    path = edited(tmp_path, "qwen3_moe", lambda tensors: tensors.pop(f"{Q}3.up_proj.weight"))
    message = (f"checkpoint: tensor '{Q}3.up_proj.weight' must be in the checkpoint, got 1 of 12 expert tensors missing; "
               "download the whole checkpoint or pass the right family")
    fails(message, path, num_ranks=2, rank=0)
    fails(message, path, num_ranks=2, rank=1)


def test_extra_expert(tmp_path):
    path = edited(tmp_path, "qwen3_moe", lambda tensors: tensors.update({f"{Q}4.up_proj.weight": torch.zeros(I, H).bfloat16()}))
    fails(f"checkpoint: tensors under '{Q}' must be the 12 of 4 experts, got also '{Q}4.up_proj.weight'; "
          "check the number of experts in config.json or pass the right family", path)


def test_extra_tensor(tmp_path):
    path = edited(tmp_path, "gpt_oss", lambda tensors: tensors.update({f"{Q}gate_up_proj": torch.zeros(1)}))
    fails(f"checkpoint: tensors under '{Q}' must be the 6 of 4 experts, got also '{Q}gate_up_proj'; "
          "check the number of experts in config.json or pass the right family", path)


@pytest.mark.parametrize("family, name, tensor, expected, got", [
    ("qwen3_moe", "1.down_proj.weight", torch.zeros(H, I + 32).bfloat16(), "[64, 96] BF16", "[64, 128] BF16"),
    ("qwen3_moe", "1.down_proj.weight", torch.zeros(H, I).half(), "[64, 96] BF16", "[64, 96] F16"),
    ("deepseek_v3", "1.up_proj.weight_scale_inv", torch.ones(2, 2), "[2, 1] F32", "[2, 2] F32"),
    ("deepseek_v3", "1.up_proj.weight_scale_inv", torch.ones(2, 1).to(torch.float8_e8m0fnu), "[2, 1] F32", "[2, 1] F8_E8M0"),
    ("gpt_oss", "down_proj_scales", torch.zeros(E + 1, H, I // 32, dtype=torch.uint8), "[4, 64, 3] U8", "[5, 64, 3] U8"),
    ("gpt_oss", "gate_up_proj_blocks", torch.zeros(E, 2 * I, H // 2, dtype=torch.uint8), "[4, 192, 2, 16] U8", "[4, 192, 32] U8"),
])
def test_wrong_shape_or_dtype(tmp_path, family, name, tensor, expected, got):
    path = edited(tmp_path, family, lambda tensors: tensors.update({Q + name: tensor}))
    fails(f"checkpoint: tensor '{Q}{name}' must be {expected}, got {got}; the weights do not fit config.json or the family", path)


def test_a_dtype_that_the_family_never_has(tmp_path):
    path = edited(tmp_path, "mixtral", lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))
    name = f"model.layers.{LAYER}.block_sparse_moe.experts.0.w1.weight"
    fails(f"checkpoint: tensor '{name}' must be BF16, got F32; pass the right family", path)


def test_nvfp4_by_its_global_scale(tmp_path):
    path = edited(tmp_path, "qwen3_moe", lambda tensors: tensors.update({f"{Q}0.up_proj.weight_scale_2": torch.ones(1)}))
    fails(f"checkpoint: experts must be MXFP4, 128 x 128 FP8 or BF16, got NVFP4 ('{Q}0.up_proj.weight_scale_2'); "
          "NVFP4 has E4M3 scales per 16 values: dequantise it to BF16 first", path)


def test_nvfp4_by_its_e4m3_scales(tmp_path):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith("scale")]:
            tensors[name] = torch.ones(tensors[name].shape[0], 2 * tensors[name].shape[1]).to(torch.float8_e4m3fn)

    path = edited(tmp_path, "deepseek_v4", edit)
    fails(f"checkpoint: experts must be MXFP4, 128 x 128 FP8 or BF16, got NVFP4 ('layers.{LAYER}.ffn.experts.0.w1.scale'); "
          "NVFP4 has E4M3 scales per 16 values: dequantise it to BF16 first", path)


def test_scale_blocks_across_gate_and_up(tmp_path):
    path = checkpoint(tmp_path, "deepseek_v3", moe_intermediate_size=192)
    fails("checkpoint: intermediate size must be a multiple of 128, got 192; a scale block must not span gate and up rows", path)


def test_a_layer_without_experts(tmp_path):
    fails("checkpoint: layer_idx must be an MoE layer of the checkpoint, got no tensor under 'model.layers.0.mlp.experts.'; "
          "pass the number of an MoE layer", checkpoint(tmp_path, "olmoe"), layer_idx=0)


def test_family_can_be_named_and_must_be_known(tmp_path):
    path = checkpoint(tmp_path, "olmoe", model_type="my_olmoe")
    known = "gpt_oss, deepseek_v4, deepseek_v3, qwen3_moe, mixtral, olmoe"
    assert torch.equal(load_experts(path, LAYER, family="olmoe", progress=False).down[0], tensors_of("olmoe")[f"{Q}0.down_proj.weight"])
    fails(f"checkpoint: model_type in config.json must be one of {known}, got 'my_olmoe'; name one with load_experts(family=)", path)
    fails(f"load_experts: family must be 'auto' or one of {known}, got 'llama'; pick one of them", path, ValueError, family="llama")


@pytest.mark.parametrize("options, message", [
    (dict(num_ranks=3), "load_experts: num_ranks must be a divisor of 4 experts, got 3; use a group whose size divides it"),
    (dict(num_ranks=0), "load_experts: num_ranks must be a divisor of 4 experts, got 0; use a group whose size divides it"),
    (dict(num_ranks=2, rank=2), "load_experts: rank must be in [0, 2), got 2; pass the rank in the EP group"),
])
def test_wrong_ranks(tmp_path, options, message):
    fails(message, checkpoint(tmp_path, "olmoe"), ValueError, **options)


@pytest.mark.parametrize("change, message", [
    (dict(hidden_act="gelu"), "hidden_act in config.json must be 'silu', got 'gelu'; no reader for experts of this kind exists"),
    (dict(expert_dtype="fp8"), "expert_dtype in config.json must be 'fp4', got 'fp8'; no reader for experts of this kind exists"),
    (dict(moe_intermediate_size=None), "moe_intermediate_size in config.json must be a positive integer, got None; pass the right family"),
])
def test_config_that_does_not_fit(tmp_path, change, message):
    fails(f"checkpoint: {message}", checkpoint(tmp_path, "deepseek_v4", **change))


def test_no_config(tmp_path):
    save_file(tensors_of("olmoe"), tmp_path / "model.safetensors")
    message = (f"checkpoint: {tmp_path / 'config.json'} must be a file, got nothing there; "
               "pass the directory that holds config.json and the weights")
    fails(message, tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        moe_config(tmp_path, max_tokens_per_rank=1)


@pytest.mark.parametrize("text, expected, got", [
    ("{", "JSON", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"), ("[]", "a JSON object", "list")])
def test_broken_config(tmp_path, text, expected, got):
    (tmp_path / "config.json").write_text(text)
    fails(f"checkpoint: {tmp_path / 'config.json'} must be {expected}, got {got}; download the file again", tmp_path)


@pytest.mark.parametrize("names, got", [([], "no .safetensors file"), (["a.safetensors", "b.safetensors"], "2 other .safetensors files")])
def test_no_weights(tmp_path, names, got):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["olmoe"]))
    for name in names:
        (tmp_path / name).touch()
    fails(f"checkpoint: {tmp_path} must be a directory with model.safetensors or model.safetensors.index.json, got {got}; "
          "download the whole checkpoint", tmp_path)


def test_missing_shard(tmp_path):
    write_shards(tmp_path, CONFIGS["olmoe"], tensors_of("olmoe"), num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    fails(f"checkpoint: shards in {tmp_path} must be the 3 files of model.safetensors.index.json, got 2 of them; "
          "download model-00002-of-00003.safetensors", tmp_path)


def test_index_without_a_map(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["olmoe"]))
    file = tmp_path / "model.safetensors.index.json"
    file.write_text("{}")
    fails(f"checkpoint: {file} must be an object with a weight_map, got None; download it again", tmp_path)


def test_truncated_shard(tmp_path):
    checkpoint(tmp_path, "olmoe")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    start = re.escape(f"checkpoint: {file} must be a whole safetensors file, got ")
    with pytest.raises(CheckpointError, match=f"^{start}.*; download it again$"):
        load_experts(tmp_path, LAYER, progress=False)


def test_index_that_points_to_the_wrong_shard(tmp_path):
    write_shards(tmp_path, CONFIGS["olmoe"], tensors_of("olmoe"))
    path = tmp_path / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    name = f"{Q}0.down_proj.weight"
    assert content["weight_map"][name] == "model-00001-of-00002.safetensors"
    content["weight_map"][name] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(content))
    fails(f"checkpoint: tensor '{name}' must be in {tmp_path / 'model-00002-of-00002.safetensors'}, as model.safetensors.index.json says, "
          "got a file without it; download both again", tmp_path)
