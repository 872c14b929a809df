"""ArenaDispatch on one GPU that plays W ranks: rows, order, addresses and sums against plain torch, routing errors, graphs."""

import re
from dataclasses import replace

import pytest
import torch
from moe_ranks import DIMS, VirtualRanks, assert_call, canonical, make_inputs, run_and_check

from megamoe.formats import quantize_tokens
from megamoe.formats.thread_order import to_thread_order
from megamoe.reference.fold_tokens import fold_tokens as fold_twin

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs sm_90 or later")


@pytest.mark.parametrize("dims", [
    DIMS,
    replace(DIMS, num_ranks=1, num_topk=1),
    replace(DIMS, num_ranks=4, num_topk=8, num_experts=8, hidden=544),
    replace(DIMS, num_ranks=2, num_topk=2, num_experts=256, hidden=2880),
    replace(DIMS, num_ranks=1, num_topk=12, num_experts=1024, hidden=32),
    replace(DIMS, num_ranks=2, max_tokens=900, num_topk=5, num_experts=6, hidden=32, pool_rows=16384),  # several chunks per rank
    replace(DIMS, num_ranks=2, hidden=7168),
    replace(DIMS, num_ranks=2, max_tokens=3, hidden=16416),  # more than a warp keeps in flight
    replace(DIMS, pool_rows=64), replace(DIMS, num_ranks=2, num_topk=7, pool_rows=128)], ids=str)
