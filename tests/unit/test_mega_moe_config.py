"""MegaMoeConfig and the choice of one: what is legal, shared memory, and which candidate serves which number of tokens."""

import re
from dataclasses import replace

import pytest

from megamoe.comm.budget import plan_dims
from megamoe.config import MoEConfig
from megamoe.kernels import shipped
from megamoe.kernels.fp4_gemm_config import MAX_SMEM_BYTES
from megamoe.kernels.mega_moe_config import MAX_TOKEN_TILE, REGISTERS, MegaMoeConfig, table_capacity, with_most_stages
from megamoe.kernels.tuning.moe_shape import MoEShape
from megamoe.kernels.tuning.mega import CANDIDATES, all_mega, choose_mega, predict_us

V4_PRO = MoEShape(hidden=7168, intermediate=3072, num_experts=384, num_topk=6, num_ranks=4, has_down_bias=False, scatter=True, num_sms=132)
SHAPE = {"num_math_warpgroups": 3, "token_tiles": (32, 64), "num_stages": 4, "max_groups": 128, "has_down_bias": False, "hidden": 7168,
         "intermediate": 3072}


@pytest.mark.parametrize("change, message", [
    ({"num_math_warpgroups": 1}, "num_math_warpgroups must be one of (2, 3, 4), got 1; see REGISTERS"),
    ({"token_tiles": (32, 112)}, "token_tiles must be at most 16 ascending multiples of 8 from 8 to 104, got (32, 112); use fewer sizes or "
                                 "fewer warpgroups"),
    ({"cluster_blocks": 3}, "cluster_blocks must be 1 or 2, got 3; larger clusters have not been measured"),
    ({"cluster_blocks": 2, "token_tiles": (8, 32)}, "token_tiles must be at most 8 ascending multiples of 8 from 16 to 104, got (8, 32); use "
     "fewer sizes or fewer warpgroups"),
    ({"token_tiles": (64, 32)}, "token_tiles must be at most 16 ascending multiples of 8 from 8 to 104, got (64, 32); use fewer sizes or fewer "
                                "warpgroups"),
    ({"token_tiles": ()}, "token_tiles must be at most 16 ascending multiples of 8 from 8 to 104, got (); use fewer sizes or fewer warpgroups"),
    ({"num_math_warpgroups": 4, "token_tiles": (56,)}, "token_tiles must be at most 16 ascending multiples of 8 from 8 to 48, got (56,); use "
                                                       "fewer sizes or fewer warpgroups"),
    ({"max_groups": 96}, "max_groups must be a power of two, got 96; round it up"),
    ({"num_stages": 1}, "num_stages must be at least 2, got 1; a ring needs two"),
    ({"num_stages": 9}, "num_stages must be at most 8 in 232448 bytes, got 9; use fewer stages"),
    ({"hidden": 7150}, "hidden must be a positive multiple of 32, got 7150; pad the layer"),
    ({"intermediate": 0}, "intermediate must be a positive multiple of 32, got 0; pad the layer"),
    ({"pull_buffers": 0}, "pull_buffers must be at least 1, got 0; a row needs one"),
])
def test_what_is_not_legal(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'mega_moe: {message}')}$"):
        MegaMoeConfig(**SHAPE | change)


