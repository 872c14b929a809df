"""Routers: which experts a token goes to, and with what weight. Plain torch, FP32 logits, trainable through the weights.

Parameter and buffer names are those of the transformers routers, so that their state dicts load as they are.
Legend: T tokens, H hidden, E experts, K top-k, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamoe.errors import check

# DeepSeek's guard against a row whose scores all underflow; it does not change a sum that is not tiny.
NORM_EPS = 1e-20


def stable_topk(scores: Tensor, k: int) -> Tensor:
    """Indices [T, k] int64 of the largest scores [T, E], best first; of equal scores the lower index wins, on every device."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()


class Router(nn.Module):
    """Base of all routers: FP32 logits -> scores -> expert choice -> weights. Subclasses define `score` and may define `select`.

    Args:
        hidden: model width H.
        num_experts: routed experts E over all ranks.
        num_topk: experts K per token.
        norm_topk_prob: divide the K weights of a token by their sum.
        routed_scaling_factor: multiplies every weight, after the division.
        bias: add a learned bias [E] to the logits.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size or factor is out of range.
    """

    def __init__(self, hidden: int, num_experts: int, num_topk: int, *, norm_topk_prob: bool = False, routed_scaling_factor: float = 1.0,
                 bias: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.op = type(self).__name__
        check(hidden > 0, self.op, "hidden", "positive", hidden, "pass the width of the model")
        check(num_experts > 0, self.op, "num_experts", "positive", num_experts, "pass the number of routed experts")
        check(1 <= num_topk <= num_experts, self.op, "num_topk", f"in [1, {num_experts}]", num_topk, "route to at most num_experts experts")
        check(routed_scaling_factor > 0, self.op, "routed_scaling_factor", "positive", routed_scaling_factor, "1.0 means no scaling")
        self.hidden, self.num_experts, self.num_topk = hidden, num_experts, num_topk
        self.norm_topk_prob, self.routed_scaling_factor = norm_topk_prob, routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=dtype))  # [E, H]
        self.bias = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype)) if bias else None  # [E]
        nn.init.uniform_(self.weight, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor, input_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts for every token.

        Args:
            x: [T, H] floating point.
            input_ids: [T] token ids, for hash routing only; other routers ignore them.

        Returns:
            topk_idx [T, K] int64 and topk_weights [T, K] float32.

        Raises:
            ValueError: x is not [T, H], or hash routing lacks its token ids.
        """
        check(x.dim() == 2 and x.shape[1] == self.hidden, self.op, "x", f"[T, {self.hidden}]", list(x.shape), "flatten batch and sequence")
        scores = self.score(self.logits(x))  # [T, E] float32
        topk_idx = self.select(scores, input_ids)  # [T, K] int64
        return topk_idx, self.weigh(scores.gather(1, topk_idx))

    def logits(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, E] float32, also under autocast: BF16 logits would change which experts are chosen."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def score(self, logits: Tensor) -> Tensor:
        """Logits [T, E] float32 -> scores [T, E] float32, from which experts are chosen and weighted."""
        raise NotImplementedError

    def select(self, scores: Tensor, input_ids: Tensor | None) -> Tensor:
        """Scores [T, E] -> expert indices [T, K] int64."""
        return stable_topk(scores, self.num_topk)

    def weigh(self, chosen: Tensor) -> Tensor:
        """Scores of the chosen experts [T, K] -> weights [T, K]."""
        if self.norm_topk_prob:
            chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + NORM_EPS)
        return chosen * self.routed_scaling_factor

    def extra_repr(self) -> str:
        return (f"hidden={self.hidden}, num_experts={self.num_experts}, num_topk={self.num_topk}, norm_topk_prob={self.norm_topk_prob}, "
                f"routed_scaling_factor={self.routed_scaling_factor}")


class SoftmaxRouter(Router):
    """Softmax over all experts and then top-k (Qwen3-MoE, OLMoE, Mixtral), or top-k first and softmax over the chosen (gpt-oss).

    Args:
        topk_first: softmax over the K chosen logits only. The weights then sum to one, so norm_topk_prob must stay False.
        The others: see Router.
    """

    def __init__(self, hidden: int, num_experts: int, num_topk: int, *, topk_first: bool = False, **options):
        super().__init__(hidden, num_experts, num_topk, **options)
        check(not (topk_first and self.norm_topk_prob), self.op, "norm_topk_prob", "False with topk_first", True,
              "the weights sum to one already")
        self.topk_first = topk_first

    def score(self, logits: Tensor) -> Tensor:
        return logits if self.topk_first else logits.softmax(dim=-1)

    def weigh(self, chosen: Tensor) -> Tensor:
        return super().weigh(chosen.softmax(dim=-1) if self.topk_first else chosen)


class _CorrectedRouter(Router):
    """Routers that add a correction bias to the scores when they choose, but not when they weigh."""

    def __init__(self, hidden: int, num_experts: int, num_topk: int, *, norm_topk_prob: bool = True,
                 device: torch.device | str | None = None, **options):
        super().__init__(hidden, num_experts, num_topk, norm_topk_prob=norm_topk_prob, device=device, **options)
        # A buffer: load balancing sets it, not a gradient.
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, device=device, dtype=torch.float32))  # [E]

    def select(self, scores: Tensor, input_ids: Tensor | None) -> Tensor:
        return stable_topk(scores + self.e_score_correction_bias, self.num_topk)


class SigmoidRouter(_CorrectedRouter):
    """Sigmoid scores with a correction bias and group limits (DeepSeek-V3).

    Experts form `n_group` groups of neighbours. A token may use the `topk_group` groups whose two best scores have the largest sums.

    Args:
        n_group: number of groups; divides num_experts. 1: no limit.
        topk_group: groups a token may use.
        The others: see Router; norm_topk_prob is True by default.
    """

    def __init__(self, hidden: int, num_experts: int, num_topk: int, *, n_group: int = 1, topk_group: int = 1, **options):
        super().__init__(hidden, num_experts, num_topk, **options)
        check(n_group > 0 and num_experts % n_group == 0, self.op, "n_group", f"a divisor of {num_experts} experts", n_group,
              "1 means no groups")
        check(1 <= topk_group <= n_group, self.op, "topk_group", f"in [1, {n_group}]", topk_group, "use at most n_group groups")
        group_size = num_experts // n_group
        check(n_group == 1 or group_size >= 2, self.op, "n_group", f"at most {num_experts // 2}", n_group, "a group needs two experts")
        check(num_topk <= topk_group * group_size, self.op, "num_topk", f"at most {topk_group * group_size}", num_topk,
              f"{topk_group} groups of {group_size} experts have no more")
        self.n_group, self.topk_group = n_group, topk_group

    def score(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def select(self, scores: Tensor, input_ids: Tensor | None) -> Tensor:
        if self.n_group == 1:
            return super().select(scores, input_ids)
        grouped = (scores + self.e_score_correction_bias).unflatten(1, (self.n_group, -1))  # [T, G, E / G]
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)  # [T, G]
        group_idx = stable_topk(group_scores, self.topk_group)
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, group_idx, False)
        return stable_topk(grouped.masked_fill(excluded.unsqueeze(-1), -torch.inf).flatten(1), self.num_topk)


class SqrtSoftplusRouter(_CorrectedRouter):
    """Scores sqrt(softplus(logits)) with a correction bias (DeepSeek-V4). Args: see Router; norm_topk_prob is True by default."""

    def score(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sqrt()


class HashRouter(Router):
    """Experts looked up by token id, weights from the gate's sqrt(softplus(logits)) (the first layers of DeepSeek-V4).

    Args:
        table: [V, K] integer, the experts of each token id.
        The others: see Router; norm_topk_prob is True by default.

    Raises:
        ValueError: the table is not [V, K] integer or names an expert that does not exist.
    """

    def __init__(self, hidden: int, num_experts: int, table: Tensor, *, norm_topk_prob: bool = True,
                 device: torch.device | str | None = None, **options):
        check(table.dim() == 2 and not table.is_floating_point(), "HashRouter", "table", "[V, K] integer",
              f"{list(table.shape)} {table.dtype}", "pass the experts of each token id")
        super().__init__(hidden, num_experts, table.shape[1], norm_topk_prob=norm_topk_prob, device=device, **options)
        least, most = table.min().item(), table.max().item()
        check(least >= 0 and most < num_experts, self.op, "table", f"experts in [0, {num_experts})", f"[{least}, {most}]",
              "pass the table that belongs to this layer")
        self.register_buffer("tid2eid", table.to(device=device, dtype=torch.int64, copy=True))  # [V, K]

    def score(self, logits: Tensor) -> Tensor:
        return F.softplus(logits).sqrt()

    def select(self, scores: Tensor, input_ids: Tensor | None) -> Tensor:
        num_tokens = scores.shape[0]
        got = None if input_ids is None else list(input_ids.shape)
        check(input_ids is not None and input_ids.numel() == num_tokens, self.op, "input_ids", f"{num_tokens} token ids", got,
              "call with input_ids=, one per row of x")
        return self.tid2eid[input_ids.reshape(-1)]
