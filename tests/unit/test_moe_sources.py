"""Threads, grids and text of the kernels that move tokens between ranks, without a GPU."""

import re
from dataclasses import replace

import pytest

from megamoe.comm.protocol import ArenaDims
from megamoe.kernels import moe_sources


def dims(hidden: int) -> ArenaDims:
    return ArenaDims(num_ranks=2, max_tokens=64, num_topk=4, num_experts=8, hidden=hidden, intermediate=64, precision="fp8xfp4",
                     pool_rows=512)


@pytest.mark.parametrize("hidden, threads, blocks", (
    (32, 32, 28), (1024, 32, 28), (2048, 64, 14), (2880, 96, 9), (4096, 128, 7), (7168, 224, 4), (8192, 256, 3), (16384, 512, 1)))
def test_a_block_of_moe_stage_holds_a_token(hidden, threads, blocks):
    assert moe_sources.threads("moe_stage", dims(hidden)) == threads
    assert moe_sources.blocks_per_sm("moe_stage", dims(hidden)) == blocks
    text = moe_sources.source("moe_stage", dims(hidden))
    assert f"kStageThreads = {threads}u;" in text and f"__launch_bounds__({threads}, {blocks}) moe_stage(" in text


@pytest.mark.parametrize("hidden", range(32, 32768, 1504))
def test_any_hidden_has_a_legal_block(hidden):
    threads, blocks = moe_sources.threads("moe_stage", dims(hidden)), moe_sources.blocks_per_sm("moe_stage", dims(hidden))
    assert threads % 32 == 0 and threads <= 1024 and 4 * threads >= hidden // 8 > 4 * (threads - 32)
    assert 1 <= blocks <= 32 and threads * blocks <= 2048


def test_only_moe_stage_asks_for_blocks_on_an_sm():
    for op in set(moe_sources.OPS) - {"moe_stage"}:
        text = moe_sources.source(op, dims(96))
        assert re.search(rf"__launch_bounds__\({moe_sources.threads(op, dims(96))}\) {op}\(", text)


@pytest.mark.parametrize("hidden, intermediate, is_one_pass, expected", (
    (256, 128, True, "true"), (256, 128, False, "false"), (96, 128, True, "false"), (256, 96, True, "false"), (7168, 3072, True, "true")))
def test_tokens_are_staged_in_thread_order_for_mega_moe_alone(hidden, intermediate, is_one_pass, expected):
    text = moe_sources.source("moe_stage", replace(dims(hidden), intermediate=intermediate), is_one_pass)
    assert f"kThreadOrder = {expected};" in text


def test_one_pass_holds_all_entries():
    assert moe_sources.num_passes(dims(96)) == 1
    skewed = replace(dims(96), pool_rows=64)
    text = moe_sources.source("moe_route", skewed)
    assert "kNumPasses = 8u;" in text and "kPoolRows = 64u;" in text
    text = moe_sources.source("moe_route", skewed, is_one_pass=True)
    assert "kNumPasses = 1u;" in text and "kPoolRows = 512u;" in text, "offsets are clipped at nothing that a call can reach"
    assert set(moe_sources.ROUTING_OPS) == set(moe_sources.OPS) - {"moe_pull", "moe_combine"}
