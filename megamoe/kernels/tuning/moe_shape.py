"""MoEShape: what the kernel configs of a MoE layer depend on, and the buckets of token counts that share one."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """What the configs of a layer depend on. `scatter`: linear 2 writes each row to an address of its own."""

    hidden: int
    intermediate: int
    num_experts: int
    num_topk: int
    num_ranks: int
    has_down_bias: bool
    scatter: bool
    num_sms: int


def token_bucket(num_tokens: int) -> int:
    """The power of two that stands for `num_tokens` tokens of a rank, so that few configs serve every call."""
    return 1 << max(0, num_tokens - 1).bit_length()
