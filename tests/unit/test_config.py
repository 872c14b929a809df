"""MoEConfig: what is accepted, and the exact message of everything that is not."""

import dataclasses
import re

import pytest

from megamoe.config import MoEConfig

SMALL = dict(hidden=64, intermediate=96, num_experts=8, num_topk=2, max_tokens_per_rank=16)


def test_defaults_and_as_dict():
    cfg = MoEConfig(**SMALL)
    assert cfg.as_dict() == SMALL | dict(
        precision="fp8xfp4", activation="swiglu", swiglu_limit=None, swiglu_alpha=None, swiglu_up_bias=0.0)


@pytest.mark.parametrize("options", [
    dict(hidden=2880, intermediate=2880, num_experts=128, num_topk=4, swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_up_bias=1.0),
    dict(hidden=7168, intermediate=3072, num_experts=384, num_topk=6, swiglu_limit=10.0),
    dict(num_experts=1, num_topk=1), dict(num_experts=32, num_topk=32), dict(precision="fp8xfp8"), dict(precision="bf16"),
    dict(precision="fp32"), dict(hidden=32, intermediate=32), dict(max_tokens_per_rank=1), dict(swiglu_alpha=1.0),
])
def test_accepted(options):
    cfg = MoEConfig(**SMALL | options)
    assert options.items() <= cfg.as_dict().items()


@pytest.mark.parametrize("options, message", [
    (dict(hidden=0), "hidden must be a positive multiple of 32, got 0; pad the weights with zeros"),
    (dict(hidden=-32), "hidden must be a positive multiple of 32, got -32; pad the weights with zeros"),
    (dict(intermediate=100), "intermediate must be a positive multiple of 32, got 100; pad the weights with zeros"),
    (dict(num_experts=0), "num_experts must be positive, got 0; pass the size of the layer"),
    (dict(max_tokens_per_rank=0), "max_tokens_per_rank must be positive, got 0; pass the size of the layer"),
    (dict(num_topk=0), "num_topk must be in [1, 8], got 0; top-k is at most 32 and at most num_experts"),
    (dict(num_topk=9), "num_topk must be in [1, 8], got 9; top-k is at most 32 and at most num_experts"),
    (dict(num_experts=64, num_topk=33), "num_topk must be in [1, 32], got 33; top-k is at most 32 and at most num_experts"),
    (dict(precision="fp4"), "precision must be one of ('fp8xfp4', 'fp8xfp8', 'bf16', 'fp32'), got fp4; pick one of them"),
    (dict(activation="gelu"), "activation must be 'swiglu', got gelu; no other activation is implemented"),
    (dict(swiglu_limit=0.0), "swiglu_limit must be None or positive, got 0.0; None means no clamp"),
    (dict(swiglu_up_bias=1.0), "swiglu_up_bias must be 0 without swiglu_alpha, got 1.0; it would have no effect"),
])
def test_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'MoEConfig: {message}')}$"):
        MoEConfig(**SMALL | options)


def test_experts_per_rank():
    cfg = MoEConfig(**SMALL)
    assert [cfg.num_local_experts(num_ranks) for num_ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    message = "MoEConfig: num_experts must be divisible by the 3 ranks of the EP group, got 8; use a group whose size divides it"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cfg.num_local_experts(3)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEConfig(**SMALL).hidden = 32
    with pytest.raises(TypeError):
        MoEConfig(64, 96, 8, 2, 16)
