"""Who sends how many rows to whom in which pass of the NCCL transport. Pure arithmetic on the counts of all ranks.

A receiver's rows are ordered by expert, then source rank, then as the source lists them; pass p takes the places [p * P, (p+1) * P) of that
order. A source lists its rows by expert, so what a pass takes of it is one contiguous range.

Legend: W ranks, E experts, e local experts, P pool rows.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExchangePlan:
    """The exchange as one rank sees it.

    Example: 2 ranks, 2 experts, P = 2. Rank 0 has [1, 2] rows for experts 0 and 1, rank 1 has [2, 0]. Rank 0 receives 1 + 2 rows for
    expert 0 and needs two passes, rank 1 one. Rank 0 sends [1, 2] rows to ranks 0 and 1 in pass 0 and none in pass 1; rank 1 sends
    [1, 0], then [1, 0].
    """

    num_passes: int  # the most that any rank needs
    send_begin: torch.Tensor  # [num_passes, W] int64: the first row for each rank, among this rank's rows in its own order
    send_counts: torch.Tensor  # [num_passes, W] int64
    receive_counts: torch.Tensor  # [num_passes, W, e] int64: rows of each source and local expert

    def offsets(self, pass_idx: int) -> torch.Tensor:
        """[e+1] int32: where the rows of each local expert begin in a pass."""
        counts = self.receive_counts[pass_idx].sum(0)
        return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()

    def expert_order(self, pass_idx: int) -> torch.Tensor:
        """[n] int64: for each place of the expert order, the row in order of arrival, which is by source, then expert."""
        counts = self.receive_counts[pass_idx]
        num_local_experts = counts.shape[1]
        expert = torch.arange(num_local_experts).repeat(counts.shape[0]).repeat_interleave(counts.flatten())
        return expert.argsort(stable=True)


def plan_exchange(counts: torch.Tensor, rank: int, pool_rows: int) -> ExchangePlan:
    """The plan of `rank`.

    Args:
        counts: [W, E] int64 on the CPU: rows that each rank has for each expert.
        pool_rows: P.
    """
    num_ranks, num_experts = counts.shape
    blocks = counts.view(num_ranks, num_ranks, -1)  # [source, receiver, e]
    by_receiver = blocks.permute(1, 2, 0)  # [receiver, e, source]
    flat = by_receiver.flatten(1)
    begin = (flat.cumsum(1) - flat).view(by_receiver.shape).permute(2, 0, 1)  # [source, receiver, e]: first place of each block
    num_passes = max(1, -(-int(flat.sum(1).max()) // pool_rows))
    borders = torch.arange(num_passes + 1).view(-1, 1, 1, 1) * pool_rows
    before = torch.minimum((borders - begin).clamp(min=0), blocks)  # [num_passes+1, source, receiver, e]: rows of a block before a border
    taken = before[1:] - before[:-1]
    sent_before = before[:-1, rank].sum(-1)  # [num_passes, receiver]
    per_receiver = blocks[rank].sum(-1)
    first = per_receiver.cumsum(0) - per_receiver
    return ExchangePlan(num_passes, first + sent_before, taken[:, rank].sum(-1), taken[:, :, rank])
