"""How each checkpoint family names, shapes and orders the tensors of one layer's experts, and which config.json keys describe them.

Everything here is a table or turns a table into `Source` rows; the reading itself is in the package's __init__.
Legend: E experts, H hidden, I intermediate, N x K one weight matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import ceil, prod

import torch

from megamoe.formats import ExpertWeights, FP4Weight, FP8Weight
from megamoe.integrations.checkpoints.index import require


@dataclass(frozen=True)
class Dims:
    num_experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """One stored tensor and the rows it fills of one tensor of ExpertWeights."""

    name: str  # below the layer's prefix; with {expert}: a tensor per expert, without: one tensor stacks all E in its first dimension
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]  # of one expert
    target: str  # "gate_up.codes", "down.scales", "gate_up_bias", ...
    first_row: int = 0
    interleaved: bool = False  # stored rows alternate gate, up

    @property
    def is_stacked(self) -> bool:
        return "{expert}" not in self.name

    def fill(self, target: torch.Tensor, stored: torch.Tensor) -> None:
        """Copy one expert's stored tensor to its rows of `target` [rows, columns] or [rows], gate rows before up rows."""
        if self.interleaved:
            stored = torch.cat((stored[0::2], stored[1::2]))
        rows = target[self.first_row : self.first_row + self.shape[0]]
        rows.copy_(stored.reshape(rows.shape))


@dataclass(frozen=True)
class Part:
    """One tensor of a quantised matrix [N, K]: it holds one element per `block` of N x K."""

    suffix: str
    role: str
    dtypes: tuple[str, ...]
    block: tuple[int, int]


BF16 = (Part("weight", "codes", ("BF16",), (1, 1)),)
FP8 = (Part("weight", "codes", ("F8_E4M3",), (1, 1)), Part("weight_scale_inv", "scales", ("F32", "F8_E8M0"), (128, 128)))
FP4 = (Part("weight", "codes", ("I8", "U8"), (1, 2)), Part("scale", "scales", ("F8_E8M0", "U8"), (1, 32)))


