"""The two fp4_gemms of an MoE layer: which configs serve which number of tokens, and loading them ahead of a call."""

import functools
from dataclasses import dataclass

from megamoe.kernels import fp4_gemm
from megamoe.kernels.fp4_gemm_config import OP, Fp4GemmConfig
from megamoe.kernels.loading import load_kernels
from megamoe.kernels.tuning.moe_shape import MoEShape, token_bucket
from megamoe.kernels.tuning.sm90 import choose_fp4_gemm


@dataclass(frozen=True)
class MoEGemms:
    """Configs of linear 1 with its gate, and of linear 2."""

    gate_up: Fp4GemmConfig
    down: Fp4GemmConfig


@functools.lru_cache(maxsize=4096)
def choose_moe_gemms(shape: MoEShape, num_tokens: int) -> MoEGemms:
    """The configs for calls with about `num_tokens` tokens on each rank, routed evenly. Correct for any call, fast for these."""
    num_rows = token_bucket(num_tokens) * shape.num_ranks * shape.num_topk
    rows_per_expert = -(-num_rows // shape.num_experts)

    def choose(n: int, k: int, epilogue: str) -> Fp4GemmConfig:
        return choose_fp4_gemm(n, k, shape.num_experts // shape.num_ranks, num_rows, rows_per_expert, epilogue, shape.num_sms)

    return MoEGemms(choose(2 * shape.intermediate, shape.hidden, "swiglu"),
                    choose(shape.hidden, shape.intermediate, "store").with_output(has_bias=shape.has_down_bias, scatter=shape.scatter))


def all_moe_gemms(shape: MoEShape, max_tokens: int) -> dict[int, MoEGemms]:
    """By `token_bucket`, the configs of every call with up to `max_tokens` tokens."""
    buckets = (1 << i for i in range(token_bucket(max_tokens).bit_length()))
    return {bucket: choose_moe_gemms(shape, bucket) for bucket in buckets}


def load_gemms(configs: frozenset[Fp4GemmConfig], device: int) -> None:
    """Load the kernels of `configs` on `device`."""
    load_kernels(((OP, config, lambda config=config: fp4_gemm.source(config), fp4_gemm.ENTRY) for config in configs), device)