def test_three_calls_with_changing_sizes(dims):
    ranks = VirtualRanks(dims)
    assert ranks.ranks[0].num_passes == -(-dims.num_ranks * dims.max_tokens * dims.num_topk // dims.pool_rows)
    sizes = (dims.max_tokens, 0, 1, dims.max_tokens // 2 + 1)
    for call in range(3):
        run_and_check(ranks, [make_inputs(dims, sizes[(call + rank) % len(sizes)], 100 * call + rank) for rank in range(dims.num_ranks)])
    assert [calls.epoch() for calls in ranks.calls] == [3] * dims.num_ranks


@pytest.mark.parametrize("expert", [0, 7, 11, -1])
def test_all_tokens_to_one_expert(expert):
    inputs = [make_inputs(DIMS, DIMS.max_tokens, rank) for rank in range(DIMS.num_ranks)]
    for given in inputs:
        given.topk_idx.fill_(expert)
    run_and_check(VirtualRanks(replace(DIMS, pool_rows=192)), inputs)


def test_no_tokens_anywhere():
    run_and_check(VirtualRanks(DIMS), [make_inputs(DIMS, 0, 0)] * DIMS.num_ranks)


def assert_staged(ranks: VirtualRanks, tokens, thread_order: bool = False) -> None:
    """Rank 0's arena holds the folded `tokens` (group 32), their exponent in every byte of x_sf, and nothing past them."""
    expected, n = fold_twin(tokens), len(tokens.codes)
    x, x_sf = ranks.view(0, "x").view(torch.uint8).cpu(), ranks.view(0, "x_sf").cpu()
    assert torch.equal(x_sf[:n], expected.sf.expand(-1, x_sf.shape[1]))
    codes = expected.codes.view(torch.uint8)
    if thread_order:
        codes = to_thread_order(codes.view(torch.int32)).view(torch.uint8)
    assert torch.equal(canonical(x[:n]), canonical(codes))
    assert (x[n:] == 0xFF).all() and (x_sf[n:] == 0xFF).all(), "nothing past T"


# The last: more tokens than blocks, so that blocks take several and fetch ahead.
@pytest.mark.parametrize("hidden, num_tokens", ((32, 9), (96, 61), (544, 61), (2880, 61), (7168, 61), (16416, 9), (7168, 1700)))
def test_staged_tokens_equal_quantize_and_fold(hidden, num_tokens):
    ranks = VirtualRanks(replace(DIMS, num_ranks=1, hidden=hidden, max_tokens=num_tokens + 3, pool_rows=16384))
    given = make_inputs(ranks.dims, num_tokens, 3)
    given.x[0] = 0.0
    given.x[1, 5], given.x[2, 10], given.x[3, hidden - 1] = torch.nan, torch.inf, -torch.inf
    given.x[4] = 3.3895e38
    given.x[5] = 1e-30
    given.x[6, :32] = torch.tensor([448.0, -448.0] * 16)
    given.x[7, :32] = torch.tensor([450.0, -0.0] * 16)
    ranks.stage(0, given)
    assert_staged(ranks, quantize_tokens(given.x, 32))
    assert torch.equal(ranks.view(0, "topk_idx")[:num_tokens].cpu(), given.topk_idx)
    assert torch.equal(ranks.view(0, "topk_weights")[:num_tokens].cpu(), given.topk_weights)
    assert int(ranks.view(0, "num_tokens")) == num_tokens


@pytest.mark.parametrize("is_quantized", (False, True))
@pytest.mark.parametrize("hidden, num_tokens", ((128, 9), (640, 61), (4096, 61), (16384, 9), (7168, 1700)))
def test_tokens_for_mega_moe_are_staged_in_thread_order(hidden, num_tokens, is_quantized):
    dims = replace(DIMS, num_ranks=1, hidden=hidden, intermediate=256, max_tokens=num_tokens + 3, pool_rows=16384)
    ranks, given = VirtualRanks(dims, is_one_pass=True), make_inputs(dims, num_tokens, 3)
    given.x[1, 5], given.x[2, 10] = torch.nan, torch.inf
    tokens = quantize_tokens(given.x, 32)
    if is_quantized:
        ranks.ranks[0].stage(tokens.codes.cuda(), tokens.sf.cuda(), given.topk_idx.cuda(), given.topk_weights.cuda())
    else:
        ranks.stage(0, given)
    assert_staged(ranks, tokens, thread_order=True)


def test_tokens_for_mega_moe_must_not_lie_where_they_are_staged():
    ranks, given = VirtualRanks(replace(DIMS, num_ranks=1), is_one_pass=True), make_inputs(DIMS, 4, 0)
    message = "moe_stage: x must be outside the arena, got the arena's x; take FusedEngine.token_views"
    with pytest.raises(ValueError, match=f"^{message}$"):
        ranks.ranks[0].stage(ranks.view(0, "x")[:4], ranks.view(0, "x_sf")[:4], given.topk_idx.cuda(), given.topk_weights.cuda())


@pytest.mark.parametrize("num_tokens, hidden", ((33, 96), (1700, 7168)))
@pytest.mark.parametrize("in_arena", ((), ("x", "x_sf", "topk_idx", "topk_weights"), ("x",), ("x_sf",)), ids=str)
def test_codes_and_scales_are_folded_where_they_are(num_tokens, hidden, in_arena):
    ranks = VirtualRanks(replace(DIMS, num_ranks=1, hidden=hidden, max_tokens=num_tokens + 3, pool_rows=16384))
    given = make_inputs(ranks.dims, num_tokens, 4)
    given.x[2, 5] = torch.nan
    tokens = quantize_tokens(given.x, 32)
    assert (tokens.sf != tokens.sf[:, :1]).any(1).all(), "every token must have something to fold"
    sources = {"x": tokens.codes, "x_sf": tokens.sf, "topk_idx": given.topk_idx, "topk_weights": given.topk_weights}
    for name, source in sources.items():
        sources[name] = source.cuda()
        if name in in_arena:
            sources[name] = ranks.view(0, name)[:num_tokens].copy_(source)
    ranks.ranks[0].stage(*sources.values())
    assert_staged(ranks, tokens)
    before = ranks.view(0, "x").view(torch.uint8).clone()
    if len(in_arena) == 4:
        ranks.ranks[0].stage(*sources.values())
        assert torch.equal(ranks.view(0, "x").view(torch.uint8), before), "folded tokens stay as they are"
        assert_staged(ranks, tokens)


def test_quantised_tokens_reach_the_experts():
    ranks = VirtualRanks(replace(DIMS, num_ranks=1))
    given = make_inputs(ranks.dims, 33, 4)
    tokens = quantize_tokens(given.x, 32)
    ranks.ranks[0].stage(tokens.codes.cuda(), tokens.sf.cuda(), given.topk_idx.cuda(), given.topk_weights.cuda())
    passes = [ranks.run_experts(0)]
    assert_call(ranks.dims, [given], passes, ranks.combine([33]))


def test_a_token_that_is_not_a_number_stays_alone():
    inputs = [make_inputs(DIMS, 9, rank) for rank in range(DIMS.num_ranks)]
    inputs[1].x[4, 50] = torch.nan
    inputs[1].topk_idx[4] = torch.tensor([0, -1, 11])
    ranks = VirtualRanks(DIMS)
    passes, outputs = ranks.call(inputs)
    assert_call(DIMS, inputs, passes, outputs)
    assert outputs[1][4].isnan().sum() == 1 and outputs[1][4, 50].isnan()
    assert not any(y.isnan().any() for y in (outputs[0], outputs[1][:4], outputs[1][5:], outputs[2]))


def test_indices_out_of_range_are_skipped_and_told_once():
    ranks = VirtualRanks(DIMS)
    inputs = [make_inputs(DIMS, 20, rank) for rank in range(DIMS.num_ranks)]
    inputs[1].topk_idx[7, 2], inputs[1].topk_idx[7, 1], inputs[1].topk_idx[12, 0] = DIMS.num_experts, -(2**40), -2
    run_and_check(ranks, inputs)
    assert [calls.routing_error() for calls in ranks.calls] == [None, (7, 1, -(2**40), 3), None]
    assert ranks.calls[1].routing_error() is None
    inputs[1].topk_idx[7], inputs[1].topk_idx[12] = -1, 3
    run_and_check(ranks, inputs)
    assert ranks.calls[1].routing_error() is None
    inputs[1].topk_idx[0, 0] = 2**62
    run_and_check(ranks, inputs)
    assert ranks.calls[1].routing_error() == (0, 0, 2**62, 1)


def test_graph_replays_are_calls():
    ranks = VirtualRanks(replace(DIMS, num_ranks=1, pool_rows=64))
    dispatch, dims = ranks.ranks[0], ranks.dims
    inputs = [make_inputs(dims, 40, seed) for seed in range(3)]
    x, idx, weights = inputs[0].x.cuda(), inputs[0].topk_idx.cuda(), inputs[0].topk_weights.cuda()
    y = torch.full_like(x, torch.nan)
    expected_counts = [torch.bincount(given.topk_idx.flatten() + 1, minlength=13)[1:] for given in inputs]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dispatch.stage(x, None, idx, weights)
        dispatch.route(ranks.loads[0])
        first = dispatch.pull(0)
        dispatch.combine(y)
    ranks.view(0, "partials").fill_(1.0)
    for replay, given in enumerate(inputs):
        for place, source in ((x, given.x), (idx, given.topk_idx), (weights, given.topk_weights)):
            place.copy_(source)
        ranks.loads.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert ranks.calls[0].epoch() == replay + 1
        assert torch.equal(ranks.loads[0].cpu(), expected_counts[replay])
        expected = fold_twin(quantize_tokens(given.x, 32))
        place = ranks.place_of(int(first.row_dst[0]))
        assert torch.equal(first.codes[0].view(torch.uint8).cpu(), expected.codes[place[1]].view(torch.uint8))
        routed = (given.topk_idx >= 0).sum(-1, keepdim=True)
        assert torch.equal(y.cpu(), routed.expand(-1, dims.hidden).bfloat16())


def test_rows_of_x_must_be_aligned():
    ranks = VirtualRanks(replace(DIMS, num_ranks=1))
    x = torch.zeros(2 * 96 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(2, 96)
    idx = torch.zeros(2, 3, dtype=torch.int64, device="cuda")
    message = "moe_stage: x must be at a multiple of 16 bytes, got 2; copy it with .clone()"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ranks.ranks[0].stage(x, None, idx, idx.float())


def test_more_experts_than_a_block_counts():
    dims = replace(DIMS, num_ranks=1, num_experts=1056)
    message = "ArenaDispatch: experts per rank must be below 1025, got 1056; use more ranks"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        VirtualRanks(dims)