def per_expert_sources(dims: Dims, *, gate: str, up: str, down: str, parts: tuple[Part, ...]) -> list[Source]:
    """Sources of families that keep gate, up and down of every expert apart."""
    hidden, intermediate = dims.hidden, dims.intermediate
    rows_per_scale = max(part.block[0] for part in parts)
    require(intermediate % rows_per_scale == 0, "intermediate size", f"a multiple of {rows_per_scale}", intermediate,
            "a scale block must not span gate and up rows")
    matrices = ((gate, "gate_up", 0, intermediate, hidden), (up, "gate_up", intermediate, intermediate, hidden),
                (down, "down", 0, hidden, intermediate))
    return [
        Source(name=f"{{expert}}.{projection}.{part.suffix}", dtypes=part.dtypes, target=f"{matrix}.{part.role}",
               shape=(ceil(num_rows / part.block[0]), ceil(num_columns / part.block[1])), first_row=first_row // part.block[0])
        for projection, matrix, first_row, num_rows, num_columns in matrices for part in parts
    ]


def gpt_oss_sources(dims: Dims) -> list[Source]:
    """Sources of gpt-oss: tensors that stack all experts, gate and up rows interleaved, 16 bytes of codes per scale."""
    matrices = (("gate_up", 2 * dims.intermediate, dims.hidden, True), ("down", dims.hidden, dims.intermediate, False))
    sources = []
    for matrix, num_rows, num_columns, interleaved in matrices:
        groups = num_columns // 32
        sources += [
            Source(name=f"{matrix}_proj_blocks", dtypes=("U8",), shape=(num_rows, groups, 16), target=f"{matrix}.codes",
                   interleaved=interleaved),
            Source(name=f"{matrix}_proj_scales", dtypes=("U8",), shape=(num_rows, groups), target=f"{matrix}.scales",
                   interleaved=interleaved),
            Source(name=f"{matrix}_proj_bias", dtypes=("BF16",), shape=(num_rows,), target=f"{matrix}_bias", interleaved=interleaved),
        ]
    return sources


def target_shape(sources: list[Source], target: str) -> tuple[int, ...]:
    """Shape of one expert's `target`: the rows of all its sources, with what lies behind a row flattened."""
    shapes = [source.shape for source in sources if source.target == target]
    num_rows = sum(shape[0] for shape in shapes)
    return (num_rows, prod(shapes[0][1:])) if len(shapes[0]) > 1 else (num_rows,)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One way of storing experts, and what config.json leaves to the model's code."""

    prefix: str  # of the experts of layer {layer}
    sources: Callable[[Dims], list[Source]]
    weight: type | None  # FP4Weight, FP8Weight, or None for plain BF16 tensors
    precision: str
    intermediate_key: str = "moe_intermediate_size"
    swiglu: dict[str, float] = field(default_factory=dict)  # arguments of MoEConfig; config.json may hold others under the same names

    def dims(self, config: dict) -> Dims:
        """Sizes from config.json. Raises CheckpointError for one that is missing, or for experts of another kind."""
        for key, expected in TAKEN_FOR_GRANTED.items():
            require(config.get(key, expected) == expected, f"{key} in config.json", repr(expected), repr(config.get(key)),
                    "no reader for experts of this kind exists")
        experts_key = next((key for key in NUM_EXPERTS_KEYS if key in config), NUM_EXPERTS_KEYS[0])
        return Dims(*(read_size(config, key) for key in (experts_key, "hidden_size", self.intermediate_key)))

    def assemble(self, tensors: dict[str, torch.Tensor]) -> ExpertWeights:
        """ExpertWeights from tensors [e, ...] by target name."""
        def matrix(name: str) -> torch.Tensor | FP4Weight | FP8Weight:
            codes = tensors[f"{name}.codes"]
            return codes if self.weight is None else self.weight(codes, tensors[f"{name}.scales"])

        return ExpertWeights(matrix("gate_up"), matrix("down"), tensors.get("gate_up_bias"), tensors.get("down_bias"))


def read_size(config: dict, key: str) -> int:
    """A positive integer from config.json. Raises CheckpointError otherwise."""
    value = config.get(key)
    require(isinstance(value, int) and value > 0, f"{key} in config.json", "a positive integer", value, "pass the right family")
    return value


TAKEN_FOR_GRANTED = {"hidden_act": "silu", "expert_dtype": "fp4"}  # config.json values; expert_dtype is a key of DeepSeek-V4 alone
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")  # Qwen3-MoE changed its spelling over time
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NUMBERED = {"gate": "w1", "up": "w3", "down": "w2"}
MLP_EXPERTS = "model.layers.{layer}.mlp.experts."

FAMILIES = {  # by model_type of config.json
    "gpt_oss": Family(
        prefix=MLP_EXPERTS, sources=gpt_oss_sources, weight=FP4Weight, precision="fp8xfp4", intermediate_key="intermediate_size",
        swiglu={"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_up_bias": 1.0}),
    "deepseek_v4": Family(
        prefix="layers.{layer}.ffn.experts.", sources=partial(per_expert_sources, **NUMBERED, parts=FP4), weight=FP4Weight,
        precision="fp8xfp4", swiglu={"swiglu_limit": 10.0}),
    "deepseek_v3": Family(
        prefix=MLP_EXPERTS, sources=partial(per_expert_sources, **PROJECTIONS, parts=FP8), weight=FP8Weight, precision="fp8xfp8"),
    "qwen3_moe": Family(
        prefix=MLP_EXPERTS, sources=partial(per_expert_sources, **PROJECTIONS, parts=BF16), weight=None, precision="bf16"),
    "mixtral": Family(
        prefix="model.layers.{layer}.block_sparse_moe.experts.", sources=partial(per_expert_sources, **NUMBERED, parts=BF16), weight=None,
        precision="bf16", intermediate_key="intermediate_size"),
    "olmoe": Family(
        prefix=MLP_EXPERTS, sources=partial(per_expert_sources, **PROJECTIONS, parts=BF16), weight=None, precision="bf16",
        intermediate_key="intermediate_size"),
}
