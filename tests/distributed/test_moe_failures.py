"""What goes wrong, who raises, and with which words. Every message here is part of the interface."""

import re
import time

import pytest
import torch

from megamoe import ArenaBudgetError, CollectiveMismatchError, EngineUnavailableError, FormatError, MegaMoE, MoEConfig, PeerTimeoutError
from megamoe.formats import quantize_tokens
from megamoe.testing.inputs import LayerCase, rank_inputs
from megamoe.testing.layer_run import build_layer
from megamoe.testing.ranks import outcome

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=8, num_topk=2, max_tokens_per_rank=16)
CASE = LayerCase(cfg=CFG, tokens_per_rank=(5, 7))
BAD_INPUTS = {
    "too many tokens": (lambda x, i, w: (x.repeat(5, 1), i.repeat(5, 1), w.repeat(5, 1)),
                        "MegaMoE: number of tokens must be <= max_tokens_per_rank = 16, got 25; split the batch or construct the layer "
                        "with a larger max_tokens_per_rank"),
    "dtype of x": (lambda x, i, w: (x.float(), i, w), "MegaMoE: dtype of x must be torch.bfloat16, got torch.float32; cast it"),
    "dtype of topk_idx": (lambda x, i, w: (x, i.int(), w), "MegaMoE: dtype of topk_idx must be torch.int64, got torch.int32; cast it"),
    "dtype of topk_weights": (lambda x, i, w: (x, i, w.bfloat16()),
                              "MegaMoE: dtype of topk_weights must be torch.float32, got torch.bfloat16; cast it"),
    "width of x": (lambda x, i, w: (x[:, :32].contiguous(), i, w),
                   "MegaMoE: shape of x must be [T, 64], got [5, 32]; flatten batch and sequence"),
    "shape of topk_idx": (lambda x, i, w: (x, i[:4], w), "MegaMoE: shape of topk_idx must be [5, 2], got [4, 2]; pass one row per token"),
    "layout of x": (lambda x, i, w: (x.T.contiguous().T, i, w),
                    "MegaMoE: layout of x must be contiguous, got strides (1, 5); call .contiguous()"),
    "device of topk_idx": (lambda x, i, w: (x, i.to("meta"), w),
                           "MegaMoE: device of topk_idx must be cpu, got meta; move it with .to('cpu')"),
    "x requires grad": (lambda x, i, w: (x.requires_grad_(), i, w),
                        "MegaMoE: requires_grad of x must be False, got True; training is not implemented yet: "
                        "call under torch.no_grad() or detach"),
    "group of quantised x": (lambda x, i, w: (quantize_tokens(x, group=64), i, w),
                             "MegaMoE: shape of x_sf must be [5, 2], got [5, 1]; pass one row per token"),
}


def run_bad_input(rank: int, num_ranks: int, name: str):
    x, topk_idx, topk_weights = rank_inputs(CASE, rank)
    with build_layer(CASE, rank, timeout_s=10.0) as layer:
        inputs = BAD_INPUTS[name][0](x, topk_idx, topk_weights) if rank == 0 else (x, topk_idx, topk_weights)
        begin = time.monotonic()
        first = outcome(lambda: layer(*inputs))
        waited = time.monotonic() - begin
        after = layer(x.detach(), topk_idx, topk_weights)
        return first, waited, bool(after.isfinite().all())


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_a_bad_argument_on_one_rank_reaches_both_at_once(rank_pool, name):
    (mine, _, ok0), (peers, waited, ok1) = rank_pool(2).run(run_bad_input, name)
    assert mine == ("ValueError", BAD_INPUTS[name][1])
    assert peers[0] == "PeerTimeoutError" and "rank 0 aborted" in peers[1]
    assert waited < 5, "an abort must not wait for the deadline"
    assert ok0 and ok1, "the next call works: a local error costs one call, not the arena"


def run_bad_routing(rank: int, num_ranks: int, bad: int):
    x, topk_idx, topk_weights = rank_inputs(CASE, rank)
    with build_layer(CASE, rank) as layer:
        good = layer(x, topk_idx, topk_weights)
        if rank == 1:
            topk_idx[3, 1] = bad
        got = []
        error = outcome(lambda: got.append(layer(x, topk_idx, topk_weights)))
        topk_idx[topk_idx == bad] = -1
        skipped = layer(x, topk_idx, topk_weights)
        return error, bool(torch.equal(got[0] if got else skipped, good if rank == 0 else skipped))


@pytest.mark.parametrize("bad", (8, -2, 2**40))
def test_topk_idx_out_of_range(rank_pool, bad):
    (other, other_ok), (mine, mine_ok) = rank_pool(2).run(run_bad_routing, bad)
    assert other == ("", "") and other_ok, "the other rank finishes with the right result"
    assert mine == ("ValueError", f"MegaMoE: topk_idx must be in [-1, 8), got {bad} on rank 1, token 3, slot 1 "
                                  "(1 such slots were skipped); correct the router")
    assert mine_ok


