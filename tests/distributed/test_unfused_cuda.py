"""What only engine="unfused" has on GPUs: passes over a bounded pool and the NCCL transport."""

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from device_engines import bits, device_inputs, device_layer, every_world, needs_hopper, poison, received
from test_moe import small_case

from megamoe.engines import unfused
from megamoe.testing.inputs import LayerCase

pytestmark = needs_hopper


def run_passes(rank: int, num_ranks: int, case: LayerCase) -> int:
    torch.cuda.set_device(rank)
    inputs = device_inputs(case, rank)
    with device_layer(replace(case, arena_bytes=None), rank) as layer, device_layer(case, rank) as bounded:
        poison(bounded)
        assert torch.equal(bits(bounded(*inputs)), bits(layer(*inputs)))
        return bounded.engine._transport.num_passes


@every_world
def test_passes_do_not_change_a_bit(rank_pool, num_ranks):
    case = small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000)
    assert min(rank_pool(num_ranks).run(run_passes, case)) > 1


def run_nccl(rank: int, num_ranks: int, cases: list[LayerCase]) -> None:
    torch.cuda.set_device(rank)
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    group = dist.new_group(backend="nccl")
    arena_env = unfused.env
    for case in cases:
        inputs = device_inputs(case, rank)
        with device_layer(case, rank) as layer:
            expected = layer(*inputs)
        try:
            unfused.env = replace(arena_env, transport="nccl")
            with device_layer(case, rank, group=group) as layer:
                poison(layer)
                y, again = layer(*inputs), layer(*inputs)
                assert torch.equal(layer.expert_load().cpu(), 2 * received(case, rank))
        finally:
            unfused.env = arena_env
        assert torch.equal(bits(y), bits(expected)) and torch.equal(bits(again), bits(y)), f"rank {rank} of {case}"
    dist.destroy_process_group(group)


@every_world
def test_nccl_transport_gives_the_same_bits(rank_pool, num_ranks):
    cases = [small_case(routing=routing, has_bias=True, tokens=tuple(17 * (rank % 2) for rank in range(1, num_ranks + 1)))
             for routing in ("uniform", "one-rank", "skips")]
    cases.append(small_case(routing="one-rank", max_tokens_per_rank=200, num_topk=4, tokens=(200,) * num_ranks, arena_bytes=230_000))
    rank_pool(num_ranks).run(run_nccl, cases, timeout_s=200)
