"""Which engine a layer gets and why, and who may drive the calls of an arena."""

import re
from dataclasses import replace

import pytest
import torch

from megamoe import EngineUnavailableError, MegaMoE, MoEConfig
from megamoe.engines import ENGINES, base, choose_engine
from megamoe.engines.base import why_not_fused
from megamoe.kernels.fp4_gemm_config import MAX_SMEM_BYTES
from megamoe.kernels.moe_gemms import MoEShape, all_moe_gemms, choose_moe_gemms, token_bucket

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=4, num_topk=2, max_tokens_per_rank=16)
GPT_OSS = MoEShape(hidden=2880, intermediate=2880, num_experts=128, num_topk=4, num_ranks=4, has_down_bias=True, scatter=True, num_sms=132)


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(major, minor)` makes every CUDA device one of that capability."""
    return lambda *capability: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_auto_on_a_hopper(gpu):
    gpu(9, 0)
    assert choose_engine("auto", "cuda:0", "fp8xfp4") == ("fused", "the fastest one here")
    assert choose_engine("unfused", "cuda:0", "fp8xfp4") == ("unfused", "requested")
    assert choose_engine("reference", "cuda:0", "fp8xfp4") == ("reference", "requested")


@pytest.mark.parametrize("device, precision, capability, obstacle", [
    ("cpu", "fp8xfp4", (9, 0), "needs a Hopper GPU, not device cpu"),
    ("cuda:0", "fp8xfp4", (10, 0), "needs a Hopper GPU, not sm_100"),
    ("cuda:0", "fp8xfp4", (8, 0), "needs a Hopper GPU, not sm_80"),
    ("cuda:0", "bf16", (9, 0), "computes fp8xfp4, not bf16")])
def test_elsewhere_auto_is_reference_and_unfused_says_why_not(gpu, device, precision, capability, obstacle):
    gpu(*capability)
    assert choose_engine("auto", device, precision) == ("reference", f"unfused {obstacle}")
    message = f"MegaMoE: engine 'unfused' cannot run here: it {obstacle}; pass engine='auto'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        choose_engine("unfused", device, precision)


def test_ranks_whose_memory_is_not_mapped(gpu):
    gpu(9, 0)
    needs = "loads and stores the memory of peers, which backend 'unmapped' does not map"
    assert choose_engine("auto", "cuda:0", "fp8xfp4", is_mapped=False) == ("unfused", f"fused {needs}")
    assert choose_engine("unfused", "cuda:0", "fp8xfp4", is_mapped=False) == ("unfused", "requested")
    message = f"MegaMoE: engine 'reference' cannot run here: it {needs}; pass engine='auto'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        choose_engine("reference", "cuda:0", "fp8xfp4", is_mapped=False)
    message = (f"MegaMoE: no engine can run here: reference {needs}, and unfused computes fp8xfp4, not bf16; use a group whose ranks are "
               "in one NVLink domain, or on the CPU on one host")
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        choose_engine("auto", "cuda:0", "bf16", is_mapped=False)


def test_why_fused_cannot_run(gpu):
    gpu(9, 0)
    assert choose_engine("fused", "cuda:0", "fp8xfp4") == ("fused", "requested")
    message = ("MegaMoE: engine 'fused' cannot run here: it loads and stores the memory of peers, which backend 'unmapped' does not map; "
               "pass engine='auto'")
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        choose_engine("fused", "cuda:0", "fp8xfp4", is_mapped=False)
    message = "MegaMoE: engine 'fused' cannot run here: it computes fp8xfp4, not bf16; pass engine='auto'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        choose_engine("fused", "cuda:0", "bf16", is_mapped=False)
    assert why_not_fused(torch.device("cuda:0"), "fp8xfp4", True) is None
    assert why_not_fused(torch.device("cpu"), "fp8xfp4", False) == "needs a Hopper GPU, not device cpu"


def test_engines_that_do_not_exist():
    message = "MegaMoE: engine must be one of ('auto', 'reference', 'unfused', 'fused'), got 'mega'; pass engine='auto'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        choose_engine("mega", "cpu", "bf16")


def test_a_layer_that_cannot_have_its_engine():
    message = "MegaMoE: engine 'unfused' cannot run here: it needs a Hopper GPU, not device cpu; pass engine='auto'"
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        MegaMoE(CFG, engine="unfused")
    with pytest.raises(EngineUnavailableError, match="^MegaMoE: engine 'fused' cannot run here: it needs a Hopper GPU, not device cpu"):
        MegaMoE(CFG, engine="fused")
    assert set(ENGINES) == {"reference", "unfused", "fused"} == set(base.AUTO_ORDER)


def test_an_arena_has_one_driver():
    arena = MegaMoE(CFG).arena
    arena.claim("host")
    message = ("Arena: the driver of its calls must be the host, as its first layer has it, got the device; "
               "create the layer with an arena of its own")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        arena.claim("device")


def test_layers_of_an_arena_share_what_the_first_one_made():
    arena = MegaMoE(CFG).arena
    made = arena.shared("list", list)
    assert arena.shared("list", list) is made and arena.shared("other", list) is not made


def test_one_bucket_per_power_of_two():
    assert [token_bucket(n) for n in (0, 1, 2, 3, 4, 5, 8192)] == [1, 1, 2, 4, 4, 8, 8192]
    gemms = all_moe_gemms(GPT_OSS, max_tokens=100)
    assert list(gemms) == [1, 2, 4, 8, 16, 32, 64, 128]
    for num_tokens in range(101):
        assert gemms[token_bucket(num_tokens)] == choose_moe_gemms(GPT_OSS, num_tokens)


@pytest.mark.parametrize("has_bias", (False, True))
@pytest.mark.parametrize("scatter", (False, True))
def test_configs_do_what_the_layer_needs(has_bias, scatter):
    shape = replace(GPT_OSS, has_down_bias=has_bias, scatter=scatter)
    for pair in all_moe_gemms(shape, max_tokens=8192).values():
        assert pair.gate_up.epilogue == "swiglu" and not pair.gate_up.scatter
        assert (pair.down.epilogue, pair.down.has_bias, pair.down.scatter) == ("store", has_bias, scatter)
        for config in (pair.gate_up, pair.down):
            assert config.max_groups >= 32 and config.smem_bytes <= MAX_SMEM_BYTES
