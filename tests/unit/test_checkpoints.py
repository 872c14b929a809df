"""Checkpoint readers on small checkpoints in the exact layout of each family, and on ones that transformers writes."""

import json
import re

import pytest
import torch
from checkpoint_files import (
    CONFIGS,
    LAYER,
    Draw,
    E,
    H,
    I,
    K,
    bf16_tensors,
    checkpoint,
    deepseek_v3_tensors,
    deepseek_v4_tensors,
    gpt_oss_tensors,
    tensors_of,
    write,
    write_shards,
)
from safetensors import safe_open

from megamoe.config import MoEConfig
from megamoe.formats import FP4Weight, FP8Weight
from megamoe.integrations.checkpoints import index, load_experts, moe_config

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def same_bytes(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def stacked(tensors, prefix, experts, names, suffix) -> torch.Tensor:
    def rows(expert):
        return torch.cat([tensors[f"{prefix}{expert}.{name}.{suffix}"].view(torch.uint8) for name in names])

    return torch.stack([rows(expert) for expert in experts])


@pytest.mark.parametrize("num_ranks, rank", [(1, 0), (2, 1), (4, 2)])
def test_gpt_oss_in_two_shards(tmp_path, num_ranks, rank):
    tensors = gpt_oss_tensors() | gpt_oss_tensors(layer=4)
    path = write_shards(tmp_path, CONFIGS["gpt_oss"], tensors)
    weights = load_experts(path, LAYER, num_ranks=num_ranks, rank=rank, progress=False)
    mine = slice(rank * E // num_ranks, (rank + 1) * E // num_ranks)
    prefix = f"model.layers.{LAYER}.mlp.experts."
    stored = {name.removeprefix(prefix): tensor[mine] for name, tensor in tensors.items() if name.startswith(prefix)}
    assert isinstance(weights.gate_up, FP4Weight) and isinstance(weights.down, FP4Weight)
    # Even stored rows are gate rows, odd ones up rows.
    for row, source_row in [(0, 0), (1, 2), (I - 1, 2 * I - 2), (I, 1), (I + 1, 3), (2 * I - 1, 2 * I - 1)]:
        assert same_bytes(weights.gate_up.codes[:, row], stored["gate_up_proj_blocks"][:, source_row].flatten(1))
        assert same_bytes(weights.gate_up.scales[:, row], stored["gate_up_proj_scales"][:, source_row])
        assert torch.equal(weights.gate_up_bias[:, row], stored["gate_up_proj_bias"][:, source_row])
    assert same_bytes(weights.down.codes, stored["down_proj_blocks"].flatten(2))
    assert same_bytes(weights.down.scales, stored["down_proj_scales"])
    assert torch.equal(weights.down_bias, stored["down_proj_bias"])


def test_gpt_oss_values(tmp_path):
    """Dequantised as the format says, independently of megamoe.formats: low nibble first, one exponent per 16 bytes."""
    tensors = gpt_oss_tensors()
    weights = load_experts(write(tmp_path, CONFIGS["gpt_oss"], tensors), LAYER, progress=False)
    blocks, scales = (tensors[f"model.layers.{LAYER}.mlp.experts.gate_up_proj_{part}"] for part in ("blocks", "scales"))
    values = torch.stack((E2M1[(blocks % 16).long()], E2M1[(blocks // 16).long()]), dim=-1).flatten(-2)  # [E, 2I, H/32, 32]
    values = (values * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2)
    assert torch.equal(weights.gate_up.dequantize(torch.float32), torch.cat((values[:, 0::2], values[:, 1::2]), dim=1))


@pytest.mark.parametrize("num_ranks, rank", [(1, 0), (2, 1)])
def test_deepseek_v4(tmp_path, num_ranks, rank):
    tensors = deepseek_v4_tensors()
    shared = {f"layers.{LAYER}.ffn.shared_experts.w1.weight": Draw().e4m3(I, H), f"layers.{LAYER}.ffn.gate.weight": Draw().bf16(E, H)}
    path = write_shards(tmp_path, CONFIGS["deepseek_v4"], tensors | shared, num_shards=3)
    weights = load_experts(path, LAYER, num_ranks=num_ranks, rank=rank, progress=False)
    experts, prefix = range(rank * E // num_ranks, (rank + 1) * E // num_ranks), f"layers.{LAYER}.ffn.experts."
    assert isinstance(weights.gate_up, FP4Weight) and weights.gate_up_bias is None and weights.down_bias is None
    assert same_bytes(weights.gate_up.codes, stacked(tensors, prefix, experts, ("w1", "w3"), "weight"))
    assert same_bytes(weights.gate_up.scales, stacked(tensors, prefix, experts, ("w1", "w3"), "scale"))
    assert same_bytes(weights.down.codes, stacked(tensors, prefix, experts, ("w2",), "weight"))
    assert same_bytes(weights.down.scales, stacked(tensors, prefix, experts, ("w2",), "scale"))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_deepseek_v3(tmp_path, scale_dtype):
    tensors = deepseek_v3_tensors(scale_dtype=scale_dtype)
    weights = load_experts(write(tmp_path, CONFIGS["deepseek_v3"], tensors), LAYER, num_ranks=2, rank=1, progress=False)
    prefix, gate_up = f"model.layers.{LAYER}.mlp.experts.", ("gate_proj", "up_proj")
    assert isinstance(weights.gate_up, FP8Weight) and isinstance(weights.down, FP8Weight)
    assert weights.down.scales.dtype == (torch.float32 if scale_dtype == torch.float32 else torch.uint8)
    assert weights.gate_up.shape == (2, 512, H) and weights.gate_up.scales.shape == (2, 4, 1) and weights.down.scales.shape == (2, 1, 2)
    assert same_bytes(weights.gate_up.codes, stacked(tensors, prefix, (2, 3), gate_up, "weight").view(torch.float8_e4m3fn))
    assert same_bytes(weights.gate_up.scales.view(torch.uint8), stacked(tensors, prefix, (2, 3), gate_up, "weight_scale_inv"))
    assert same_bytes(weights.down.scales.view(torch.uint8), stacked(tensors, prefix, (2, 3), ("down_proj",), "weight_scale_inv"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_bf16_families(tmp_path, family):
    tensors = bf16_tensors(family)
    weights = load_experts(write(tmp_path, CONFIGS[family], tensors), LAYER, num_ranks=4, rank=1, progress=False)
    gate, up, down = (tensor for name, tensor in tensors.items() if ".experts.1." in name)
    assert torch.equal(weights.gate_up, torch.cat((gate, up)).unsqueeze(0)) and weights.gate_up.dtype == torch.bfloat16
    assert torch.equal(weights.down, down.unsqueeze(0))


@pytest.mark.parametrize("name, sizes", [
    ("Qwen3Moe", dict(num_experts=E, moe_intermediate_size=I)), ("Mixtral", dict(num_local_experts=E, intermediate_size=I)),
    ("Olmoe", dict(num_experts=E, intermediate_size=I))])
def test_what_transformers_writes(tmp_path, name, sizes):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        hidden_size=H, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=32, num_experts_per_tok=K, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    experts = model.model.layers[1].mlp.experts
    weights = load_experts(tmp_path, 1, num_ranks=2, rank=1, progress=False)
    assert torch.equal(weights.gate_up, experts.gate_up_proj[2:]) and torch.equal(weights.down, experts.down_proj[2:])
    assert moe_config(tmp_path, max_tokens_per_rank=8) == MoEConfig(
        hidden=H, intermediate=I, num_experts=E, num_topk=K, max_tokens_per_rank=8, precision="bf16")


class RecordingFile:
    """safe_open that writes down what is read from it."""

    reads: list[tuple[str, object]] = []

    def __init__(self, file, framework):
        self.file = safe_open(file, framework=framework)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *exc):
        return self.file.__exit__(*exc)

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        return RecordingSlice(name, self.file.get_slice(name))


class RecordingSlice:
    def __init__(self, name, stored):
        self.name, self.stored = name, stored
        self.get_shape, self.get_dtype = stored.get_shape, stored.get_dtype

    def __getitem__(self, key):
        RecordingFile.reads.append((self.name, key))
        return self.stored[key]


@pytest.fixture
def reads(monkeypatch):
    monkeypatch.setattr(index, "safe_open", RecordingFile)
    monkeypatch.setattr(RecordingFile, "reads", [])
    return RecordingFile.reads


def test_only_the_rows_of_this_rank_are_read_from_stacked_tensors(tmp_path, reads):
    tensors = gpt_oss_tensors()
    load_experts(write(tmp_path, CONFIGS["gpt_oss"], tensors), LAYER, num_ranks=2, rank=1, progress=False)
    assert sorted(reads, key=str) == sorted(((name, slice(i, i + 1)) for name in tensors for i in (2, 3)), key=str)


@pytest.mark.parametrize("family", ["deepseek_v4", "deepseek_v3", "qwen3_moe", "mixtral", "olmoe"])
def test_only_the_tensors_of_this_rank_are_read(tmp_path, reads, family):
    load_experts(checkpoint(tmp_path, family), LAYER, num_ranks=2, rank=1, progress=False)
    assert sorted(name for name, _ in reads) == sorted(name for name in tensors_of(family) if re.search(r"\.experts\.[23]\.", name))


def test_only_shards_with_our_experts_are_opened(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(index, "safe_open", lambda file, framework: opened.append(file.name) or safe_open(file, framework=framework))
    write_shards(tmp_path, CONFIGS["mixtral"], bf16_tensors("mixtral"), num_shards=4 * 3)  # one tensor each, in the order of the names
    load_experts(tmp_path, LAYER, num_ranks=4, rank=2, progress=False)
    assert opened == [f"model-{shard:05}-of-00012.safetensors" for shard in (7, 9, 8)]


def test_progress_bar_on_rank_0_only(tmp_path, capfd):
    checkpoint(tmp_path, "mixtral")
    load_experts(tmp_path, LAYER, num_ranks=2, rank=0)
    assert re.search(r"layer 3 experts: 100%.* 2/2 ", capfd.readouterr().err)
    load_experts(tmp_path, LAYER, num_ranks=2, rank=1)
    load_experts(tmp_path, LAYER, num_ranks=2, rank=0, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("family, expected", [
    ("gpt_oss", dict(precision="fp8xfp4", intermediate=I, swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_up_bias=1.0)),
    ("deepseek_v4", dict(precision="fp8xfp4", intermediate=I, swiglu_limit=10.0)),
    ("deepseek_v3", dict(precision="fp8xfp8", intermediate=256)),
    ("qwen3_moe", dict(precision="bf16", intermediate=I)),
    ("mixtral", dict(precision="bf16", intermediate=I)),
    ("olmoe", dict(precision="bf16", intermediate=I)),
])
def test_moe_config(tmp_path, family, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    cfg = moe_config(tmp_path, max_tokens_per_rank=16)
    assert cfg == MoEConfig(hidden=H, num_experts=E, num_topk=K, max_tokens_per_rank=16, **expected)


def test_moe_config_takes_precision_and_limits_as_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gpt_oss"] | dict(swiglu_limit=5.0, swiglu_alpha=1.5)))
    cfg = moe_config(str(tmp_path), max_tokens_per_rank=16, precision="bf16")
    assert (cfg.precision, cfg.swiglu_limit, cfg.swiglu_alpha) == ("bf16", 5.0, 1.5)
