"""MoEConfig: what one MoE layer computes. Everything about how it is computed (tiles, engines, buffers) lives elsewhere."""

from dataclasses import asdict, dataclass

from megamoe.errors import check

FP8_PRECISIONS = ("fp8xfp4", "fp8xfp8")
PRECISIONS = (*FP8_PRECISIONS, "bf16", "fp32")
X_GROUP = 32  # channels per scale of the layer's input in the fp8 precisions
SIZE_QUANTUM = 32
MAX_TOPK = 32


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One MoE layer.

    Args:
        hidden: model width H, a multiple of 32.
        intermediate: width I of one expert after gating, a multiple of 32.
        num_experts: routed experts E over all ranks.
        num_topk: slots K per token, 1..32.
        max_tokens_per_rank: capacity T of one call on one rank; buffers are sized by it.
        precision: activations x weights. "fp8xfp4" (E4M3 with UE8M0 per 32 channels x E2M1 with UE8M0 per 32), "fp8xfp8" (weights E4M3
            with one scale per 128 x 128 block), "bf16", or "fp32" (reference engine only: proves that a replaced layer is wired right).
        activation: "swiglu".
        swiglu_limit: c in gate <= c, -c <= up <= c. None: no clamp.
        swiglu_alpha: None: a = silu(gate) * up. Otherwise a = gate * sigmoid(alpha * gate) * (up + swiglu_up_bias), as gpt-oss has it.
        swiglu_up_bias: added to up in the second form; 0 in the first.

    Raises:
        ValueError: a size is not positive or not a multiple of 32, or an option is unknown or has no effect.
    """

    hidden: int
    intermediate: int
    num_experts: int
    num_topk: int
    max_tokens_per_rank: int
    precision: str = "fp8xfp4"
    activation: str = "swiglu"
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_up_bias: float = 0.0

    def __post_init__(self):
        def need(ok: bool, what: str, expected: object, fix: str) -> None:
            check(ok, "MoEConfig", what, expected, getattr(self, what), fix)

        for name in ("hidden", "intermediate"):
            size = getattr(self, name)
            need(size > 0 and size % SIZE_QUANTUM == 0, name, f"a positive multiple of {SIZE_QUANTUM}", "pad the weights with zeros")
        for name in ("num_experts", "max_tokens_per_rank"):
            need(getattr(self, name) > 0, name, "positive", "pass the size of the layer")
        most = min(MAX_TOPK, self.num_experts)
        need(1 <= self.num_topk <= most, "num_topk", f"in [1, {most}]", f"top-k is at most {MAX_TOPK} and at most num_experts")
        need(self.precision in PRECISIONS, "precision", f"one of {PRECISIONS}", "pick one of them")
        need(self.activation == "swiglu", "activation", "'swiglu'", "no other activation is implemented")
        need(self.swiglu_limit is None or self.swiglu_limit > 0, "swiglu_limit", "None or positive", "None means no clamp")
        need(self.swiglu_alpha is not None or self.swiglu_up_bias == 0, "swiglu_up_bias", "0 without swiglu_alpha",
             "it would have no effect")

    def num_local_experts(self, num_ranks: int) -> int:
        """Experts per rank; experts [rank * e, (rank + 1) * e) live on `rank`. Raises ValueError if they do not divide evenly."""
        check(self.num_experts % num_ranks == 0, "MoEConfig", "num_experts", f"divisible by the {num_ranks} ranks of the EP group",
              self.num_experts, "use a group whose size divides it")
        return self.num_experts // num_ranks

    @property
    def is_fp8(self) -> bool:
        """Whether activations are E4M3 codes with scales."""
        return self.precision in FP8_PRECISIONS

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
