"""NcclTransport on CPU ranks (gloo has the same collectives): what arrives, in which order, and that results find their way back."""

from dataclasses import dataclass

import pytest
import torch

from megamoe import MoEConfig
from megamoe.comm import Arena
from megamoe.engines.transports.nccl import NcclTransport
from megamoe.engines.transports.nccl_plan import plan_exchange
from megamoe.formats import quantize_tokens
from megamoe.reference.fold_tokens import fold_tokens
from megamoe.testing.inputs import LayerCase, rank_inputs


def test_a_plan_by_hand():
    counts = torch.tensor([[1, 2], [2, 0]])  # the example in ExchangePlan
    first, second = (plan_exchange(counts, rank, pool_rows=2) for rank in (0, 1))
    assert first.num_passes == second.num_passes == 2
    assert first.send_counts.tolist() == [[1, 2], [0, 0]] and first.send_begin[0].tolist() == [0, 1]
    assert second.send_counts.tolist() == [[1, 0], [1, 0]] and second.send_begin[:, 0].tolist() == [0, 1]
    assert first.receive_counts.tolist() == [[[1], [1]], [[0], [1]]]
    assert first.offsets(0).tolist() == [0, 2] and second.offsets(0).tolist() == [0, 2] and second.offsets(1).tolist() == [0, 0]


@pytest.mark.parametrize("pool_rows", (1, 3, 64, 1000))
def test_passes_cut_the_expert_order(pool_rows):
    counts = torch.randint(0, 9, (4, 12), generator=torch.Generator().manual_seed(pool_rows))
    plans = [plan_exchange(counts, rank, pool_rows) for rank in range(4)]
    for receiver, plan in enumerate(plans):
        mine = counts[:, 3 * receiver: 3 * receiver + 3]
        whole = [(expert, src, i) for expert in range(3) for src in range(4) for i in range(mine[src, expert])]
        arrived = []
        for p in range(plan.num_passes):
            sent = []
            for src, source in enumerate(plans):
                entries = [(expert, i) for expert in range(12) for i in range(counts[src, expert])]
                begin, count = int(source.send_begin[p, receiver]), int(source.send_counts[p, receiver])
                assert count == plan.receive_counts[p, src].sum()
                sent += [(expert - 3 * receiver, src, i) for expert, i in entries[begin: begin + count]]
            assert len(sent) <= pool_rows
            arrived += [sent[i] for i in plan.expert_order(p)]
        assert arrived == whole


@dataclass(frozen=True)
class ExchangeCase(LayerCase):
    def inputs(self, rank: int) -> tuple[torch.Tensor, ...]:
        x, topk_idx, topk_weights = rank_inputs(self, rank)
        topk_idx[topk_idx == 5] = 6  # out of range: skipped
        return x, topk_idx, topk_weights


def case(pool_bytes: int | None) -> ExchangeCase:
    cfg = MoEConfig(hidden=64, intermediate=32, num_experts=6, num_topk=3, max_tokens_per_rank=160)
    return ExchangeCase(cfg=cfg, tokens_per_rank=(160, 0, 70), routing="skips", arena_bytes=pool_bytes)


def exchange_tokens(transport: NcclTransport, x, topk_idx, topk_weights, num_experts: int) -> tuple[torch.Tensor, list[int]]:
    """A call with an expert that gives back twice its token times the weight, so that every step of the way shows in y. (y, load)"""
    load = torch.zeros(num_experts // 3, dtype=torch.int64)
    transport.dispatch(x, None, topk_idx, topk_weights, load)
    num_rows = 0
    for p in range(transport.num_passes):
        rows = transport.rows(p)
        (begin, end), = rows.bounds.tolist()
        assert begin == 0 and rows.offsets[0] == 0 and rows.offsets[-1] == end <= len(rows.codes)
        scale = torch.exp2(rows.sf.float() - 127)[:, None]
        rows.out.fill_(torch.nan)
        rows.out[:end] = (2 * rows.codes.float() * scale * rows.row_weight[:, None])[:end].bfloat16()
        transport.push(rows)
        num_rows += end
    y = torch.full(x.shape, torch.nan, dtype=torch.bfloat16)
    transport.finish(y)
    assert load.sum() == num_rows
    return y, load.tolist()


def run_exchange(rank: int, num_ranks: int, this: ExchangeCase, backend: str):
    x, topk_idx, topk_weights = this.inputs(rank)
    with Arena.create(this.cfg, backend=backend, arena_bytes=this.arena_bytes, timeout_s=10.0) as arena:
        transport = NcclTransport(this.cfg, arena)
        arena.view("partials").view(torch.uint8).fill_(0xFF)
        arena.begin_call()
        y, load = exchange_tokens(transport, x, topk_idx, topk_weights, num_experts=6)
        tokens = fold_tokens(quantize_tokens(x, 32)).dequantize()
        is_routed = (topk_idx >= 0) & (topk_idx < 6)
        expected = torch.zeros(x.shape)
        for slot in range(3):
            partial = (2 * tokens * topk_weights[:, slot, None]).bfloat16().float()
            expected += torch.where(is_routed[:, slot, None], partial, 0.0)
        assert torch.equal(y, expected.bfloat16())
        return transport.num_passes, load, torch.bincount(topk_idx[is_routed], minlength=6).tolist()


@pytest.mark.parametrize("backend", ("shm", "unmapped"))
@pytest.mark.parametrize("pool_bytes, least", ((None, 1), (94_000, 2)))
def test_rows_come_back_to_their_slots(rank_pool, pool_bytes, least, backend):
    results = rank_pool(3).run(run_exchange, case(pool_bytes), backend)
    assert {passes for passes, _, _ in results} == {results[0][0]} and results[0][0] >= least
    assert [n for _, load, _ in results for n in load] == torch.tensor([sent for _, _, sent in results]).sum(0).tolist()
