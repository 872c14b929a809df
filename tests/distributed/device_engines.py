"""What the tests of engines that kernels drive share: worlds, layers, inputs, poison, and the judgement of a case."""

import os
from dataclasses import replace

import pytest
import torch

from megamoe import MegaMoE
from megamoe.testing.inputs import LayerCase, rank_inputs
from megamoe.testing.layer_run import assert_case_accepted, build_layer

ENGINES = ("unfused", "fused")
IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
NUM_GPUS = torch.cuda.device_count() if IS_HOPPER else 0
WORLDS = [1] + ([min(4, NUM_GPUS)] if NUM_GPUS > 1 else [])

needs_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")
needs_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="needs two Hopper GPUs")
every_world = pytest.mark.parametrize("num_ranks", WORLDS)
every_engine = pytest.mark.parametrize("engine", ENGINES)


def on_ranks(case: LayerCase, num_ranks: int) -> LayerCase:
    """The case with the tokens of the first ranks, repeated where there are more."""
    return replace(case, tokens_per_rank=tuple(case.tokens_per_rank[rank % case.num_ranks] for rank in range(num_ranks)))


def device_inputs(case: LayerCase, rank: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.cuda() for tensor in rank_inputs(case, rank))


def device_layer(case: LayerCase, rank: int, engine: str = "unfused", **options) -> MegaMoE:
    """The layer of `case` on this rank's GPU, which becomes the current one. Collective."""
    torch.cuda.set_device(rank)
    return build_layer(case, rank, **{"device": "cuda", "engine": engine, "timeout_s": 30.0, **options})


def poison(layer: MegaMoE) -> None:
    """NaN wherever a call could read what it has not written."""
    for name in ("partials", "pool_x", "pool_x_sf", "pool_a", "pool_a_sf", "x", "x_sf"):
        layer.arena.view(name).view(torch.uint8).fill_(0xFF)


def received(case: LayerCase, rank: int) -> torch.Tensor:
    """Rows that each local expert of `rank` should get."""
    all_idx = torch.cat([rank_inputs(case, src)[1].flatten() for src in range(case.num_ranks)])
    num_local = case.cfg.num_local_experts(case.num_ranks)
    return torch.bincount(all_idx[all_idx >= 0], minlength=case.cfg.num_experts)[rank * num_local: (rank + 1) * num_local]


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int16)


def run_and_judge(layer: MegaMoE, case: LayerCase, rank: int) -> torch.Tensor:
    """Two calls: equal bits, the rows they should receive, and the acceptance. Returns y."""
    inputs, where = device_inputs(case, rank), f"{layer.engine.name}, rank {rank} of {case}"
    poison(layer)
    layer.expert_load()  # forgets the calls before
    y = layer(*inputs)
    load = layer.expert_load()
    again = layer(*inputs)
    layer.check()
    differing = (bits(again) != bits(y)).any(1).nonzero().flatten().tolist()
    assert not differing, f"tokens {differing[:8]} differ between two runs: {where}"
    assert torch.equal(load.cpu(), received(case, rank)), where
    assert_case_accepted(case, rank, y, layer.engine.act_group)
    return y


def run_cases(rank: int, num_ranks: int, engine: str, cases: list[LayerCase]) -> None:
    """On a rank: every case by itself."""
    for case in cases:
        with device_layer(case, rank, engine) as layer:
            run_and_judge(layer, case, rank)


def num_calls(engine: str) -> int:
    """Of the long sequences: TEST_NUM_CALLS, or 2000 of the fused engine, whose kernels hand most over from call to call."""
    return int(os.environ.get("TEST_NUM_CALLS", 2000 if engine == "fused" else 100))
