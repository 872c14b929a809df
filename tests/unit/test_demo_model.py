"""The shipped demo model and the pure parts of the demo: its text, its shards, its verdict, its tables."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the demo needs the transformers extra")

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

from demo_run import load_model, shard_batches  # noqa: E402
from demo_report import Comparison, Score, comparison_table, verdict, verdict_lines  # noqa: E402
from train_demo_model import DEFAULT_OUT, SEQUENCE_LENGTH, held_out_loss, learning_rate, load_text, sample_batch, split_text  # noqa: E402

from megamoe import quantize_fp4  # noqa: E402
from megamoe.integrations.transformers import canonical_experts, stock_experts  # noqa: E402
from megamoe.testing.compare import MAX_RELATIVE, MEDIAN_RELATIVE  # noqa: E402
from megamoe.testing.report import WIDTH, bar_chart, table  # noqa: E402

MAX_SHIPPED_BYTES = 4 * 2**20


def test_shipped_state_is_small_and_its_loss_is_the_one_stated():
    stated = float(re.search(r"\*\*([\d.]+) nats/byte\*\*", (DEFAULT_OUT / "README.md").read_text()).group(1))
    assert (DEFAULT_OUT / "model.safetensors").stat().st_size <= MAX_SHIPPED_BYTES
    _, held_out = split_text(load_text())
    loss = held_out_loss(load_model("fp32", torch.device("cpu")), held_out)
    # The topics differ a little between Python versions. An untrained model has 5.5.
    assert abs(loss - stated) < 0.1


def test_text_is_split_without_overlap_or_gap():
    text = load_text()
    train, held_out = split_text(text)
    assert len(held_out) == len(text) // 10
    assert bytes(torch.cat((train, held_out)).tolist()) == text


def test_text_comes_from_the_file_given(tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff")
    assert load_text(tmp_path / "text") == b"abc\xff"


def test_training_batches_are_windows_of_the_text():
    tokens = torch.arange(3 * SEQUENCE_LENGTH)
    batch = sample_batch(tokens, 5, torch.Generator().manual_seed(3))
    assert batch.shape == (5, SEQUENCE_LENGTH + 1)
    assert torch.equal(batch - batch[:, :1], torch.arange(SEQUENCE_LENGTH + 1).expand(5, -1))


def test_learning_rate_rises_then_falls_to_a_twentieth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(101)]
    assert rates[0] == 0.1 and rates[10] == 1.0 and abs(rates[100] - 0.05) < 1e-12
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_shards_cover_the_text_once_with_equally_many_batches(num_ranks):
    text = torch.arange(37 * SEQUENCE_LENGTH + 1)
    shards = [shard_batches(text, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(shard) for shard in shards}) == 1
    windows = torch.cat([batch for shard in shards for batch in shard])
    assert torch.equal(windows[:, :-1].flatten().sort().values, text[:-1])
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)


def test_text_too_short_for_the_ranks_is_refused():
    message = "demo: held-out text must be at least 1025 bytes, got 1024; pass a longer --text or more --tokens"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shard_batches(torch.arange(4 * SEQUENCE_LENGTH), 0, 4)
    assert [len(batch) for batch in shard_batches(torch.arange(4 * SEQUENCE_LENGTH + 1), 3, 4)] == [1]


def test_fp4_original_carries_weights_that_quantise_to_themselves():
    fp4, bf16 = (stock_experts(load_model(precision, torch.device("cpu")))[0] for precision in ("fp8xfp4", "bf16"))
    rounded, exact = (canonical_experts(experts, 0, experts.num_experts) for experts in (fp4, bf16))
    assert torch.equal(quantize_fp4(exact.gate_up).dequantize(torch.bfloat16), rounded.gate_up)
    assert torch.equal(quantize_fp4(rounded.down).dequantize(torch.bfloat16), rounded.down)
    assert not torch.equal(rounded.down, exact.down)


def good_comparisons() -> dict[str, Comparison]:
    def comparison(precision: str, loss: float, num_mismatches: int) -> Comparison:
        predictions = torch.zeros(4, dtype=torch.int64)
        return Comparison(
            precision=precision, num_ranks=2, original=Score(1.0, 1000.0, predictions), replaced=Score(loss, 500.0, predictions),
            num_tokens=1000, num_mismatches=num_mismatches, layer_errors=[(1e-3, 2e-3), (1e-3, 2e-3)], engine="reference", backend="shm",
            rows_moved=12, bytes_moved=3456, arena_bytes=7890)

    return {"fp32": comparison("fp32", 1.0, 0), "bf16": comparison("bf16", 1.0005, 10), "fp8xfp4": comparison("fp8xfp4", 0.995, 40)}


def with_fault(precision: str, **changes) -> dict[str, Comparison]:
    comparisons = good_comparisons()
    comparisons[precision] = dataclasses.replace(comparisons[precision], **changes)
    return comparisons


def replaced_loss(loss: float) -> dict[str, Score]:
    return {"replaced": Score(loss, 500.0, torch.zeros(4, dtype=torch.int64))}


def test_verdict_passes_a_good_run():
    checks = verdict(good_comparisons(), num_stock_mismatches=5)
    assert all(check.is_passed for check in checks)
    assert verdict_lines(checks) == ["PASS: 16 of 16 checks passed"]


@pytest.mark.parametrize(("comparisons", "line"), [
    (with_fault("fp32", num_mismatches=1), "FAILED  fp32: next tokens that differ: 1, at most 0"),
    (with_fault("bf16", num_mismatches=11),
     "FAILED  bf16: next tokens that differ (limit: 2x stock eager against grouped_mm): 11, at most 10"),
    (with_fault("bf16", **replaced_loss(0.997)), "FAILED  bf16: held-out loss difference (nats/byte): 0.003, at most 0.002"),
    (with_fault("fp8xfp4", **replaced_loss(1.02)), "FAILED  fp8xfp4: relative held-out loss difference: 0.02, at most 0.01"),
    (with_fault("fp8xfp4", **replaced_loss(float("nan"))), "FAILED  fp8xfp4: relative held-out loss difference: nan, at most 0.01"),
    (with_fault("fp8xfp4", layer_errors=[(1e-3, 2e-3), (2 * MEDIAN_RELATIVE, 2e-3)]),
     "FAILED  fp8xfp4: layer 1, median error per token: 0.012, at most 0.006"),
    (with_fault("bf16", layer_errors=[(1e-3, 5 * MAX_RELATIVE), (1e-3, 2e-3)]),
     "FAILED  bf16: layer 0, largest error of a token: 0.4, at most 0.08"),
])
def test_verdict_names_the_failed_check_with_both_numbers(comparisons, line):
    assert verdict_lines(verdict(comparisons, num_stock_mismatches=5)) == [line, "FAIL: 15 of 16 checks passed"]


def test_comparison_table_shows_every_number():
    lines = comparison_table(good_comparisons()).splitlines()
    assert max(map(len, lines)) <= WIDTH
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in lines[2:])
    rows = {name: cells.split() for name, cells in rows.items()}
    assert rows["held-out nats/byte, replaced"] == ["1.00000", "1.00050", "0.99500"]
    assert rows["layer 1 error, median / max"] == ["1.0e-03", "/", "2.0e-03"] * 3
    assert rows["bytes moved between ranks"] == ["3,456"] * 3


def test_table_aligns_names_left_and_numbers_right():
    assert table(["what", "n"], [["a", "1"], ["long name", "1234"]]) == (
        "what          n\n"
        "---------------\n"
        "a             1\n"
        "long name  1234")


def test_bars_share_one_scale_and_fit_the_terminal():
    lines = bar_chart(["e 0", "e 1"], {"layer 0": [10, 0], "layer 1": [5, 20]}).splitlines()
    assert max(map(len, lines)) <= WIDTH
    cells = [[len(bar) for bar in re.findall(r"#+", line)] for line in lines[1:]]
    longest = cells[1][0]
    assert cells == [[round(longest / 2), round(longest / 4)], [longest]]
    assert re.findall(r"\d+$", lines[1]) == ["5"] and re.findall(r"\d+", lines[2]) == ["1", "0", "20"]
