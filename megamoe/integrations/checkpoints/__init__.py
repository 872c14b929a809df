"""Reads one rank's experts of one layer, and the layer's MoEConfig, from a safetensors checkpoint directory.

Weights arrive in the number format they are stored in and in canonical row order (gate rows, then up rows).
"""

from pathlib import Path

import torch
from tqdm import tqdm

from megamoe.config import MoEConfig
from megamoe.errors import check
from megamoe.formats import ExpertWeights
from megamoe.integrations.checkpoints.families import FAMILIES, Family, Source, read_size, target_shape
from megamoe.integrations.checkpoints.index import TORCH_DTYPES, TensorFiles, read_json, require

__all__ = ["FAMILIES", "load_experts", "moe_config"]


def load_experts(path: str | Path, layer_idx: int, *, num_ranks: int = 1, rank: int = 0, family: str = "auto",
                 progress: bool = True) -> ExpertWeights:
    """Load the experts that live on `rank`, [rank * e, (rank + 1) * e), reading nothing of the others.

    Args:
        path: directory with config.json and model.safetensors, or shards with model.safetensors.index.json.
        layer_idx: number of the layer in the model.
        num_ranks, rank: size of the EP group and our place in it.
        family: a key of FAMILIES; "auto" takes the model_type of config.json.
        progress: show a progress bar on rank 0.

    Returns:
        gate_up [e, 2I, H] and down [e, H, I] as FP4Weight (gpt_oss, deepseek_v4), FP8Weight (deepseek_v3) or BF16 tensors (qwen3_moe,
        mixtral, olmoe), on the CPU; gpt_oss has gate_up_bias [e, 2I] and down_bias [e, H] in BF16, the others None.

    Raises:
        CheckpointError: a file or tensor is missing, unexpected, or of another shape or dtype; the experts are in NVFP4.
        ValueError: rank, num_ranks or family make no sense for this checkpoint.
    """
    config = read_json(Path(path) / "config.json")
    reader = _family(config, family)
    dims = reader.dims(config)
    check(num_ranks > 0 and dims.num_experts % num_ranks == 0, "load_experts", "num_ranks", f"a divisor of {dims.num_experts} experts",
          num_ranks, "use a group whose size divides it")
    check(0 <= rank < num_ranks, "load_experts", "rank", f"in [0, {num_ranks})", rank, "pass the rank in the EP group")
    num_local_experts = dims.num_experts // num_ranks
    experts = range(rank * num_local_experts, (rank + 1) * num_local_experts)
    sources = reader.sources(dims)
    with TensorFiles(Path(path)) as files:
        layer = _Layer(files, reader.prefix.format(layer=layer_idx), sources, dims.num_experts)
        layer.check_names()
        tensors = layer.allocate(experts)
        bar = tqdm(experts, desc=f"layer {layer_idx} experts", unit="expert", disable=not progress or rank != 0)
        for local_expert_idx, expert_idx in enumerate(bar):
            for source in sources:
                source.fill(tensors[source.target][local_expert_idx], layer.read(source, expert_idx))
    return reader.assemble(tensors)


def moe_config(path: str | Path, *, max_tokens_per_rank: int, precision: str | None = None) -> MoEConfig:
    """The MoEConfig of a checkpoint's layers, from its config.json.

    Args:
        path: directory with config.json.
        max_tokens_per_rank: capacity of one call on one rank, in tokens.
        precision: None takes the one the experts are stored for: fp8xfp4 for FP4, fp8xfp8 for FP8, bf16 for BF16.

    Raises:
        CheckpointError: config.json is missing, lacks a size, or is of an unknown family.
        ValueError: the sizes are not ones MoEConfig accepts.
    """
    config = read_json(Path(path) / "config.json")
    reader = _family(config, "auto")
    dims = reader.dims(config)
    swiglu = {name: config.get(name, value) for name, value in reader.swiglu.items()}
    return MoEConfig(hidden=dims.hidden, intermediate=dims.intermediate, num_experts=dims.num_experts,
                     num_topk=read_size(config, "num_experts_per_tok"), max_tokens_per_rank=max_tokens_per_rank,
                     precision=precision or reader.precision, **swiglu)


def _family(config: dict, name: str) -> Family:
    if name == "auto":
        name = config.get("model_type")
        require(name in FAMILIES, "model_type in config.json", f"one of {', '.join(FAMILIES)}", repr(name),
                "name one with load_experts(family=)")
    check(name in FAMILIES, "load_experts", "family", f"'auto' or one of {', '.join(FAMILIES)}", repr(name), "pick one of them")
    return FAMILIES[name]


class _Layer:
    """The expert tensors of one layer in an open checkpoint."""

    def __init__(self, files: TensorFiles, prefix: str, sources: list[Source], num_experts: int):
        self.files, self.prefix, self.sources, self.num_experts = files, prefix, sources, num_experts
        self.dtypes = {}  # stored dtype by target: every expert must have the same

    def name(self, source: Source, expert_idx: int) -> str:
        return self.prefix + source.name.format(expert=expert_idx)

    def check_names(self) -> None:
        """Compare the names of all ranks' experts, so that a broken checkpoint fails on every rank and not on one alone."""
        present = self.files.names_under(self.prefix)
        require(bool(present), "layer_idx", "an MoE layer of the checkpoint", f"no tensor under {self.prefix!r}",
                "pass the number of an MoE layer")
        self._refuse_nvfp4(present)
        expected = {self.name(source, expert_idx) for source in self.sources for expert_idx in range(self.num_experts)}
        missing, extra = sorted(expected.difference(present)), sorted(set(present).difference(expected))
        require(not missing, f"tensor {next(iter(missing), None)!r}", "in the checkpoint",
                f"{len(missing)} of {len(expected)} expert tensors missing", "download the whole checkpoint or pass the right family")
        require(not extra, f"tensors under {self.prefix!r}", f"the {len(expected)} of {self.num_experts} experts",
                f"also {next(iter(extra), None)!r}", "check the number of experts in config.json or pass the right family")

    def _refuse_nvfp4(self, names: list[str]) -> None:
        global_scales = [name for name in names if name.endswith(("weight_scale_2", "weight_global_scale"))]
        # One block scale is enough to tell, and each look-up may open a shard.
        block_scales = [name for name in names if name.endswith(("scale", "scales"))][:1]
        found = global_scales or [name for name in block_scales if self.files.stored_dtype(name) == "F8_E4M3"]
        require(not found, "experts", "MXFP4, 128 x 128 FP8 or BF16", f"NVFP4 ({next(iter(found), None)!r})",
                "NVFP4 has E4M3 scales per 16 values: dequantise it to BF16 first")

    def allocate(self, experts: range) -> dict[str, torch.Tensor]:
        """One empty tensor [e, ...] per target, of the dtype in which the first expert is stored."""
        for source in self.sources:
            name = self.name(source, experts[0])
            dtype = self.dtypes.setdefault(source.target, self.files.stored_dtype(name))
            require(dtype in source.dtypes, f"tensor {name!r}", " or ".join(source.dtypes), dtype, "pass the right family")
        return {target: torch.empty(len(experts), *target_shape(self.sources, target), dtype=TORCH_DTYPES[dtype])
                for target, dtype in self.dtypes.items()}

    def read(self, source: Source, expert_idx: int) -> torch.Tensor:
        name, dtype = self.name(source, expert_idx), self.dtypes[source.target]
        if source.is_stacked:
            return self.files.read(name, (self.num_experts, *source.shape), dtype, leading=expert_idx)
        return self.files.read(name, source.shape, dtype)
