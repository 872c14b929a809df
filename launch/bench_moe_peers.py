"""The layer in plain PyTorch, BF16: all_to_all_single, torch._grouped_mm and all_to_all_single back, for comparison on the same draws.

Legend: T tokens of this rank, K top-k slots, R rows received, W ranks, e local experts, H hidden, I intermediate.
"""

import torch
import torch.distributed as dist

from megamoe import MoEConfig
from megamoe.formats import ExpertWeights
from megamoe.reference.swiglu import swiglu

MEMORY_PART = 0.5  # of what is free: rows and temporaries need the rest
TORCH_PEER = "torch bf16"
TORCH_INCLUDES = "BF16 all-to-all, sort, both grouped GEMMs, combine, reduce; the host waits for the counts"


def why_not(cfg: MoEConfig, device: torch.device) -> str | None:
    """Why the peer cannot run on some rank, None if it can on all. Collective."""
    needed = 6 * cfg.num_local_experts(dist.get_world_size()) * cfg.hidden * cfg.intermediate
    free = torch.tensor(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else needed / MEMORY_PART, dtype=torch.float64,
                        device=device)
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if needed <= MEMORY_PART * free.item():
        return None
    return f"BF16 weights take {needed / 1e9:.1f} GB, more than half of the {free.item() / 1e9:.1f} GB that are free"


class TorchPeer:
    """One MoE layer; called as a MegaMoE layer is. Collective, and the host waits for the counts of every call."""

    def __init__(self, cfg: MoEConfig, weights: ExpertWeights):
        self.cfg = cfg
        weights = weights.to_precision("bf16")
        self._gate_up, self._down = weights.gate_up.transpose(1, 2), weights.down.transpose(1, 2)  # [e, H, 2I], [e, I, H]
        self._biases = [None if bias is None else bias.bfloat16() for bias in (weights.gate_up_bias, weights.down_bias)]

    def __call__(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        num_ranks, num_local_experts = dist.get_world_size(), self._gate_up.shape[0]
        order = topk_idx.flatten().argsort(stable=True)
        order = order[(topk_idx < 0).sum():]  # skipped slots come first
        sent = torch.bincount(topk_idx.flatten()[order], minlength=self.cfg.num_experts)  # [E]
        received = torch.empty_like(sent)  # [W, e]
        dist.all_to_all_single(received, sent)
        splits_out, splits_in = torch.stack((sent, received)).unflatten(1, (num_ranks, -1)).sum(2).tolist()
        rows = _exchange(x[order // self.cfg.num_topk], splits_out, splits_in)  # [R, H], by source rank, then expert
        experts = torch.arange(num_local_experts, device=x.device).repeat(num_ranks)
        by_expert, back = experts.repeat_interleave(received).sort(stable=True)  # [R]
        done = torch.empty_like(rows)
        done[back] = self._experts(rows[back], by_expert)
        partials = x.new_zeros(topk_idx.numel(), x.shape[1])  # [T * K, H]
        partials[order] = _exchange(done, splits_in, splits_out)
        return torch.bmm(topk_weights.bfloat16()[:, None], partials.view(*topk_idx.shape, x.shape[1])).squeeze(1)

    def _experts(self, rows: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """rows [R, H] ordered by local expert [R] -> [R, H]."""
        if not len(rows):
            return rows
        gate_up_bias, down_bias = self._biases
        ends = torch.bincount(expert, minlength=self._gate_up.shape[0]).cumsum(0).int()
        h = torch._grouped_mm(rows, self._gate_up, offs=ends, out_dtype=torch.bfloat16)
        if gate_up_bias is not None:
            h += gate_up_bias[expert]
        a = swiglu(*h.chunk(2, dim=1), limit=self.cfg.swiglu_limit, alpha=self.cfg.swiglu_alpha, up_bias=self.cfg.swiglu_up_bias)
        out = torch._grouped_mm(a.bfloat16(), self._down, offs=ends, out_dtype=torch.bfloat16)
        return out if down_bias is None else out + down_bias[expert]


def _exchange(rows: torch.Tensor, splits_out: list[int], splits_in: list[int]) -> torch.Tensor:
    received = rows.new_empty(sum(splits_in), rows.shape[1])
    dist.all_to_all_single(received, rows, splits_in, splits_out)
    return received
