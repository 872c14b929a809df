"""What goes wrong in engine="unfused", who raises, when, and with which words; and that the call after it works."""

import time
from dataclasses import replace

import pytest
import torch
from test_moe import small_case
from test_unfused_cuda import NUM_GPUS, bits, device_inputs, every_world, unfused_layer
from test_unfused_cuda import pytestmark as pytestmark

from megamoe import PeerTimeoutError
from megamoe.layers import moe
from megamoe.testing.inputs import LayerCase

needs_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two Hopper GPUs")


def case_for(num_ranks: int) -> LayerCase:
    return small_case(tokens=tuple(5 + rank for rank in range(num_ranks)))


def outcome(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def run_stalled(rank: int, num_ranks: int, case: LayerCase):
    torch.cuda.set_device(rank)
    layer, inputs = unfused_layer(case, rank, timeout_s=2.0), device_inputs(case, rank)
    good = layer(*inputs)
    layer.check()
    if rank == 1:
        time.sleep(5)
    begin = time.monotonic()
    y = layer(*inputs)
    try:
        layer.check()
        raised = None
    except PeerTimeoutError as error:
        raised = str(error), error.peer, error.phase
    waited, is_nan = time.monotonic() - begin, bool(y.isnan().all())
    unusable = outcome(lambda: layer(*inputs))
    layer.reset()
    again = [layer(*inputs) for _ in range(3)]
    layer.check()
    layer.close()
    return raised, waited, is_nan, unusable, all(torch.equal(bits(y), bits(good)) for y in again)


@needs_gpus
def test_a_stalled_rank_is_named_within_the_deadline(rank_pool):
    results = rank_pool(NUM_GPUS).run(run_stalled, small_case(tokens=(5,) * NUM_GPUS, num_experts=8 * NUM_GPUS), timeout_s=90)
    text = "rank 0: no inputs_ready from rank 1 within 2.0 s in dispatch (expected epoch 2, got 1); rank 1 is silent: see its log, then " \
           "restart it or call reset() on every rank"
    for rank, (raised, waited, is_nan, unusable, recovered) in enumerate(results):
        assert is_nan and recovered
        assert unusable[0] == "RuntimeError" and "call reset() on every rank (the failure: " in unusable[1]
        if rank != 1:
            assert raised[1:] == (1, "dispatch") and waited < 2.0 + 3.0
    # The first rank whose deadline passes tells the others, in whose words the same rank is at fault.
    texts = [raised[0] for raised, *_ in results]
    assert any(t.replace(f"rank {rank}: no", "rank 0: no") == text for rank, t in enumerate(texts) if rank != 1)
    assert "rank 1 was silent" in texts[1]


def run_refused(rank: int, num_ranks: int, case: LayerCase, checks: bool):
    """Rank 0 passes a wrong dtype in the second call."""
    torch.cuda.set_device(rank)
    with unfused_layer(case, rank, timeout_s=10.0) as layer:
        x, topk_idx, topk_weights = device_inputs(case, rank)
        good = layer(x, topk_idx, topk_weights)
        begin, got = time.monotonic(), []

        def lost() -> None:
            got.append(layer(x.float() if rank == 0 else x, topk_idx, topk_weights))
            torch.cuda.synchronize()
            if checks:
                layer.check()

        first = outcome(lost)
        waited = time.monotonic() - begin
        second = ("", "") if checks else outcome(lambda: layer(x, topk_idx, topk_weights))
        after = layer(x, topk_idx, topk_weights)
        layer.check()
        return first, second, waited, all(bool(y.isnan().all()) for y in got), bool(torch.equal(bits(after), bits(good)))


@every_world
@pytest.mark.parametrize("checks", (True, False))
def test_a_bad_argument_costs_one_call_on_every_rank(rank_pool, num_ranks, checks):
    results = rank_pool(num_ranks).run(run_refused, case_for(num_ranks), checks)
    for rank, (first, second, waited, lost_is_nan, recovered) in enumerate(results):
        assert recovered and waited < 5, "an abort must not wait for the deadline"
        if rank == 0:
            assert (first, second) == (("ValueError", "MegaMoE: dtype of x must be torch.bfloat16, got torch.float32; cast it"), ("", ""))
            continue
        text = (f"rank {rank}: rank 0 aborted (it refused its arguments) while this rank was in dispatch; see the error of rank 0: "
                "this call is lost, the next one works")
        # Without a check the device may have told by the time the lost call returns, or the next call tells.
        assert sorted((first, second)) == [("", ""), ("PeerTimeoutError", text)] and lost_is_nan


def run_bad_routing(rank: int, num_ranks: int, case: LayerCase, bad: int, mode: str):
    """The last rank passes a topk_idx out of range."""
    torch.cuda.set_device(rank)
    with unfused_layer(case, rank) as layer:
        x, topk_idx, topk_weights = device_inputs(case, rank)
        skipped = topk_idx.clone()
        if rank == num_ranks - 1:
            skipped[3, 1] = skipped[4, 2] = -1
            topk_idx[3, 1] = topk_idx[4, 2] = bad
        good, got = layer(x, skipped, topk_weights), []
        default = moe.env
        try:
            moe.env = replace(default, check=mode == "at once")
            at_once = outcome(lambda: got.append(layer(x, topk_idx, topk_weights)))
        finally:
            moe.env = default
        torch.cuda.synchronize()
        later = outcome(layer.check) if mode == "check" else outcome(lambda: layer(x, skipped, topk_weights))
        after = layer(x, skipped, topk_weights)
        layer.check()
        return at_once, later, all(torch.equal(bits(y), bits(good)) for y in (*got, after))


@every_world
@pytest.mark.parametrize("mode", ("at once", "check", "next call"))
@pytest.mark.parametrize("bad", (8, -2, 2**40))
def test_topk_idx_out_of_range(rank_pool, num_ranks, bad, mode):
    case = replace(case_for(num_ranks), tokens_per_rank=(6,) * num_ranks)
    results = rank_pool(num_ranks).run(run_bad_routing, case, bad, mode)
    *others, (at_once, later, is_right) = results
    assert all(result == (("", ""), ("", ""), True) for result in others), "the other ranks finish with the right result"
    text = (f"MegaMoE: topk_idx must be in [-1, 8), got {bad} on rank {num_ranks - 1}, token 3, slot 1 (2 such slots were skipped); "
            "correct the router")
    assert sorted((at_once, later)) == [("", ""), ("ValueError", text)] and is_right
    if mode == "at once":
        assert at_once[0] == "ValueError"


def run_misaligned(rank: int, num_ranks: int, case: LayerCase):
    torch.cuda.set_device(rank)
    with unfused_layer(case, rank) as layer:
        x, topk_idx, topk_weights = device_inputs(case, rank)
        good = layer(x, topk_idx, topk_weights)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)
        message = outcome(lambda: layer(shifted, topk_idx, topk_weights))
        return message, bool(torch.equal(bits(layer(x, topk_idx, topk_weights)), bits(good)))


def test_tokens_that_no_kernel_can_read_are_refused(rank_pool):
    (message, recovered), = rank_pool(1).run(run_misaligned, case_for(1))
    assert message[0] == "ValueError" and "multiple of 16 bytes" in message[1] and recovered
