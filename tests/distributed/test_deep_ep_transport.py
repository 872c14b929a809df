"""DeepEPTransport on CPU ranks over a stand-in for deep_ep: the order of rows, passes, sums, and who may use it."""

import re

import deep_ep_stand_in
import pytest
import torch

from megamoe import MoEConfig
from megamoe.comm import Arena
from megamoe.engines.transports import DeepEPTransport, create_transport
from megamoe.errors import EngineUnavailableError
from megamoe.formats import quantize_tokens
from megamoe.reference.fold_tokens import fold_tokens
from megamoe.testing.inputs import LayerCase, rank_inputs


def case(num_ranks: int, hidden: int, arena_bytes: int | None) -> LayerCase:
    cfg = MoEConfig(hidden=hidden, intermediate=32, num_experts=8, num_topk=3, max_tokens_per_rank=160)
    return LayerCase(cfg=cfg, tokens_per_rank=(160, 0, 70, 1)[:num_ranks], routing="skips", arena_bytes=arena_bytes)


def routed(this: LayerCase, rank: int) -> tuple[torch.Tensor, ...]:
    """rank_inputs with an expert out of range, which is skipped."""
    x, topk_idx, topk_weights = rank_inputs(this, rank)
    topk_idx[topk_idx == 5] = 8
    return x, topk_idx, topk_weights


def expected_rows(this: LayerCase, rank: int) -> torch.Tensor:
    """[R, H] float32: the tokens for the experts of `rank`, by expert, then source rank, token, slot, times their top-k weight."""
    num_local, tokens = 8 // this.num_ranks, []
    for expert in range(rank * num_local, (rank + 1) * num_local):
        for src in range(this.num_ranks):
            x, topk_idx, topk_weights = routed(this, src)
            token, slot = torch.where(topk_idx == expert)
            tokens.append(fold_tokens(quantize_tokens(x, 32)).dequantize()[token].float() * topk_weights[token, slot, None])
    return torch.cat(tokens)


def run_exchange(rank: int, num_ranks: int, this: LayerCase):
    """An expert that gives back (expert + 1) times its weighted token."""
    x, topk_idx, topk_weights = routed(this, rank)
    num_local = 8 // num_ranks
    with deep_ep_stand_in.installed():
        with Arena.create(this.cfg, arena_bytes=this.arena_bytes, timeout_s=10.0) as arena:
            transport = create_transport("deep_ep", this.cfg, arena)
            assert create_transport("deep_ep", this.cfg, arena) is transport
            for _ in range(2):
                y, load, seen = one_call(arena, transport, (x, topk_idx, topk_weights), num_local)
                assert torch.equal(seen, expected_rows(this, rank))
                assert_sums(y, x, topk_idx, topk_weights, num_local, single_pass=this.arena_bytes is None)
            assert deep_ep_stand_in.Buffer.num_alive == 1
        assert deep_ep_stand_in.Buffer.num_alive == 0, "an arena's end is where all ranks free DeepEP's buffer together"
    return transport.num_passes, load.tolist(), torch.bincount(topk_idx[(topk_idx >= 0) & (topk_idx < 8)], minlength=8).tolist()


def one_call(arena, transport, inputs, num_local: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, topk_idx, topk_weights = inputs
    load, seen = torch.zeros(num_local, dtype=torch.int64), []
    arena.begin_call()
    transport.dispatch(x, None, topk_idx, topk_weights, load)
    for p in range(transport.num_passes):
        rows = transport.rows(p)
        (begin, end), = rows.bounds.tolist()
        assert begin == 0 and rows.offsets[0] == 0 and rows.offsets[-1] == end <= arena.dims.pool_rows
        counts = rows.offsets.diff().long()
        assert (counts >= 0).all()
        factor = 1 + arena.rank * num_local + torch.arange(num_local).repeat_interleave(counts)
        weighted = (rows.codes.float() * torch.exp2(rows.sf.float() - 127)[:, None] * rows.row_weight[:, None])[:end]
        rows.out.fill_(torch.nan)
        rows.out[:end] = (factor[:, None] * weighted).bfloat16()
        transport.push(rows)
        seen.append(weighted)
    y = torch.full(x.shape, torch.nan, dtype=torch.bfloat16)
    transport.finish(y)
    return y, load, torch.cat(seen)


def assert_sums(y, x, topk_idx, topk_weights, num_local: int, single_pass: bool) -> None:
    """Slots of a rank in FP32 in slot order, rounded to BF16; then ranks in FP32. More passes round in more places."""
    tokens = fold_tokens(quantize_tokens(x, 32)).dequantize().float()
    total = torch.zeros(x.shape)
    for peer in range(8 // num_local):
        of_peer = torch.zeros(x.shape)
        for slot in range(topk_idx.shape[1]):
            expert = topk_idx[:, slot]
            partial = ((1 + expert[:, None]) * (tokens * topk_weights[:, slot, None])).bfloat16().float()
            of_peer += torch.where(((expert >= 0) & (expert < 8) & (expert // num_local == peer))[:, None], partial, 0.0)
        total += of_peer.bfloat16().float()
    if single_pass:
        assert torch.equal(y, total.bfloat16())
    else:
        torch.testing.assert_close(y.float(), total, rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("num_ranks, hidden, arena_bytes, least", (
    (2, 64, None, 1), (2, 64, 94_000, 2), (4, 256, None, 1), (4, 256, 330_000, 2)))
def test_rows_in_expert_order_and_sums(rank_pool, num_ranks, hidden, arena_bytes, least):
    results = rank_pool(num_ranks).run(run_exchange, case(num_ranks, hidden, arena_bytes))
    assert max(passes for passes, _, _ in results) >= least
    assert [n for _, load, _ in results for n in load] == torch.tensor([sent for _, _, sent in results]).sum(0).tolist()


def create_without(rank: int, num_ranks: int, missing_rank: int, hidden: int) -> str:
    cfg = MoEConfig(hidden=hidden, intermediate=32, num_experts=12, num_topk=1, max_tokens_per_rank=4)
    with Arena.create(cfg, timeout_s=10.0) as arena, deep_ep_stand_in.installed(is_missing=rank == missing_rank):
        with pytest.raises(EngineUnavailableError) as caught:
            DeepEPTransport(cfg, arena)
    return str(caught.value)


START = "MegaMoE: transport 'deep_ep' cannot run here: "


def test_a_rank_without_deep_ep_raises_everywhere(rank_pool):
    text = re.escape(START) + r"deep_ep cannot be imported \(.+\); install DeepEP 1\.2 or unset MEGAMOE_TRANSPORT \(on rank 1\)"
    for message in rank_pool(2).run(create_without, 1, 64):
        assert re.fullmatch(text, message)


@pytest.mark.parametrize("num_ranks, hidden, reason", (
    (3, 64, "its kernels are for 2, 4 or 8 ranks, got 3; unset MEGAMOE_TRANSPORT"),
    (2, 16384, "its kernels hold rows of up to 16352 channels, got hidden 16384; unset MEGAMOE_TRANSPORT")))
def test_what_its_kernels_cannot_do(rank_pool, num_ranks, hidden, reason):
    assert rank_pool(num_ranks).run(create_without, -1, hidden) == [START + reason] * num_ranks
