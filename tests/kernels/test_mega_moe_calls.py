"""Calls of mega_moe that fail, and calls out of a CUDA graph; one GPU plays W ranks."""

import re

import pytest
import torch
from mega_cases import EDGE, FEW, SMALL, compile_all, config_for, inputs_of, ranks_of
from mega_ranks import MegaRanks, bits, make_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_all()


def test_a_missing_rank_is_named_and_the_call_after_a_reset_works(compiled):
    ranks = MegaRanks(EDGE, config_for(EDGE, SMALL), timeout_s=1.0)
    inputs = inputs_of(EDGE, (20, 7, 30))
    expected = ranks.run(inputs)
    ranks.start_over()
    ranks.poison()
    outputs = ranks.prepare(inputs)
    for y in outputs:
        y.zero_()
    ranks.launch((0, 1), outputs)
    assert outputs[0].isnan().all() and outputs[1].isnan().all() and not outputs[2].any()
    failures = [calls.failure() for calls in ranks.arenas.calls[:2]]
    assert [(failure.phase, failure.culprit(rank)) for rank, failure in enumerate(failures)] == [("combine", 2)] * 2
    for rank, failure in enumerate(failures):  # of a rank's blocks, the first report stays: of its own deadline or of the other rank's
        assert failure.describe(rank, 1.0) in (
            f"rank {rank}: no combine_ready from rank 2 within 1.0 s in combine (expected epoch 1, got 0); rank 2 is silent: see its log, "
            "then restart it or call reset() on every rank",
            f"rank {rank}: rank {1 - rank} aborted (rank 2 was silent) while this rank was in combine; see the log of rank 2, then "
            "restart it or call reset() on every rank")
    ranks.launch((2,), outputs)
    assert outputs[2].isnan().all(), "a rank that comes late finds all signals there, and the abort word"
    ranks.start_over()
    for y, good in zip(ranks.run(inputs), expected):
        assert torch.equal(bits(y), bits(good))


def test_a_stall_inside_a_rank_ends_the_call(compiled):
    """Rank 0 waits for one 64-row block of linear 1 more than there are; the other ranks learn from it who is at fault."""
    ranks = MegaRanks(EDGE, config_for(EDGE, SMALL), timeout_s=1.0)
    inputs = inputs_of(EDGE, (20, 7, 30))
    expected = ranks.run(inputs)
    ranks.start_over()
    outputs = ranks.prepare(inputs)
    blocks = [ranks.params(rank, y) for rank, y in enumerate(outputs)]
    blocks[0].flow.row_blocks[0] += 1
    for block in blocks[1:]:
        block.calls.timeout_ns = 20 * 10**9
    ranks.launch(range(3), outputs)  # takes the same blocks
    blocks[0].flow.row_blocks[0] -= 1
    for block in blocks[1:]:
        block.calls.timeout_ns = 10**9
    assert all(y.isnan().all() for y in outputs)
    failures = [calls.failure() for calls in ranks.arenas.calls]
    assert [failure.culprit(rank) for rank, failure in enumerate(failures)] == [0, 0, 0]
    # Blocks that found no task wait in combine, as long as the fold warps wait for the row block that does not come.
    message = (r"rank 0: its own kernels made no progress within 1\.0 s in (experts|combine) \(a counter stood at \d+\); "
               r"call reset\(\) on every rank, and report it if it happens again")
    assert re.fullmatch(message, failures[0].describe(0, 1.0))
    assert [failure.phase for failure in failures[1:]] == ["combine"] * 2
    ranks.start_over()
    for y, good in zip(ranks.run(inputs), expected):
        assert torch.equal(bits(y), bits(good))


def test_graph_replays_are_calls(compiled):
    """The kernel that engines launch, with one rank: bits as in the launch for several, eager and replayed."""
    ranks, inputs = ranks_of(FEW, SMALL), [make_inputs(FEW, 40, seed) for seed in range(3)]
    expected = [ranks.run([given])[0] for given in inputs]
    dispatch, mega, load = ranks.arenas.ranks[0], ranks.megas[0], ranks.arenas.loads[0]
    x, topk_idx, topk_weights = (tensor.clone() for tensor in (inputs[0].x, inputs[0].topk_idx, inputs[0].topk_weights))
    y = torch.empty_like(x)

    def call() -> None:
        dispatch.stage(x, None, topk_idx, topk_weights)
        dispatch.route(load)
        mega.launch(ranks.config, ranks.experts[0], dispatch.rows(), y)

    call()
    torch.cuda.synchronize()
    assert torch.equal(bits(y), bits(expected[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for replay, (given, due) in enumerate(zip(inputs, expected)):
        for place, source in ((x, given.x), (topk_idx, given.topk_idx), (topk_weights, given.topk_weights)):
            place.copy_(source)
        ranks.poison()
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(y), bits(due)), f"replay {replay}"
    ranks.assert_clean()
