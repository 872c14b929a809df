"""Calls of engine="unfused" in sequence: CUDA graphs, many calls without a pause, layers that share an arena, torch.compile.

Everything also runs with one rank on one GPU. TEST_NUM_CALLS=1000 makes the run of changing calls longer.
"""

import os
import random
import time

import torch
import torch.distributed as dist
from test_moe import small_case
from test_unfused_cuda import bits, device_inputs, every_world, poison, unfused_layer
from test_unfused_cuda import pytestmark as pytestmark

from megamoe import MegaMoE, MoEConfig
from megamoe.testing.inputs import ROUTINGS, LayerCase
from megamoe.testing.layer_run import assert_case_accepted

NUM_CALLS = int(os.environ.get("TEST_NUM_CALLS", "100"))


def run_graph(rank: int, num_ranks: int, case: LayerCase) -> None:
    torch.cuda.set_device(rank)
    static = device_inputs(case, rank)
    with unfused_layer(case, rank) as layer:
        expected = [layer(*device_inputs(case.with_seed(seed), rank)) for seed in range(6)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(*static)
        poison(layer)
        for seed, due in enumerate(expected):
            for tensor, value in zip(static, device_inputs(case.with_seed(seed), rank)):
                tensor.copy_(value)
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(bits(y), bits(due)), f"replay {seed} on rank {rank}"
            eager = layer(*static)  # calls between replays keep their count
            assert torch.equal(bits(eager), bits(due)), f"call {seed} on rank {rank}"
        layer.check()


@every_world
def test_graph_replays_with_changing_inputs(rank_pool, num_ranks):
    # The weights come from the seed too, so the layer of seed 0 runs the inputs of the others: expected values are its own eager results.
    rank_pool(num_ranks).run(run_graph, small_case(tokens=tuple(5 + 6 * rank for rank in range(num_ranks)), hidden=256, routing="skips"))


def run_changing_calls(rank: int, num_ranks: int, cfg: MoEConfig, num_calls: int) -> None:
    torch.cuda.set_device(rank)
    same, own = random.Random(1), random.Random(2 + rank)
    calls = []
    for i in range(num_calls):
        tokens = tuple(same.choice((0, 1, same.randint(0, cfg.max_tokens_per_rank), cfg.max_tokens_per_rank)) for _ in range(num_ranks))
        calls.append((LayerCase(cfg=cfg, tokens_per_rank=tokens, seed=i, routing=ROUTINGS[i % len(ROUTINGS)]), same.randrange(num_ranks)))
    inputs = [device_inputs(case, rank) for case, _ in calls]
    weights = LayerCase(cfg=cfg, tokens_per_rank=(0,) * num_ranks)
    expected = []
    with unfused_layer(weights, rank) as layer:
        for call in inputs:  # each by itself: nothing of another call is under way or left over
            poison(layer)
            torch.cuda.synchronize()
            dist.barrier()
            expected.append(layer(*call))
            torch.cuda.synchronize()
            dist.barrier()
    with unfused_layer(weights, rank) as layer:
        got = []
        for (_, late), call in zip(calls, inputs):
            if rank == late:
                torch.cuda._sleep(own.randrange(2_000_000))  # up to a millisecond on the device
                time.sleep(own.random() * 1e-3)
            got.append(layer(*call))
        layer.check()
    wrong = [i for i, (y, due) in enumerate(zip(got, expected)) if not torch.equal(bits(y), bits(due))]
    assert not wrong, f"rank {rank}: calls {wrong[:10]} of {num_calls} differ from separate ones"


@every_world
def test_back_to_back_calls_equal_separate_ones(rank_pool, num_ranks):
    cfg = MoEConfig(hidden=512, intermediate=256, num_experts=8 * num_ranks, num_topk=4, max_tokens_per_rank=64)
    rank_pool(num_ranks).run(run_changing_calls, cfg, NUM_CALLS, timeout_s=100 + NUM_CALLS)


def run_shared_arena(rank: int, num_ranks: int, case: LayerCase) -> str:
    torch.cuda.set_device(rank)
    cases = [case.with_seed(seed) for seed in range(3)]
    first = unfused_layer(cases[0], rank)
    layers = [first, *(unfused_layer(each, rank, arena=first.arena) for each in cases[1:])]
    assert len({id(layer.engine._transport) for layer in layers}) == 1
    inputs = [device_inputs(each, rank) for each in cases]
    rounds = [[layer(*call) for layer, call in zip(layers, inputs)] for _ in range(3)]
    for each, *results in zip(cases, *rounds):
        assert all(torch.equal(bits(y), bits(results[0])) for y in results)
        assert_case_accepted(each, rank, results[0], 32)
    try:
        MegaMoE(case.cfg, device="cuda", engine="reference", arena=first.arena)
    except ValueError as error:
        return str(error)
    finally:
        first.close()


@every_world
def test_layers_share_an_arena(rank_pool, num_ranks):
    for message in rank_pool(num_ranks).run(run_shared_arena, small_case(tokens=(11,) * num_ranks)):
        assert message == ("Arena: the driver of its calls must be the device, as its first layer has it, got the host; "
                           "create the layer with an arena of its own")


def test_compiles_as_one_graph():
    case = small_case(num_ranks=1)
    layer, inputs = unfused_layer(case, 0), device_inputs(case, 0)
    with torch.no_grad():
        expected = layer(*inputs) + layer(*inputs)
        got = torch.compile(lambda *args: layer(*args) + layer(*args), fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, expected) and int(layer.arena.num_calls) == 4
