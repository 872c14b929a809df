"""Calls of engines that kernels drive in sequence: CUDA graphs, many calls without a pause, layers that share an arena, torch.compile.

Everything also runs with one rank on one GPU. TEST_NUM_CALLS sets the length of the run of changing calls.
"""

import random
import time

import torch
import torch.distributed as dist
from device_engines import bits, device_inputs, device_layer, every_engine, every_world, needs_hopper, num_calls, poison
from test_moe import small_case

from megamoe import MegaMoE, MoEConfig
from megamoe.testing.inputs import ROUTINGS, LayerCase
from megamoe.testing.layer_run import assert_case_accepted

pytestmark = needs_hopper


def run_graph(rank: int, num_ranks: int, engine: str, case: LayerCase) -> None:
    torch.cuda.set_device(rank)
    static = device_inputs(case, rank)
    with device_layer(case, rank, engine) as layer:
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


@every_engine
@every_world
def test_graph_replays_with_changing_inputs(rank_pool, num_ranks, engine):
    # The weights come from the seed too, so the layer of seed 0 runs the inputs of the others: expected values are its own eager results.
    tokens = tuple(5 + 6 * rank for rank in range(num_ranks))
    rank_pool(num_ranks).run(run_graph, engine, small_case(tokens=tokens, hidden=256, routing="skips"))


def changing_cases(cfg: MoEConfig, num_ranks: int, length: int) -> list[tuple[LayerCase, int]]:
    """Calls whose tokens and routing change, each with the rank that is late in it; the same on every rank."""
    rng, largest, found = random.Random(1), cfg.max_tokens_per_rank, []
    for i in range(length):
        tokens = tuple(rng.choice((0, 1, rng.randint(0, largest), largest)) for _ in range(num_ranks))
        found.append((LayerCase(cfg=cfg, tokens_per_rank=tokens, seed=i, routing=ROUTINGS[i % len(ROUTINGS)]), rng.randrange(num_ranks)))
    return found


def differing(got: list[torch.Tensor], expected: list[torch.Tensor]) -> list[int]:
    """Numbers of the calls whose y is not the expected one, bit for bit."""
    return [i for i, (y, due) in enumerate(zip(got, expected)) if not torch.equal(bits(y), bits(due))]


def run_changing_calls(rank: int, num_ranks: int, engine: str, cfg: MoEConfig, length: int) -> None:
    torch.cuda.set_device(rank)
    calls, own = changing_cases(cfg, num_ranks, length), random.Random(2 + rank)
    inputs = [device_inputs(case, rank) for case, _ in calls]
    weights = LayerCase(cfg=cfg, tokens_per_rank=(0,) * num_ranks)
    expected = []
    with device_layer(weights, rank, engine) as layer:
        for call in inputs:  # each by itself: nothing of another call is under way or left over
            poison(layer)
            torch.cuda.synchronize()
            dist.barrier()
            expected.append(layer(*call))
            torch.cuda.synchronize()
            dist.barrier()
    with device_layer(weights, rank, engine) as layer:
        got = []
        for (_, late), call in zip(calls, inputs):
            if rank == late:
                torch.cuda._sleep(own.randrange(2_000_000))  # up to a millisecond on the device
                time.sleep(own.random() * 1e-3)
            got.append(layer(*call))
        layer.check()
    wrong = differing(got, expected)
    assert not wrong, f"{engine}, rank {rank}: calls {wrong[:10]} of {length} differ from separate ones; the first is {calls[wrong[0]][0]}"


@every_engine
@every_world
def test_back_to_back_calls_equal_separate_ones(rank_pool, num_ranks, engine):
    cfg, length = MoEConfig(hidden=512, intermediate=256, num_experts=8 * num_ranks, num_topk=4, max_tokens_per_rank=64), num_calls(engine)
    rank_pool(num_ranks).run(run_changing_calls, engine, cfg, length, timeout_s=100 + length / 10)


def run_poisoned_calls(rank: int, num_ranks: int, engine: str, cfg: MoEConfig) -> None:
    """Without a pause, but for what fills the buffers of this rank with NaN in between: only its own pool may be touched then."""
    torch.cuda.set_device(rank)
    calls = changing_cases(cfg, num_ranks, 50)
    inputs = [device_inputs(case, rank) for case, _ in calls]
    with device_layer(LayerCase(cfg=cfg, tokens_per_rank=(0,) * num_ranks), rank, engine) as layer:
        expected = [layer(*call) for call in inputs]
        got = []
        for call in inputs:
            for name in ("pool_x", "pool_x_sf", "pool_a", "pool_a_sf"):
                layer.arena.view(name).view(torch.uint8).fill_(0xFF)
            got.append(layer(*call))
        layer.check()
    wrong = differing(got, expected)
    assert not wrong, f"{engine}, rank {rank}: calls {wrong[:10]} read what they had not written"


@every_engine
@every_world
def test_calls_read_nothing_of_the_pool_that_they_did_not_write(rank_pool, num_ranks, engine):
    cfg = MoEConfig(hidden=512, intermediate=256, num_experts=8 * num_ranks, num_topk=4, max_tokens_per_rank=64)
    rank_pool(num_ranks).run(run_poisoned_calls, engine, cfg, timeout_s=100)


def run_shared_arena(rank: int, num_ranks: int, engine: str, case: LayerCase) -> str:
    torch.cuda.set_device(rank)
    cases = [case.with_seed(seed) for seed in range(3)]
    first = device_layer(cases[0], rank, engine)
    layers = [first, *(device_layer(each, rank, engine, arena=first.arena) for each in cases[1:])]
    kernels = "_kernels" if engine == "fused" else "_transport"
    assert len({id(getattr(layer.engine, kernels)) for layer in layers}) == 1
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


@every_engine
@every_world
def test_layers_share_an_arena(rank_pool, num_ranks, engine):
    for message in rank_pool(num_ranks).run(run_shared_arena, engine, small_case(tokens=(11,) * num_ranks)):
        assert message == ("Arena: the driver of its calls must be the device, as its first layer has it, got the host; "
                           "create the layer with an arena of its own")


@every_engine
def test_compiles_as_one_graph(engine):
    case = small_case(num_ranks=1)
    layer, inputs = device_layer(case, 0, engine), device_inputs(case, 0)
    with torch.no_grad():
        expected = layer(*inputs) + layer(*inputs)
        got = torch.compile(lambda *args: layer(*args) + layer(*args), fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(got, expected) and int(layer.arena.num_calls) == 4