def construct(rank: int, num_ranks: int, cfgs, options=({}, {})):
    return outcome(lambda: MegaMoE(cfgs[rank], **options[rank]).close())


def test_another_config_on_one_rank(rank_pool):
    other = MoEConfig(**{**CFG.as_dict(), "hidden": 96})
    for kind, message in rank_pool(2).run(construct, (CFG, other)):
        assert kind == CollectiveMismatchError.__name__
        assert message.endswith("hidden differs between ranks: rank 0 has 64, rank 1 has 96; construct every rank with the same arguments")


def test_another_engine_argument_on_one_rank(rank_pool):
    for kind, message in rank_pool(2).run(construct, (CFG, CFG), ({"engine": "auto"}, {"engine": "reference"})):
        assert kind == CollectiveMismatchError.__name__ and "engine differs between ranks" in message


def test_experts_not_divisible_by_ranks(rank_pool):
    for kind, message in rank_pool(3).run(construct, (CFG,) * 3, ({},) * 3):
        assert "num_experts must be divisible by the 3 ranks of the EP group, got 8; use a group whose size divides it" in message


def test_arena_budget_too_small(rank_pool):
    for kind, message in rank_pool(2).run(construct, (CFG, CFG), ({"arena_bytes": 4096},) * 2):
        assert kind == ArenaBudgetError.__name__
        assert "4096" in message and re.search(r"arena_bytes >= \d+", message)


def test_an_engine_that_does_not_exist():
    message = "MegaMoE: engine must be one of ('auto', 'reference', 'unfused', 'fused'), got 'warp'; pass engine='auto'"
    with pytest.raises(EngineUnavailableError, match=re.escape(message)):
        MegaMoE(CFG, engine="warp")


def run_killed(rank: int, num_ranks: int, pids):
    import os
    import signal

    case = LayerCase(cfg=MoEConfig(**{**CFG.as_dict(), "num_experts": 9}), tokens_per_rank=(4, 4, 4))
    layer = build_layer(case, rank, timeout_s=2.0)
    if rank == 1:
        # Die in the middle of the call: inputs published, nothing computed.
        layer.engine._received_rows = lambda: os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        layer(*rank_inputs(case, rank))
    except PeerTimeoutError as error:
        return error.peer, error.phase, str(error), time.monotonic() - begin
    return None


def test_a_killed_rank_is_named_within_the_deadline(rank_pool):
    pool = rank_pool(3)
    survivors = pool.run_until_death(run_killed, None, expected_dead=(1,))
    assert set(survivors) == {0, 2}
    for peer, phase, message, waited in survivors.values():
        assert (peer, phase) == (1, "combine")
        assert "rank 1" in message and waited < 2.0 + 3.0


def run_stall_and_reset(rank: int, num_ranks: int):
    x, topk_idx, topk_weights = rank_inputs(CASE, rank)
    layer = build_layer(CASE, rank, timeout_s=1.0)
    good = layer(x, topk_idx, topk_weights)
    if rank == 1:
        time.sleep(2.5)
    stalled = outcome(lambda: layer(x, topk_idx, topk_weights))
    unusable = outcome(lambda: layer(x, topk_idx, topk_weights)) if rank == 0 else None
    layer.reset()
    again = layer(x, topk_idx, topk_weights)
    layer.close()
    layer.close()
    return stalled, unusable, bool(torch.equal(good, again))


def test_a_stalled_rank_times_out_and_reset_recovers(rank_pool):
    (stalled, unusable, equal0), (_, _, equal1) = rank_pool(2).run(run_stall_and_reset)
    assert stalled[0] == "PeerTimeoutError" and "rank 1" in stalled[1] and "dispatch" in stalled[1]
    assert unusable[0] == "RuntimeError" and "call reset() on every rank" in unusable[1]
    assert equal0 and equal1


def test_weights_are_checked_against_the_config():
    layer = MegaMoE(CFG)
    x, topk_idx, topk_weights = rank_inputs(LayerCase(cfg=CFG, tokens_per_rank=(5,)), 0)
    with pytest.raises(ValueError, match=re.escape("MegaMoE: experts must be loaded, got none; call load_experts first")):
        layer(x, topk_idx, topk_weights)
    with pytest.raises(ValueError, match=re.escape("MegaMoE.load_experts: shape of gate_up must be (8, 64, 64), got (7, 64, 64); "
                                                   "pass experts 0..7, the ones of rank 0")):
        layer.load_experts(torch.zeros(7, 64, 64), torch.zeros(8, 64, 32))
    with pytest.raises(FormatError):
        layer.load_experts(torch.full((8, 64, 64), torch.nan), torch.zeros(8, 64, 32))