def test_shared_memory_of_one_config():
    config = MegaMoeConfig(**SHAPE)
    stage = 13 * 1024 + 64 * 128  # 3 units of 4352 bytes rounded up to 1024, then the tokens
    gemm = 4 * (stage + 16) + 3 * 64 * (144 + 16) + 128 * 16 + 16 + 4 * (48 + 16)
    assert config.gemm_bytes == gemm
    assert config.smem_bytes == -(-gemm // 128) * 128 + 2 * (7168 + 16) + 4 * 8
    assert replace(config, has_down_bias=True).gemm_bytes == gemm + 4 * 192
    assert replace(config, pull_buffers=3).smem_bytes == config.smem_bytes + 7168 + 16
    assert replace(config, cluster_blocks=2).smem_bytes == config.smem_bytes + 24


@pytest.mark.parametrize("hidden", (32, 96, 2880, 7168, 16384))
@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_most_stages(hidden, candidate):
    shape = {**candidate._asdict(), "max_groups": 64, "has_down_bias": True, "hidden": hidden, "intermediate": 64}
    config = with_most_stages(**shape)
    assert config.smem_bytes <= MAX_SMEM_BYTES
    assert config.num_stages == 16 or config.smem_bytes + config.stage_bytes + 16 + 128 > MAX_SMEM_BYTES
    if config.num_stages < 16:
        with pytest.raises(ValueError, match=f"num_stages must be at most {config.num_stages} in"):
            MegaMoeConfig(**shape, num_stages=config.num_stages + 1)
    assert with_most_stages(**shape, limit=3).num_stages == 3


@pytest.mark.parametrize("num_math_warpgroups", REGISTERS)
def test_registers_fit_an_sm(num_math_warpgroups):
    config = MegaMoeConfig(**SHAPE | {"num_math_warpgroups": num_math_warpgroups, "token_tiles": (MAX_TOKEN_TILE[num_math_warpgroups],)})
    assert config.math_registers % 8 == config.aux_registers % 8 == 0
    assert 128 * (num_math_warpgroups * config.math_registers + config.aux_registers) <= 65536
    assert config.num_threads == 128 * (num_math_warpgroups + 1)


def test_loads_ahead_while_registers_last():
    def config(warpgroups, *tiles):
        return MegaMoeConfig(**SHAPE | {"num_math_warpgroups": warpgroups, "token_tiles": tiles})

    assert [config(2, tile).loads_ahead for tile in (8, 128, 136)] == [True, True, False]
    assert not config(3, 8).loads_ahead
    assert [config(w, 8).max_double_buffered for w in (2, 3, 4)] == [176, 96, 48]
    in_natural_order = MegaMoeConfig(**SHAPE | {"num_math_warpgroups": 4, "token_tiles": (48,), "hidden": 96})
    assert in_natural_order.max_double_buffered == 40


def test_rows_are_folded_one_by_one_where_there_are_few():
    assert [MegaMoeConfig(**SHAPE | {"token_tiles": (tile,)}).fold_run for tile in (8, 48, 56, 104)] == [1, 1, 2, 2]


def test_parts_of_a_tile():
    parts = MegaMoeConfig(**SHAPE | {"token_tiles": (16, 64, 72), "cluster_blocks": 2}).token_parts
    assert [parts(tokens) for tokens in (16, 64, 72)] == [[8, 8], [32, 32], [40, 32]]
    assert MegaMoeConfig(**SHAPE).token_parts(72) == [72]


def test_table_capacity():
    assert [table_capacity(n) for n in (1, 2, 3, 96, 128, 129)] == [1, 2, 4, 128, 128, 256]


def test_few_tokens_take_small_tiles_and_many_large_ones():
    chosen = all_mega(V4_PRO, 8192)
    assert list(chosen) == [1 << i for i in range(14)]
    assert [chosen[tokens].max_token_tile for tokens in (1, 64, 512, 1024, 2048, 8192)] == [32, 48, 48, 88, 160, 176]
    assert [chosen[tokens].num_math_warpgroups for tokens in (1, 64)] == [3, 4], "two rounds of shorter tasks, where there are two"
    assert [chosen[tokens].cluster_blocks for tokens in (1, 64, 1024, 8192)] == [1, 1, 1, 2]
    for config in chosen.values():
        assert (config.max_groups, config.hidden, config.intermediate, config.has_down_bias) == (128, 7168, 3072, False)
    assert choose_mega(V4_PRO, 1000) == chosen[1024]
    assert all(config.has_down_bias for config in all_mega(replace(V4_PRO, has_down_bias=True), 64).values())


def test_an_odd_number_of_sms_makes_no_clusters():
    odd = replace(V4_PRO, num_sms=131)
    assert choose_mega(odd, 8192) == replace(choose_mega(V4_PRO, 8192), cluster_blocks=1)


@pytest.mark.parametrize("tokens", (1, 64, 1024, 8192))
def test_no_candidate_is_predicted_to_be_faster(tokens):
    best = predict_us(choose_mega(V4_PRO, tokens), V4_PRO, tokens)
    for candidate in CANDIDATES:
        other = with_most_stages(**candidate._asdict(), max_groups=128, has_down_bias=False, hidden=7168, intermediate=3072)
        assert predict_us(other, V4_PRO, tokens) >= best


def test_predictions_are_near_what_the_weights_take():
    """96 experts of 8064 storage units, 35.1 MB each, are 793 us of HBM; 8192 tokens per rank multiply for 5 ms."""
    assert 792 < predict_us(choose_mega(V4_PRO, 64), V4_PRO, 64) < 880
    assert 4500 < predict_us(choose_mega(V4_PRO, 8192), V4_PRO, 8192) < 6000
    assert predict_us(choose_mega(V4_PRO, 1), V4_PRO, 1) < 60, "one expert in sixteen is hit"


@pytest.mark.parametrize("model", shipped.MODELS)
def test_shipped_kernels_are_those_that_layers_load(model):
    kernels = shipped.mega_moe_kernels(model)
    found = {config for op, config, _, entry in kernels if (op, entry) == ("mega_moe", "mega_moe")}
    hidden, intermediate, num_experts, num_topk = shipped.MODELS[model]
    for num_ranks in shipped.MEGA_RANKS.get(model, (4,)):
        shape = MoEShape(hidden=hidden, intermediate=intermediate, num_experts=num_experts, num_topk=num_topk, num_ranks=num_ranks,
                         has_down_bias=model == "gpt-oss-120b", scatter=True, num_sms=132)
        cfg = MoEConfig(hidden=hidden, intermediate=intermediate, num_experts=num_experts, num_topk=num_topk, max_tokens_per_rank=8192)
        assert found >= set(all_mega(shape, 8192, plan_dims(cfg, num_ranks).pool_rows).values())
    texts = [make_source() for _, _, make_source, _ in kernels]
    assert len(set(texts)) == len(texts) and len(texts) <= 16
    for (_, config, _, _), text in zip(kernels, texts):
        assert f"kBytes == {config.smem_bytes}," in text and f"kHidden = {hidden}u;" in text


def test_a_small_pool_wants_a_small_tile():
    assert choose_mega(V4_PRO, 8192, pool_rows=128).max_token_tile <= 128
    assert choose_mega(V4_PRO, 8192, pool_rows=64).max_token_tile <= 64
    message = "mega_moe: pool_rows must be at least 32, one token tile, got 16; raise arena_bytes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choose_mega(V4_PRO, 8192, pool_rows=16)
