"""The kernels that models use, as (op, config, text, entry): what prewarm compiles ahead and what the kernel check looks at."""

from collections.abc import Callable, Hashable

import torch

from megamoe.comm.budget import plan_dims
from megamoe.comm.protocol import EVERY, ArenaDims, pack
from megamoe.config import MoEConfig
from megamoe.kernels import fold_tokens, fp4_gemm, mega_moe, moe_sources, row_bounds
from megamoe.kernels.fp4_gemm_config import OP as FP4_GEMM
from megamoe.kernels.fp4_gemm_config import Fp4GemmConfig
from megamoe.kernels.layout_probe import probe_source
from megamoe.kernels.library import TOKEN_GROUPS
from megamoe.kernels.mega_moe_config import OP as MEGA_MOE
from megamoe.kernels.moe_gemms import all_moe_gemms
from megamoe.kernels.permute import PERMUTE, UNPERMUTE, permute_source, unpermute_source
from megamoe.kernels.quantize_tokens import config as quantize_config
from megamoe.kernels.quantize_tokens import source as quantize_source
from megamoe.kernels.tuning.mega import all_mega
from megamoe.kernels.tuning.moe_shape import MoEShape
from megamoe.kernels.tuning.sm90 import choose_fp4_gemm

ShippedKernel = tuple[str, Hashable, Callable[[], str], str]

# hidden, intermediate, num_experts, num_topk
MODELS = {
    "v4-pro": (7168, 3072, 384, 6),
    "v4-flash": (4096, 2048, 256, 6),
    "v3": (7168, 2048, 256, 8),
    "qwen3-30b": (2048, 768, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "gpt-oss-120b": (2880, 2880, 128, 4),
}
BIASED_MODELS = ("gpt-oss-120b",)
NUM_SMS = 132  # H100 SXM and H200
NUM_RANKS = (1, 2, 4, 8)
MEGA_RANKS = {"v4-pro": (1, 2, 4)}  # 4 for the others: another number of ranks changes constants, not the code
TOKENS_PER_RANK = tuple(1 << i for i in range(14))
# Of rows, and of their scales where these are no multiple of it (2880 / 32).
PERMUTE_VECTOR_BYTES = (16, 2)
PROBE_ENTRY = "_ZN7megamoe12layout_probeI5ProbeEEvNS_4SymmEj"


def shipped_kernels(models: tuple[str, ...] = tuple(MODELS)) -> list[ShippedKernel]:
    """(op, config, make_source, entry) of every kernel that these models use, each once."""
    gemms = dict.fromkeys(config for model in models for config in (*gemm_configs(model), *moe_gemm_configs(model)))
    return [
        *(_layout_probe(precision) for precision in EVERY),
        (fold_tokens.OP, None, fold_tokens.source, fold_tokens.ENTRY),
        *((name, None, lambda name=name: row_bounds.source(name), name) for name in ("row_bounds", "group_bounds")),
        *elementwise_kernels(),
        *_moe_dispatch(),
        *(kernel for model in models for kernel in mega_moe_kernels(model)),
        *((FP4_GEMM, config, lambda config=config: fp4_gemm.source(config), fp4_gemm.ENTRY) for config in gemms),
    ]


def elementwise_kernels() -> list[ShippedKernel]:
    """The public elementwise ops on BF16; they do not depend on the model."""
    found = []
    for op, params in (("quantize_tokens", "QuantizeTokensParams"), ("swiglu_quantize", "SwigluQuantizeParams")):
        for config in (quantize_config(torch.bfloat16, group) for group in TOKEN_GROUPS):
            found.append((op, config, lambda op=op, params=params, config=config: quantize_source(op, params, config), op))
    found += [(PERMUTE, size, lambda size=size: permute_source(size), PERMUTE) for size in PERMUTE_VECTOR_BYTES]
    return [*found, (UNPERMUTE, None, unpermute_source, UNPERMUTE)]


def gemm_configs(model: str) -> list[Fp4GemmConfig]:
    """What both linears of a model run with: every number of ranks that divides its experts, 1 to 8192 tokens on each, routed evenly."""
    hidden, intermediate, num_experts, num_topk = MODELS[model]
    configs = {}
    for num_ranks in (r for r in NUM_RANKS if num_experts % r == 0):
        for num_tokens in TOKENS_PER_RANK:
            num_rows, num_groups = num_tokens * num_ranks * num_topk, num_experts // num_ranks
            rows_per_group = -(-num_rows // num_experts)
            for n, k, epilogue in ((2 * intermediate, hidden, "swiglu"), (hidden, intermediate, "store")):
                configs[choose_fp4_gemm(n, k, num_groups, num_rows, rows_per_group, epilogue, NUM_SMS)] = None
    return list(configs)


def moe_gemm_configs(model: str) -> list[Fp4GemmConfig]:
    """What a layer of the unfused engine loads for a model, for every number of ranks that divides its experts and up to 8192 tokens."""
    configs = {}
    for num_ranks in (r for r in NUM_RANKS if MODELS[model][2] % r == 0):
        for pair in all_moe_gemms(_moe_shape(model, num_ranks), TOKENS_PER_RANK[-1]).values():
            configs |= {pair.gate_up: None, pair.down: None}
    return list(configs)


def mega_moe_kernels(model: str) -> list[ShippedKernel]:
    """What a layer of the fused engine loads for a model at up to 8192 tokens per rank, each text once."""
    found = {}
    for num_ranks in MEGA_RANKS.get(model, (4,)):
        dims = _largest_arena("fp8xfp4", model, num_ranks)
        shape = _moe_shape(model, num_ranks)
        for config in all_mega(shape, TOKENS_PER_RANK[-1], dims.pool_rows).values():
            found[config, dims] = (MEGA_MOE, config, lambda config=config, dims=dims: mega_moe.source(config, dims), MEGA_MOE)
    return list(found.values())


def _moe_shape(model: str, num_ranks: int) -> MoEShape:
    hidden, intermediate, num_experts, num_topk = MODELS[model]
    return MoEShape(hidden=hidden, intermediate=intermediate, num_experts=num_experts, num_topk=num_topk, num_ranks=num_ranks,
                    has_down_bias=model in BIASED_MODELS, scatter=True, num_sms=NUM_SMS)


def _layout_probe(precision: str) -> ShippedKernel:
    dims = _largest_arena(precision)
    return "layout_probe", dims, lambda: probe_source(pack(dims)), PROBE_ENTRY


def _moe_dispatch() -> list[ShippedKernel]:
    """Of the unfused engine, then of the fused one, which routes all rows in one pass."""
    dims = _largest_arena("fp8xfp4")
    found = [(op, dims, lambda op=op: moe_sources.source(op, dims), op) for op in moe_sources.OPS]
    return found + [(op, (dims, "one pass"), lambda op=op: moe_sources.source(op, dims, is_one_pass=True), op)
                    for op in moe_sources.ROUTING_OPS]


def _largest_arena(precision: str, model: str = "v4-pro", num_ranks: int = 4) -> ArenaDims:
    hidden, intermediate, num_experts, num_topk = MODELS[model]
    sizes = {"hidden": hidden, "intermediate": intermediate, "num_experts": num_experts, "num_topk": num_topk}
    return plan_dims(MoEConfig(**sizes, max_tokens_per_rank=TOKENS_PER_RANK[-1], precision=precision), num_ranks)
