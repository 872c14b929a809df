"""Fp4GemmConfig: shared memory as the kernel lays it out, and every illegal argument refused by name."""

import re
from dataclasses import replace

import pytest

from megamoe.kernels.fp4_gemm_config import (
    GROUP_ENTRY_BYTES,
    MAX_SMEM_BYTES,
    MAX_TOKEN_TILE,
    MAX_TOKEN_TILE_SIZES,
    REGISTERS,
    Fp4GemmConfig,
    with_most_stages,
)

GOOD = {"num_math_warpgroups": 2, "token_tiles": (64, 128), "num_stages": 4}


def test_properties_of_one_config():
    config = Fp4GemmConfig(**GOOD, max_groups=64)
    assert (config.tile_rows, config.num_threads, config.max_token_tile) == (128, 384, 128)
    assert config.stage_bytes == 9216 + 128 * 128, "8704 bytes of weights, up to the next multiple of 1024, then the tokens"
    staging, token_values, table = 2 * 128 * 144, 2 * 128 * 4, 64 * GROUP_ENTRY_BYTES
    assert 0 <= config.fixed_bytes - (staging + token_values + table) < 1024
    assert config.smem_bytes == 4 * (9216 + 128 * 128) + 4 * 16 + config.fixed_bytes


def test_swiglu_keeps_a_weight_per_token():
    store, swiglu = (Fp4GemmConfig(**GOOD, epilogue=epilogue) for epilogue in ("store", "swiglu"))
    assert swiglu.smem_bytes - store.smem_bytes == 2 * 128 * 4


def test_outputs_keep_the_rest_of_the_config():
    full = with_most_stages(num_math_warpgroups=3, token_tiles=(48, 88), max_groups=512)
    scattered, biased = full.with_output(scatter=True), full.with_output(scatter=True, has_bias=True)
    # Destinations, beside a place for weights, and the bias of each row of the tile may cost stages.
    assert scattered.fixed_bytes - full.fixed_bytes == 4 * 3 * 88 * 3
    assert biased.fixed_bytes - scattered.fixed_bytes == 4 * 192
    assert scattered == replace(full, scatter=True, num_stages=min(full.num_stages, scattered.fitting_stages))
    assert biased == replace(full, scatter=True, has_bias=True, num_stages=min(full.num_stages, biased.fitting_stages))
    assert biased.with_output() == replace(full, num_stages=biased.num_stages)


def test_two_warpgroups_with_small_tiles_load_ahead():
    def loads_ahead(number: int, tile: int, epilogue: str = "store") -> bool:
        return Fp4GemmConfig(num_math_warpgroups=number, token_tiles=(tile,), num_stages=2, epilogue=epilogue).loads_ahead

    assert loads_ahead(2, 160) and not loads_ahead(2, 176) and not loads_ahead(3, 64) and not loads_ahead(4, 16)
    assert loads_ahead(2, 128, "swiglu") and not loads_ahead(2, 160, "swiglu")


@pytest.mark.parametrize("num_math_warpgroups", REGISTERS)
def test_register_budgets_fit_an_sm(num_math_warpgroups):
    math, aux = REGISTERS[num_math_warpgroups]
    assert math % 8 == 0 and aux % 8 == 0 and 24 <= aux and math <= 240
    # A thread is launched with a multiple of 8 registers; setmaxnreg may only move what the launch has.
    num_threads = 128 * (num_math_warpgroups + 1)
    assert 128 * (num_math_warpgroups * math + aux) <= 65536 // num_threads // 8 * 8 * num_threads


@pytest.mark.parametrize("num_math_warpgroups", REGISTERS)
@pytest.mark.parametrize("epilogue", ["store", "accumulate", "swiglu"])
def test_most_stages_fill_shared_memory(num_math_warpgroups, epilogue):
    tiles = (MAX_TOKEN_TILE[epilogue][num_math_warpgroups],)
    config = with_most_stages(num_math_warpgroups=num_math_warpgroups, token_tiles=tiles, epilogue=epilogue)
    assert config.num_stages == config.fitting_stages >= 4
    assert config.smem_bytes <= MAX_SMEM_BYTES < config.smem_bytes + config.stage_bytes + 16
    assert with_most_stages(num_math_warpgroups=2, token_tiles=(8,), limit=5).num_stages == 5


def test_one_stage_too_many():
    largest = with_most_stages(num_math_warpgroups=2, token_tiles=(160,))
    with pytest.raises(ValueError, match=re.escape(
            f"fp4_gemm: num_stages must be at most {largest.num_stages} in 232448 bytes, got {largest.num_stages + 1}; use fewer stages")):
        Fp4GemmConfig(num_math_warpgroups=2, token_tiles=(160,), num_stages=largest.num_stages + 1)


@pytest.mark.parametrize("wrong, message", [
    ({"num_math_warpgroups": 1}, "fp4_gemm: num_math_warpgroups must be one of (2, 3, 4), got 1; see REGISTERS"),
    ({"token_tiles": ()}, "ascending multiples of 8 from 8 to {2}, got ()"),
    ({"token_tiles": (12,)}, "ascending multiples of 8 from 8 to {2}, got (12,)"),
    ({"token_tiles": (64, 32)}, "ascending multiples of 8 from 8 to {2}, got (64, 32)"),
    ({"token_tiles": (64, 64)}, "ascending multiples of 8 from 8 to {2}, got (64, 64)"),
    ({"token_tiles": (256,)}, "ascending multiples of 8 from 8 to {2}, got (256,)"),
    ({"num_math_warpgroups": 4, "token_tiles": (56,)}, "ascending multiples of 8 from 8 to {4}, got (56,)"),
    ({"epilogue": "relu"}, "fp4_gemm: epilogue must be one of ('store', 'accumulate', 'swiglu'), got relu; pick one of them"),
    ({"max_groups": 48}, "fp4_gemm: max_groups must be a power of two, got 48; round it up"),
    ({"max_groups": 0}, "fp4_gemm: max_groups must be a power of two, got 0; round it up"),
    ({"num_stages": 1}, "fp4_gemm: num_stages must be at least 2, got 1; a ring needs two"),
    ({"epilogue": "swiglu", "has_bias": True}, "fp4_gemm: has_bias must be False for swiglu, got True; it takes a bias as it is"),
    ({"epilogue": "accumulate", "scatter": True}, "fp4_gemm: scatter must be False unless the epilogue is store, got True; "
                                                  "accumulate into a tensor"),
])
def test_illegal_arguments(wrong, message):
    message = message.replace("{2}", str(MAX_TOKEN_TILE["store"][2])).replace("{4}", str(MAX_TOKEN_TILE["store"][4]))
    with pytest.raises(ValueError, match=re.escape(message)):
        Fp4GemmConfig(**GOOD | wrong)


@pytest.mark.parametrize("epilogue", ["store", "swiglu"])
def test_too_many_token_tile_sizes(epilogue):
    most = MAX_TOKEN_TILE_SIZES
    tiles = tuple(range(8, 8 * (most + 1), 8))
    assert Fp4GemmConfig(num_math_warpgroups=2, token_tiles=tiles, num_stages=2, epilogue=epilogue).token_tiles == tiles
    with pytest.raises(ValueError, match=re.escape(f"token_tiles must be at most {most} ascending multiples of 8")):
        Fp4GemmConfig(num_math_warpgroups=2, token_tiles=(*tiles, tiles[-1] + 8), num_stages=2, epilogue=epilogue)
