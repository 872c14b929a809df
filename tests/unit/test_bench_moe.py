"""launch/bench_moe.py without a GPU: draws, floors by hand, records and tables, the plain-torch peer, and a whole run on two CPU ranks."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import bench_moe  # noqa: E402
import bench_moe_run  # noqa: E402
from bench_moe_cases import MODELS, MOE_FLOOR_FORMULA, ROUTINGS, draw_routing, expert_counts, layer_work, model_config  # noqa: E402
from bench_moe_peers import TorchPeer  # noqa: E402
from bench_moe_report import About, Record, make_record, markdown_table, terminal_table  # noqa: E402

from megamoe import MoEConfig  # noqa: E402
from megamoe.errors import EngineUnavailableError  # noqa: E402
from megamoe.reference.oracle import moe_oracle  # noqa: E402
from megamoe.testing.compare import error_report  # noqa: E402
from megamoe.testing.ranks import RankPool  # noqa: E402
from megamoe.testing.report import append_records, page_markers, read_records  # noqa: E402

BEGIN, END = page_markers("bench_moe.py")
TINY = model_config("tiny", 64)
WORK = layer_work(TINY, torch.ones(2, 8, dtype=torch.int64), num_tokens=4)
ABOUT = About(model="v4-pro", num_ranks=4, engine="unfused", backend="torch", routing="uniform", graph=True, act_group=32, max_tokens=8192,
              arena_bytes=1_500_000_000, num_calls=5, includes="all", gpu="NVIDIA H200", torch="2.11", commit="abc1234",
              command="torchrun launch/bench_moe.py", date="2026-11-21")


def record(us: float, tokens: int = 8, **changes) -> Record:
    about = replace(ABOUT, **changes)
    return make_record(about, tokens, [us - 20, us, us + 20], 33.0, [WORK] * 3, (2e-3, 4e-3))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_draws_are_distinct_experts_and_repeat(routing):
    cfg = model_config("v4-pro", 512)
    idx, weights = draw_routing(cfg, routing, 512, seed=3, rank=1, num_ranks=4)
    assert idx.shape == weights.shape == (512, 6) and idx.dtype == torch.int64 and weights.dtype == torch.float32
    assert (idx.sort(1).values.diff(dim=1) > 0).all() and idx.min() >= 0 and idx.max() < 384
    torch.testing.assert_close(weights.sum(1), torch.ones(512))
    assert weights.min() > 0 and weights.std() > 0.05
    again, other_rank, other_seed = (draw_routing(cfg, routing, 512, seed, rank, 4)[0] for seed, rank in ((3, 1), (3, 2), (4, 1)))
    assert torch.equal(idx, again) and not torch.equal(idx, other_rank) and not torch.equal(idx, other_seed)


def test_distributions():
    cfg = model_config("v4-pro", 8192)
    counts = {routing: expert_counts(draw_routing(cfg, routing, 4096, 0, 0, 4)[0], 384).sort(descending=True).values
              for routing in ROUTINGS}
    assert all(found.sum() == 4096 * 6 for found in counts.values())
    assert 30 < counts["uniform"].min() and counts["uniform"].max() < 100, "64 expected, standard deviation 8"
    zipf = counts["zipf"].float() / 4096
    assert 0.5 < zipf[0] < 0.8, "1 - (1 - p)^6 with p = 1 / H(384) = 0.153, and more without replacement"
    assert 1.4 < zipf[0] / zipf[1] < 2 and 5 < zipf[9] / zipf[99] < 14
    assert (counts["one-rank"][:96] > 150).all() and counts["one-rank"][96:].sum() == 0
    one_rank = draw_routing(cfg, "one-rank", 4096, 0, 0, 4)[0]
    assert one_rank.max() < 96
    hot = [expert_counts(draw_routing(cfg, "zipf", 256, 0, rank, 4)[0], 384).argmax().item() for rank in range(4)]
    assert len(set(hot)) == 1, "ranks agree on which expert is popular"
    assert len({expert_counts(draw_routing(cfg, "zipf", 256, seed, 0, 4)[0], 384).argmax().item() for seed in range(8)}) > 4


def test_one_rank_with_fewer_experts_than_slots():
    cfg = model_config("mixtral-8x7b", 16)
    idx, _ = draw_routing(cfg, "one-rank", 16, 0, 0, 8)
    assert idx[:, 0].eq(0).all() and idx[:, 1].eq(-1).all()
    assert expert_counts(idx, 8).tolist() == [16] + [0] * 7


def test_work_and_floor_by_hand():
    """Two ranks of two experts; rank 0 sends 3 rows to itself and 5 to rank 1, rank 1 sends 2 rows to rank 0."""
    cfg = MoEConfig(hidden=64, intermediate=32, num_experts=4, num_topk=2, max_tokens_per_rank=8)
    work = layer_work(cfg, torch.tensor([[1, 2, 0, 5], [2, 0, 0, 0]]), num_tokens=7)
    expert_bytes = 3 * 64 * 32 * 17 // 32
    assert work.mean_flop == 6 * 64 * 32 * (5 + 5) / 2
    assert work.mean_weight_bytes == (2 + 1) * expert_bytes / 2, "expert 2 got no rows"
    x_codes, a_codes, bf16 = 66, 33, 128
    assert work.nvlink_bytes == max(2 * x_codes + 5 * bf16, 5 * x_codes + 2 * bf16) == 772
    hbm = 2 * expert_bytes + 7 * (2 * bf16 + x_codes) + 5 * (x_codes + 2 * a_codes + bf16) + (3 + 5) * bf16
    assert hbm / 4.2e12 > 772 / 450e9 and work.floor_us == pytest.approx(hbm / 4.2e6)


def test_floor_is_the_largest_of_three():
    v4_pro = model_config("v4-pro", 8192)
    even = torch.full((4, 384), 128)
    assert layer_work(v4_pro, even, 8192).floor_us == pytest.approx(6 * 7168 * 3072 * 49152 / 1.5e9), "prefill is bound by the FLOPs"
    thin = MoEConfig(hidden=4096, intermediate=32, num_experts=2, num_topk=1, max_tokens_per_rank=1024)
    swapped = torch.tensor([[0, 1024], [1024, 0]])
    assert layer_work(thin, swapped, 1024).floor_us == pytest.approx(1024 * (4096 + 128 + 8192) / 450e3), "by NVLink"
    nothing = layer_work(v4_pro, torch.zeros(4, 384, dtype=torch.int64), 0)
    assert (nothing.floor_us, nothing.nvlink_bytes, nothing.mean_flop) == (0, 0, 0)


@pytest.mark.parametrize("model", MODELS)
def test_models_are_legal_layers(model):
    cfg = model_config(model, 8)
    assert cfg.precision == "fp8xfp4" and (cfg.hidden, cfg.intermediate, cfg.num_experts, cfg.num_topk) == MODELS[model]
    assert (cfg.swiglu_limit, cfg.swiglu_alpha) == {"v4-pro": (10.0, None), "v4-flash": (10.0, None),
                                                    "gpt-oss-120b": (7.0, 1.702)}.get(model, (None, None))


def test_experts_do_not_depend_on_who_makes_them():
    every, some = (bench_moe_run.random_experts(TINY, experts, True, "cpu") for experts in (range(8), [6, 1]))
    for name in ("gate_up", "down"):
        all_weights, weights = getattr(every, name), getattr(some, name)
        assert torch.equal(all_weights.codes[[6, 1]], weights.codes) and torch.equal(all_weights.scales[[6, 1]], weights.scales)
        assert not torch.equal(weights.codes[0], weights.codes[1])
        assert weights.scales.int().max() - weights.scales.int().min() == 4, "a few exponents apart"
        assert weights.codes.unique().numel() == 256
        out_rms = (torch.randn(64, weights.shape[2]) @ weights[0].dequantize().T).square().mean().sqrt()
        assert 0.5 < out_rms < 4, "values of order one"
    assert torch.equal(every.gate_up_bias[[6, 1]], some.gate_up_bias) and torch.equal(every.down_bias[[6, 1]], some.down_bias)
    assert bench_moe_run.random_experts(TINY, [0], False, "cpu").down_bias is None


def _peer_error(rank: int, num_ranks: int, has_bias: bool) -> tuple[float, float]:
    cfg = replace(TINY, swiglu_limit=3.0)
    draw = bench_moe_run.make_draw(cfg, "uniform", 0 if rank == 1 and not has_bias else 20, 0, torch.device("cpu"))
    draw.topk_idx[:2, 1] = -1
    y = TorchPeer(cfg, bench_moe_run.local_experts(cfg, has_bias, "cpu"))(draw.x, draw.topk_idx, draw.topk_weights)
    w = bench_moe_run.random_experts(cfg, range(8), has_bias, "cpu")
    oracle = moe_oracle(draw.x, draw.topk_idx, draw.topk_weights, w.gate_up.dequantize(), w.down.dequantize(), gate_up_bias=w.gate_up_bias,
                        down_bias=w.down_bias, precision="bf16", act_group=32, swiglu_limit=3.0, quantized=False)
    report = error_report(y, oracle)
    return report.median, report.max


@pytest.fixture(scope="module")
def pool():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_peer_computes_the_layer(pool, has_bias):
    for median, largest in pool.run(_peer_error, has_bias):
        assert median < 8e-3 and largest < 0.02, "BF16 rounding of rows, weights, intermediate and result; a lost slot is 0.4"


def _checked(rank: int, num_ranks: int, broken_rank: int) -> tuple[float, float] | str:
    from megamoe import MegaMoE

    draw = bench_moe_run.make_draw(TINY, "one-rank", 30, 0, torch.device("cpu"))
    assert draw.counts.sum(1).tolist() == [60, 60] and draw.counts[:, 4:].sum() == 0
    weights = bench_moe_run.local_experts(TINY, True, "cpu")
    with torch.no_grad(), MegaMoE(TINY, device="cpu", engine="reference") as layer:
        layer.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
        y = bench_moe_run.layer_call(layer, draw, with_graph=False).prepare(draw)()
    y[-1] *= 1 + 0.1 * (rank == broken_rank)
    try:
        report = bench_moe_run.check_output(TINY, True, 128, draw, y)
    except AssertionError as wrong:
        return str(wrong)
    return report.median, report.max


def test_check_accepts_the_layer_and_refuses_one_wrong_token_on_every_rank(pool):
    right = pool.run(_checked, -1)
    assert right[0] == right[1] and 0 < right[0][0] < 6e-3 and right[0][1] < 0.08
    wrong = pool.run(_checked, 1)
    assert wrong[0] == wrong[1] and "worst token 15" in wrong[0] and wrong[0].endswith("T=30, 16 tokens of 2 ranks")


def _slowest(rank: int, num_ranks: int) -> list[list[float]]:
    return bench_moe_run.max_over_ranks([[1.0 + rank, 5.0], [3.0, 2.0 - rank]], torch.device("cpu")).tolist()


def test_the_slowest_rank_counts(pool):
    assert pool.run(_slowest) == [[[2.0, 5.0], [3.0, 2.0]]] * 2


def test_graph_needs_a_stream_ordered_engine():
    layer = SimpleNamespace(engine=SimpleNamespace(name="reference", is_synchronous=True), device=torch.device("cuda"))
    message = "bench_moe: engine of --graph must be stream-ordered on cuda, got reference on cuda; leave out --graph"
    with pytest.raises(EngineUnavailableError, match=re.escape(message)):
        bench_moe_run.layer_call(layer, None, with_graph=True)
    assert isinstance(bench_moe_run.layer_call(layer, None, with_graph=False), bench_moe_run.EagerCall)


def test_record_by_hand(tmp_path):
    works = [replace(WORK, mean_flop=2e9, mean_weight_bytes=1e9, nvlink_bytes=10, floor_us=50.0),
             replace(WORK, mean_flop=4e9, mean_weight_bytes=3e9, nvlink_bytes=20, floor_us=70.0)]
    found = make_record(ABOUT, 8, [100.0, 200.0], 33.0, works, None)
    assert (found.us, found.p10_us, found.p90_us, found.host_us, found.floor_us, found.percent_of_floor) == (150, 100, 200, 33, 60, 40)
    assert (found.tflops, found.weights_gbps, found.nvlink_bytes) == (pytest.approx(20), pytest.approx(2e9 / 150e3), 15)
    assert found.num_routings == 2 and found.median_error is None
    path = tmp_path / "perf" / "moe.jsonl"
    append_records(path, [found])
    append_records(path, [record(700.0)])
    assert read_records([path], Record) == [found, record(700.0)]
    lines = terminal_table(read_records([path], Record)).splitlines()
    assert len(lines) == 4 and "unfused, graph" in lines[2] and "100.0-200.0" in lines[2] and "2.0e-03 / 4.0e-03" in lines[3]


def test_markdown_from_canned_records():
    peer = {"engine": "torch bf16", "graph": False}
    records = [record(650.0), record(550.0), record(1200.0, 32), record(900.0, model="v3"), record(800.0, **peer),
               record(70.0, routing="zipf"), record(470.0, engine="fused")]
    lines = markdown_table(records).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1, "every row has every column"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert [row[3] for row in rows if row[4:6] == ["unfused", "not measured"]] == ["1", "128", "512", "2048", "8192"]
    fused = {model: [row[3] for row in rows if row[0] == model and row[4:6] == ["fused", "not measured"]] for model in MODELS}
    assert fused["v4-pro"] == ["1", "32", "64", "128", "256", "512", "1024", "2048", "4096", "8192"]
    assert (fused["v4-flash"], fused["qwen3-30b"]) == (["1", "32", "64", "128", "8192"], [])
    assert [row[6:9] for row in rows if row[0] == "v3" and row[3] == "256"] == [["500", "", ""]]
    measured = [row[:9] for row in rows if row[5] != "not measured"]
    assert measured == [
        ["v4-pro", "4", "uniform", "8", "fused, graph", "470", "480", "yes", "757"],
        ["v4-pro", "4", "uniform", "8", "torch bf16", "800", "", "", ""],
        ["v4-pro", "4", "uniform", "8", "unfused, graph", "550", "600", "yes", "757"],
        ["v4-pro", "4", "uniform", "32", "unfused, graph", "1200", "1000", "no", "1433"],
        ["v4-pro", "4", "zipf", "8", "unfused, graph", "70", "", "", ""],
        ["v3", "4", "uniform", "8", "unfused, graph", "900", "", "", ""]]
    unfused, = (row for row in rows if row[:6] == ["v4-pro", "4", "uniform", "8", "unfused, graph", "550"])
    assert unfused[9:] == ["530-570", "33", f"{WORK.floor_us:.0f}", f"{WORK.floor_us / 5.5:.0f} %", "0", "0", "0.0", "1.50",
                           "2.0e-03 / 4.0e-03", "abc1234"]
    assert lines[-2:] == ["", "- NVIDIA H200, torch 2.11, commit abc1234, 2026-11-21: `torchrun launch/bench_moe.py`"]


def test_markdown_rewrites_only_between_the_markers(tmp_path, monkeypatch):
    page, data = tmp_path / "PERFORMANCE.md", tmp_path / "a.jsonl"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    append_records(data, [record(650.0)])
    monkeypatch.setattr(bench_moe, "PAGE", page)
    for _ in range(2):
        assert bench_moe.main(["--markdown", str(data)]) == 0
        assert page.read_text() == f"before\n{BEGIN}\n{markdown_table([record(650.0)])}{END}\nafter\n"


def test_the_page_in_docs_has_the_markers_and_the_formula():
    page = bench_moe.PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert MOE_FLOOR_FORMULA in " ".join(page.split())


@pytest.mark.parametrize("argv, message", [
    (["--tokens", "8,x"], "bench_moe: --tokens must be numbers joined by commas, got '8,x'; e.g. 1,8,32"),
    (["--tokens", "8", "--max-tokens", "4"], "bench_moe: --max-tokens must be at least 8, got 4; raise it or leave it out"),
    (["--engine", "fast"], "bench_moe: --engine must be of reference, unfused, fused, joined by commas, got 'fast'; e.g. fused,unfused"),
    (["--engine", "fused,"], "bench_moe: --engine must be of reference, unfused, fused, joined by commas, got 'fused,'"),
    (["--routings", "0"], "bench_moe: --routings and --calls must be positive, got 0 and 5; pass at least 1"),
    (["--tokens", "8"], "bench_moe: ranks must be started by torchrun, got a plain process; see --help for the command")])
def test_bad_arguments(argv, message, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        bench_moe.parse_args(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_engines_by_name(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert bench_moe.parse_args([]).engine == ["unfused"]
    assert bench_moe.parse_args(["--engine", "fused,unfused,fused"]).engine == ["fused", "unfused"]


def test_a_wrong_engine_is_named(monkeypatch):
    layer = SimpleNamespace(cfg=TINY, engine=SimpleNamespace(act_group=32))
    fused = replace(ABOUT, engine="fused")

    def check_output(cfg, has_bias, act_group, draw, y):
        assert (cfg, has_bias, act_group, draw) == (TINY, False, 32, "draw")
        assert y < 5, "too large"
        return SimpleNamespace(median=y, max=2 * y)

    monkeypatch.setattr(bench_moe, "check_output", check_output)
    args, layers = SimpleNamespace(model="v4-pro"), {ABOUT: layer, fused: layer}
    assert bench_moe.check_layers(args, layers, "draw", {ABOUT: 1, fused: 4}) == {ABOUT: (1, 2), fused: (4, 8)}
    with pytest.raises(AssertionError, match="^fused: too large"):
        bench_moe.check_layers(args, layers, "draw", {ABOUT: 1, fused: 7})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU, where ranks are processes on the CPU")
def test_a_whole_run_on_two_ranks(tmp_path):
    out = tmp_path / "moe.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
               "launch/bench_moe.py", "--model", "tiny", "--engine", "reference", "--tokens", "0,3", "--routings", "2", "--calls", "2",
               "--check", "--commit", "abc1234", "--json", str(out)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEGAMOE_SHM_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["tokens"], line["engine"]) for line in lines] == [(t, e) for t in (0, 3) for e in ("reference", "torch bf16")]
    assert all(set(line) == {field.name for field in fields(Record)} for line in lines)
    ours = lines[2]
    assert (ours["model"], ours["num_ranks"], ours["backend"], ours["act_group"], ours["max_tokens"]) == ("tiny", 2, "shm", 128, 3)
    assert (ours["num_routings"], ours["num_calls"], ours["graph"], ours["commit"]) == (2, 2, False, "abc1234")
    assert ours["us"] > 0 and ours["arena_bytes"] > 0 and 0 < ours["median_error"] < 6e-3 and lines[3]["median_error"] is None
    counts = [torch.stack([expert_counts(draw_routing(TINY, "uniform", 3, seed, rank, 2)[0], 8) for rank in range(2)]) for seed in range(2)]
    floors = [layer_work(TINY, found, 3).floor_us for found in counts]
    assert ours["floor_us"] == lines[3]["floor_us"] == pytest.approx(sum(floors) / 2) and lines[0]["floor_us"] == 0
    assert ours["command"].startswith("torchrun --standalone --nproc-per-node 2 launch/bench_moe.py --model tiny")
    assert MOE_FLOOR_FORMULA in done.stdout and "engine=reference" in done.stdout and done.stdout.count("torch bf16") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe.jsonl"]
