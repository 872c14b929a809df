"""The fused engine without a GPU: what it hands to its kernels and in which order, with stand-ins for these."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megamoe import MoEConfig
from megamoe.comm.protocol import ArenaDims
from megamoe.engines import fused
from megamoe.formats import ExpertWeights, quantize_fp4
from megamoe.kernels.tuning.moe_shape import token_bucket

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=4, num_topk=2, max_tokens_per_rank=16, swiglu_alpha=1.702, swiglu_up_bias=1.0)


class Recorder:
    """Stands for ArenaDispatch or MegaMoe: notes each call with its arguments."""

    def __init__(self, events: list, *args, **kwargs):
        self.events, self.made_with = events, kwargs

    def __getattr__(self, name):
        def note(*args):
            self.events.append((name, *args))
            return f"result of {name}"

        return note


class FakeArena:
    """One rank of two on the CPU, driven by nobody."""

    rank, num_ranks, device, layout, peer_ptrs, own_bytes = 0, 2, torch.device("cpu"), None, (1, 2), None
    dims = ArenaDims(2, 16, 2, 4, 64, 32, "fp8xfp4", pool_rows=64)

    def __init__(self, events):
        self.events, self.made = events, {}

    def drive_by_device(self):
        return "calls"

    def shared(self, name, make):
        return self.made.setdefault(name, None) or self.made.update({name: make()}) or self.made[name]

    def note_published(self):
        self.events.append(("note_published",))


@pytest.fixture
def events(monkeypatch) -> list:
    found: list = []
    monkeypatch.setattr(fused, "ArenaDispatch", lambda *args, **kwargs: Recorder(found, *args, **kwargs))
    monkeypatch.setattr(fused, "MegaMoe", lambda *args, **kwargs: Recorder(found, *args, **kwargs))
    monkeypatch.setattr(fused, "num_sms", lambda device: 132)
    monkeypatch.setattr(fused, "devices", SimpleNamespace(current=lambda device: contextlib.nullcontext()))
    return found


def weights(seed: int = 0, has_bias: bool = True) -> ExpertWeights:
    g = torch.Generator().manual_seed(seed)
    biases = (torch.randn(2, 64, generator=g), torch.randn(2, 64, generator=g)) if has_bias else (None, None)
    return ExpertWeights(torch.randn(2, 64, 64, generator=g), torch.randn(2, 64, 32, generator=g), *biases)


def quantize_experts(hidden: int, intermediate: int) -> ExpertWeights:
    return ExpertWeights(quantize_fp4(torch.randn(2, 2 * intermediate, hidden)), quantize_fp4(torch.randn(2, hidden, intermediate)), None, None)


def test_a_call(events):
    arena = FakeArena(events)
    engine = fused.FusedEngine(CFG, arena)
    assert (engine.name, engine.act_group, engine.is_synchronous, engine.is_loaded, engine.weights()) == ("fused", 32, False, False, None)
    kernels = arena.made["fused kernels"]
    assert kernels.dispatch.made_with == {"is_one_pass": True} and kernels.mega.made_with == {"num_blocks": 132}
    engine.load(weights())
    (_, configs), = events
    assert all(config.has_down_bias and config.max_groups == 2 and config.max_token_tile <= 64 for config in configs)
    events.clear()
    x, load = torch.zeros(5, 64, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    topk_idx, topk_weights = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
    y = engine.forward(x, None, topk_idx, topk_weights, load)
    assert [event[0] for event in events] == ["stage", "note_published", "route", "rows", "launch"]
    assert events[0][1:] == (x, None, topk_idx, topk_weights) and events[2][1] is load
    _, config, experts, rows, out, timeline = events[-1]
    assert config is engine._configs[token_bucket(5)] and rows == "result of rows" and out is y and timeline is None
    assert (y.shape, y.dtype) == ((5, 64), torch.bfloat16)
    assert (experts.limit, experts.alpha, experts.up_bias) == (float("inf"), 1.702, 1.0)


@pytest.mark.parametrize("num_tokens, is_ahead", ((0, False), (1, False), (2, True), (16, True)))
def test_weights_go_ahead_of_the_routing_from_two_rows_per_expert_on(events, num_tokens, is_ahead):
    engine = fused.FusedEngine(CFG, FakeArena(events))
    engine.load(weights())
    events.clear()
    topk = torch.zeros(num_tokens, 2)
    engine.forward(torch.zeros(num_tokens, 64).bfloat16(), None, topk.long(), topk, torch.zeros(2, dtype=torch.int64))
    (_, _, ahead), = (event for event in events if event[0] == "route")
    if is_ahead:
        assert ahead.data_ptr() == engine._packed.gate_up.blocks.data_ptr() and ahead.nbytes == engine._packed.gate_up.blocks.nbytes
    else:
        assert ahead is None


@pytest.mark.parametrize("hidden, intermediate, thread_order", ((128, 256, True), (128, 96, False), (64, 128, False)))
def test_whole_blocks_of_k_go_in_thread_order(events, hidden, intermediate, thread_order):
    cfg = replace(CFG, hidden=hidden, intermediate=intermediate)
    engine, given = fused.FusedEngine(cfg, FakeArena(events)), quantize_experts(hidden, intermediate)
    engine.load(given)
    (_, configs), = events
    experts = engine._experts
    assert {config.thread_order for config in configs} == {experts.gate_up.thread_order} == {experts.down.thread_order} == {thread_order}
    back = engine.weights()
    assert torch.equal(back.gate_up.codes, given.gate_up.codes) and torch.equal(back.down.codes, given.down.codes)


def test_producers_write_tokens_beside_the_arena(events):
    """One pair for all its layers, made when asked for."""
    arena = FakeArena(events)
    first, second = (fused.FusedEngine(CFG, arena) for _ in range(2))
    assert "fused token views" not in arena.made
    x, x_sf = first.token_views()
    assert (x.shape, x.dtype, x_sf.shape, x_sf.dtype) == ((16, 64), torch.float8_e4m3fn, (16, 2), torch.uint8)
    assert second.token_views()[0] is x


def test_layers_share_the_kernels_of_an_arena(events):
    arena = FakeArena(events)
    first, second = (fused.FusedEngine(CFG, arena) for _ in range(2))
    assert first._kernels is second._kernels


def test_weights_come_back_canonical(events):
    engine = fused.FusedEngine(CFG, FakeArena(events))
    given = weights().to_precision("fp8xfp4")
    engine.load(given)
    back = engine.weights()
    for name in ("gate_up", "down"):
        assert torch.equal(getattr(back, name).dequantize(), getattr(given, name).dequantize())
    assert torch.equal(back.gate_up_bias, given.gate_up_bias) and torch.equal(back.down_bias, given.down_bias)
    engine.load(weights(seed=1, has_bias=False))
    assert engine._experts.gate_up_bias is None and not any(config.has_down_bias for config in engine._configs.values())
