"""engine="unfused" on GPUs that must not touch each other's memory: the same bits, and failures named in time."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from device_engines import NUM_GPUS, bits, device_inputs, device_layer, needs_gpus, needs_hopper, poison, received
from test_moe import small_case

from megamoe import EngineUnavailableError, MegaMoE, PeerTimeoutError
from megamoe.engines.transports import NcclTransport
from megamoe.testing.inputs import LayerCase
from megamoe.testing.ranks import outcome

pytestmark = [needs_hopper, needs_gpus]
NUM_RANKS = min(4, NUM_GPUS)


@contextmanager
def nccl_group(rank: int) -> Iterator[dist.ProcessGroup]:
    torch.cuda.set_device(rank)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    group = dist.new_group(backend="nccl")
    yield group
    dist.destroy_process_group(group)


def run_cases(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    with nccl_group(rank) as group:
        for case in cases:
            inputs = device_inputs(case, rank)
            with device_layer(case, rank) as layer:
                expected = layer(*inputs)
                layer.check()
            with device_layer(case, rank, group=group, backend="unmapped", engine="auto") as layer:
                poison(layer)
                y, again = layer(*inputs), layer(*inputs)
                assert torch.equal(layer.expert_load().cpu(), 2 * received(case, rank))
                assert layer.engine.name == "unfused" and isinstance(layer.engine._transport, NcclTransport)
                assert re.search("engine=unfused .*, backend=unmapped, ", repr(layer))
            assert torch.equal(bits(y), bits(expected)) and torch.equal(bits(again), bits(y)), f"rank {rank} of {case}"


def test_the_same_bits_as_over_peer_pointers(rank_pool):
    cases = [small_case(routing=routing, has_bias=True, tokens=tuple(17 * (rank % 2) for rank in range(1, NUM_RANKS + 1)))
             for routing in ("uniform", "one-rank", "skips")]
    cases.append(small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * NUM_RANKS, arena_bytes=230_000))
    rank_pool(NUM_RANKS).run(run_cases, cases, timeout_s=200)


def run_failures(rank: int, num_ranks: int, case: LayerCase):
    """Good, refused by rank 0, good, too late on rank 1, reset, good."""
    with nccl_group(rank) as group:
        x, topk_idx, topk_weights = device_inputs(case, rank)
        with device_layer(case, rank, group=group, backend="unmapped", timeout_s=3.0) as layer:
            dist.barrier()  # compiling the GEMMs takes some ranks longer
            good = layer(x, topk_idx, topk_weights)
            begin = time.monotonic()
            refused = outcome(lambda: layer(x.float() if rank == 0 else x, topk_idx, topk_weights))
            waited = time.monotonic() - begin
            after_refused = layer(x, topk_idx, topk_weights)
            if rank == 1:
                time.sleep(5)
            with pytest.raises(PeerTimeoutError) as stalled:
                layer(x, topk_idx, topk_weights)
            unusable = outcome(lambda: layer(x, topk_idx, topk_weights))
            layer.reset()
            after_reset = layer(x, topk_idx, topk_weights)
            recovered = torch.equal(bits(after_refused), bits(good)) and torch.equal(bits(after_reset), bits(good))
            return refused, waited, (str(stalled.value), stalled.value.peer), unusable, recovered


def test_refused_and_silent_ranks_are_found_before_a_collective(rank_pool):
    results = rank_pool(NUM_RANKS).run(run_failures, small_case(tokens=(5,) * NUM_RANKS), timeout_s=90)
    for rank, (refused, waited, (stalled, peer), unusable, recovered) in enumerate(results):
        if rank == 0:
            assert refused == ("ValueError", "MegaMoE: dtype of x must be torch.bfloat16, got torch.float32; cast it")
        else:
            text = (f"rank {rank}: rank 0 aborted (it refused its arguments) while this rank was in dispatch; see the error of rank 0: "
                    "this call is lost, the next one works")
            assert refused == ("PeerTimeoutError", text)
        assert waited < 1.5, "an abort does not wait for the deadline"
        assert "rank 1" in stalled and "silent" in stalled and (rank == 1 or peer == 1)
        assert unusable[0] == "RuntimeError" and "call reset() on every rank" in unusable[1]
        assert recovered


def construct(rank: int, num_ranks: int, case: LayerCase) -> tuple[str, str]:
    torch.cuda.set_device(rank)
    return outcome(lambda: MegaMoE(case.cfg, device="cuda", backend="unmapped"))


def test_a_group_without_nccl_is_refused(rank_pool):
    text = ("MegaMoE: transport 'nccl' cannot run here: the backend of the group must be nccl for cuda, got cpu:gloo,cuda:gloo; pass "
            "group=torch.distributed.new_group(backend='nccl')")
    assert rank_pool(NUM_RANKS).run(construct, small_case(num_ranks=NUM_RANKS)) == [(EngineUnavailableError.__name__, text)] * NUM_RANKS
