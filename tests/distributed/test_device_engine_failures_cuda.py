"""What goes wrong in engines that kernels drive, who raises, when, and with which words; and that the call after it works."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from device_engines import NUM_GPUS, bits, device_inputs, device_layer, every_engine, every_world, needs_gpus, needs_hopper
from test_moe import small_case

from megamoe import PeerTimeoutError
from megamoe.layers import moe
from megamoe.testing.inputs import LayerCase
from megamoe.testing.ranks import outcome

pytestmark = needs_hopper


def case_for(num_ranks: int) -> LayerCase:
    return small_case(tokens=tuple(5 + rank for rank in range(num_ranks)))


def run_stalled(rank: int, num_ranks: int, engine: str, case: LayerCase):
    torch.cuda.set_device(rank)
    layer, inputs = device_layer(case, rank, engine, timeout_s=2.0), device_inputs(case, rank)
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
@every_engine
def test_a_stalled_rank_is_named_within_the_deadline(rank_pool, engine):
    results = rank_pool(NUM_GPUS).run(run_stalled, engine, small_case(tokens=(5,) * NUM_GPUS, num_experts=8 * NUM_GPUS), timeout_s=90)
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


def run_silent_before_combine(rank: int, num_ranks: int, case: LayerCase):
    """Rank 1 publishes its inputs, and then nothing for longer than the deadline."""
    torch.cuda.set_device(rank)
    layer, inputs = device_layer(case, rank, "fused", timeout_s=2.0), device_inputs(case, rank)
    good = layer(*inputs)
    layer.check()
    torch.cuda.synchronize()
    mega = layer.engine._kernels.mega
    launch = mega.launch
    if rank == 1:
        def late(*args) -> None:
            torch.cuda.synchronize()
            time.sleep(5)
            launch(*args)

        mega.launch = late
    y, begin = layer(*inputs), time.monotonic()
    raised, waited, is_nan = outcome(layer.check), time.monotonic() - begin, bool(y.isnan().all())
    mega.launch = launch
    layer.reset()
    again = layer(*inputs)
    layer.check()
    layer.close()
    return raised, waited, is_nan, bool(torch.equal(bits(again), bits(good)))


@needs_gpus
def test_a_rank_that_is_silent_before_combine(rank_pool):
    case = small_case(tokens=(5,) * NUM_GPUS, num_experts=8 * NUM_GPUS)
    results = rank_pool(NUM_GPUS).run(run_silent_before_combine, case, timeout_s=90)
    for rank, (raised, waited, is_nan, recovered) in enumerate(results):
        assert raised[0] == "PeerTimeoutError" and is_nan and recovered
        if rank != 1:
            assert "rank 1" in raised[1] and "combine" in raised[1] and waited < 2.0 + 3.0


def run_killed(rank: int, num_ranks: int, engine: str, case: LayerCase):
    """Rank 1 dies between two calls."""
    layer, inputs = device_layer(case, rank, engine, timeout_s=10.0), device_inputs(case, rank)
    layer(*inputs)
    layer.check()
    if rank == 1:
        torch.cuda.synchronize()
        os.kill(os.getpid(), signal.SIGKILL)
    begin, y = time.monotonic(), layer(*inputs)
    try:
        layer.check()
    except PeerTimeoutError as error:
        is_alive = bool((torch.ones(1000, device="cuda").sum() == 1000).item())
        return error.peer, error.phase, str(error), time.monotonic() - begin, bool(y.isnan().all()) and is_alive
    return None


@needs_gpus
@every_engine
def test_a_killed_rank_is_named_within_the_deadline(rank_pool, engine):
    case = small_case(tokens=(5,) * NUM_GPUS, num_experts=8 * NUM_GPUS)
    survivors = rank_pool(NUM_GPUS).run_until_death(run_killed, engine, case, expected_dead=(1,), timeout_s=90)
    assert set(survivors) == set(range(NUM_GPUS)) - {1}
    for peer, phase, message, waited, is_alive in survivors.values():
        assert (peer, phase) == (1, "dispatch") and "rank 1" in message
        assert waited < 10.0 + 3.0 and is_alive, "the GPU works on"


def run_refused(rank: int, num_ranks: int, engine: str, case: LayerCase, checks: bool):
    """Rank 0 passes a wrong dtype in the second call."""
    torch.cuda.set_device(rank)
    with device_layer(case, rank, engine, timeout_s=10.0) as layer:
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


@every_engine
@every_world
@pytest.mark.parametrize("checks", (True, False))
def test_a_bad_argument_costs_one_call_on_every_rank(rank_pool, num_ranks, checks, engine):
    results = rank_pool(num_ranks).run(run_refused, engine, case_for(num_ranks), checks)
    for rank, (first, second, waited, lost_is_nan, recovered) in enumerate(results):
        assert recovered and waited < 5, "an abort must not wait for the deadline"
        if rank == 0:
            assert (first, second) == (("ValueError", "MegaMoE: dtype of x must be torch.bfloat16, got torch.float32; cast it"), ("", ""))
            continue
        text = (f"rank {rank}: rank 0 aborted (it refused its arguments) while this rank was in dispatch; see the error of rank 0: "
                "this call is lost, the next one works")
        # Without a check the device may have told by the time the lost call returns, or the next call tells.
        assert sorted((first, second)) == [("", ""), ("PeerTimeoutError", text)] and lost_is_nan


def run_bad_routing(rank: int, num_ranks: int, engine: str, case: LayerCase, bad: int, mode: str):
    """The last rank passes a topk_idx out of range."""
    torch.cuda.set_device(rank)
    with device_layer(case, rank, engine) as layer:
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


@every_engine
@every_world
@pytest.mark.parametrize("mode", ("at once", "check", "next call"))
@pytest.mark.parametrize("bad", (8, -2, 2**40))
def test_topk_idx_out_of_range(rank_pool, num_ranks, bad, mode, engine):
    case = replace(case_for(num_ranks), tokens_per_rank=(6,) * num_ranks)
    results = rank_pool(num_ranks).run(run_bad_routing, engine, case, bad, mode)
    *others, (at_once, later, is_right) = results
    assert all(result == (("", ""), ("", ""), True) for result in others), "the other ranks finish with the right result"
    text = (f"MegaMoE: topk_idx must be in [-1, 8), got {bad} on rank {num_ranks - 1}, token 3, slot 1 (2 such slots were skipped); "
            "correct the router")
    assert sorted((at_once, later)) == [("", ""), ("ValueError", text)] and is_right
    if mode == "at once":
        assert at_once[0] == "ValueError"


def run_misaligned(rank: int, num_ranks: int, engine: str, case: LayerCase):
    torch.cuda.set_device(rank)
    with device_layer(case, rank, engine) as layer:
        x, topk_idx, topk_weights = device_inputs(case, rank)
        good = layer(x, topk_idx, topk_weights)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)
        message = outcome(lambda: layer(shifted, topk_idx, topk_weights))
        return message, bool(torch.equal(bits(layer(x, topk_idx, topk_weights)), bits(good)))


@every_engine
def test_tokens_that_no_kernel_can_read_are_refused(rank_pool, engine):
    (message, recovered), = rank_pool(1).run(run_misaligned, engine, case_for(1))
    assert message[0] == "ValueError" and "multiple of 16 bytes" in message[1] and recovered
