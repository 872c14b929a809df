"""A stand-in for the deep_ep package on CPU ranks: the meaning of its dispatch and combine, and the operands its kernels can take.

Rows cross by all_gather_object. `installed` puts it where `import deep_ep` finds it.
"""

import contextlib
import sys
import types

import torch
import torch.distributed as dist


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert hidden_bytes % 512 == 0, "combine takes rows that are a multiple of a warp's 16-byte loads"
        return hidden_bytes * num_ranks


class Buffer:
    num_alive = 0

    def __init__(self, group, num_nvl_bytes: int):
        assert num_nvl_bytes > 0
        self.group, self.rank, self.size = group, group.rank(), group.size()
        dist.barrier(group)
        Buffer.num_alive += 1

    def __del__(self):
        Buffer.num_alive -= 1

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        assert num_ranks in (2, 4, 8)
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.is_contiguous() and topk_idx.dtype == torch.int64
        is_routed = (topk_idx >= 0)[..., None]
        rank_of = topk_idx[..., None] // (num_experts // self.size)
        is_token_in_rank = ((rank_of == torch.arange(self.size)) & is_routed).any(1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        assert len(per_expert) == num_experts
        return is_token_in_rank.sum(0).int(), None, per_expert, is_token_in_rank, None

    def dispatch(self, x, *, topk_idx, topk_weights, num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank):
        codes, scales = x
        assert codes.is_contiguous() and codes.shape[1] % 32 == 0 and codes.element_size() == 1
        assert scales.dim() == 2 and scales.dtype in (torch.int32, torch.float32)
        assert torch.equal(is_token_in_rank.sum(0).int(), num_tokens_per_rank)
        num_local = len(num_tokens_per_expert) // self.size
        sent = self._gather((codes.view(torch.uint8), scales, topk_idx, topk_weights, is_token_in_rank))
        picked = [[part[is_here[:, self.rank]] for part in parts] for *parts, is_here in sent]
        codes_in, scales_in, idx, weights = (torch.cat(column) for column in zip(*picked))
        local = idx - self.rank * num_local
        is_local = (local >= 0) & (local < num_local) & (idx >= 0)
        counts = torch.bincount(local[is_local], minlength=num_local).tolist()
        masks = [parts[-1] for parts in sent]
        return ((codes_in.view(codes.dtype), scales_in), torch.where(is_local, local, -1), torch.where(is_local, weights, 0.0), counts,
                tuple(masks), None)

    def combine(self, x, handle):
        assert x.is_contiguous() and x.dtype == torch.bfloat16 and x.shape[1] % 256 == 0
        num_received = [int(mask[:, self.rank].sum()) for mask in handle]
        assert sum(num_received) == len(x)
        total = torch.zeros(len(handle[self.rank]), x.shape[1])
        for peer, blocks in enumerate(self._gather(x.split(num_received))):
            total[handle[self.rank][:, peer]] += blocks[self.rank].float()
        return total.bfloat16(), None, None

    def _gather(self, value) -> list:
        values = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values


@contextlib.contextmanager
def installed(is_missing: bool = False):
    """`import deep_ep` finds the stand-in, or fails if `is_missing`."""
    module = types.ModuleType("deep_ep")
    module.Buffer = Buffer
    sys.modules["deep_ep"] = None if is_missing else module
    try:
        yield
    finally:
        del sys.modules["deep_ep"]
