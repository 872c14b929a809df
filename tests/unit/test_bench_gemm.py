"""launch/bench_gemm.py without a GPU: cases and configs from the command line, operands and their check, records and tables."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))

import bench_gemm  # noqa: E402
import bench_gemm_run  # noqa: E402
import tune_gemm  # noqa: E402
from bench_gemm_cases import DEFAULT_CASES, OPS, Case, Goal, config_text, parse_config, select  # noqa: E402
from bench_gemm_report import Record, make_record, markdown_table, terminal_table  # noqa: E402

from megamoe.formats import layout_sm90, quantize_fp4  # noqa: E402
from megamoe.kernels.tuning.sm90 import choose_fp4_gemm  # noqa: E402
from megamoe.reference import grouped_gemm  # noqa: E402
from megamoe.testing import bench  # noqa: E402
from megamoe.testing.bench import Timing  # noqa: E402
from megamoe.testing.report import append_records, page_markers, read_records  # noqa: E402

BEGIN, END = page_markers("bench_gemm.py")
MASKED = Case("masked", 32, 20, 6144, 7168, "uniform", Goal("us", 205, 195), 356)
ABOUT = {"gpu": "NVIDIA H200", "torch": "2.11.0", "commit": "abc1234", "command": "python launch/bench_gemm.py", "date": "2026-11-21"}


def record(case=MASKED, provider="megamoe", us=200.0, **about):
    counts = case.draw()
    return make_record(case, provider, counts, case.work(counts), Timing(us, us - 1, us + 2, 30), ABOUT | about, config="4:16,48:8")


def test_default_cases_are_the_required_table():
    assert {case.op for case in DEFAULT_CASES} == set(OPS)
    assert len({case.name for case in DEFAULT_CASES}) == len(DEFAULT_CASES), "records are found by name"
    goals = {case.name: case.goal for case in DEFAULT_CASES if case.goal}
    assert len(goals) == 14
    assert goals["masked 32 x ~20 (uniform), n=6144 k=7168"] == Goal("us", 205, 195)
    assert goals["masked 32 x ~96 (uniform), n=7168 k=3072"].required == 2950
    assert goals["contiguous 8 x ~4096 (routing), n=7168 k=2048"] == Goal("tflops", 1080, 1300)
    assert goals["dense 4096x7168x16384"] == Goal("tflops", 1100, 1300)


def test_goal_directions():
    assert [Goal("us", 205, 195).reached(us) for us in (195, 195.1, 205, 205.1)] == ["aim", "required", "required", "no"]
    assert [Goal("tflops", 1100, 1300).reached(rate) for rate in (1300, 1299, 1100, 1099)] == ["aim", "required", "required", "no"]


def test_selection():
    assert select(None, None, False) == list(DEFAULT_CASES)
    quick = select(["masked"], None, True)
    assert len(quick) == 8 and all(case.op == "masked" and case.goal for case in quick)
    assert select(None, ["128x4096x7168", "4x7x64x96"], False) == [
        Case("dense", 1, 128, 4096, 7168, "exact"), Case("masked", 4, 7, 64, 96, "uniform")]
    assert select(["contiguous", "swiglu"], ["8x64x128x256"], False) == [
        Case("contiguous", 8, 64, 128, 256, "routing"), Case("swiglu", 8, 64, 128, 256, "routing")]


@pytest.mark.parametrize("argv, message", [
    (["--shapes", "4096"], "shape must be MxNxK or GxMxNxK with n a multiple of 64 and k of 32, got '4096'; e.g. 32x20x6144x7168"),
    (["--shapes", "8x8x8"], "bench_gemm: shape must be MxNxK or GxMxNxK with n a multiple of 64 and k of 32, got '8x8x8'"),
    (["--shapes", "axbxc"], "bench_gemm: shape must be MxNxK or GxMxNxK with n a multiple of 64 and k of 32, got 'axbxc'"),
    (["--op", "masked", "--shapes", "8x64x32"],
     "bench_gemm: shape 8x64x32 must have four sizes for --op masked, got three; put the number of groups first"),
    (["--op", "dense", "--shapes", "2x8x64x32"],
     "bench_gemm: shape 2x8x64x32 must have three sizes for --op dense, got four; leave out the number of groups"),
    (["--op", "dense", "--config", "2"], "bench_gemm: config must be WARPGROUPS:TILE,TILE,...[:STAGES], got '2'; e.g. 2:160:5"),
    (["--op", "dense", "--config", "2:160:5:1"], "bench_gemm: config must be WARPGROUPS:TILE,TILE,...[:STAGES], got '2:160:5:1'"),
    (["--op", "dense", "--config", "2:160:99"], "fp4_gemm: num_stages must be at most"),
    (["--op", "dense", "--config", "4:160"], "fp4_gemm: token_tiles must be"),
    (["--op", "sparse"], "invalid choice: 'sparse'")])
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_gemm.parse_args(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_help_documents_the_floor(capsys):
    with pytest.raises(SystemExit):
        bench_gemm.parse_args(["--help"])
    assert bench.FLOOR_FORMULA in capsys.readouterr().out


def test_config_text_round_trip():
    config = parse_config("3:48,64,88:5", "store", 33)
    assert (config.num_math_warpgroups, config.token_tiles, config.num_stages, config.max_groups) == (3, (48, 64, 88), 5, 64)
    assert config_text(config) == "3:48,64,88:5"
    most = parse_config("2:160", "swiglu", 1)
    assert most.num_stages == most.fitting_stages and most.epilogue == "swiglu"


def test_cases_choose_what_tuning_says():
    assert MASKED.choose(132) == choose_fp4_gemm(6144, 7168, 32, 640, 20, "store", 132)
    assert Case("swiglu", 8, 64, 128, 256, "uniform").choose(132).epilogue == "swiglu"


def test_forced_config_reaches_the_launch(monkeypatch):
    """And without one, what tuning says; the rest of the run is faked."""
    used = []
    monkeypatch.setattr(bench_gemm.torch.cuda, "get_device_properties", lambda _: type("P", (), {"multi_processor_count": 132}))
    monkeypatch.setattr(bench_gemm_run, "make_operands", lambda case: bench_gemm_run.Operands(case.draw(), None, [], {}, []))
    monkeypatch.setattr(bench_gemm_run, "make_launches", lambda case, operands, config: (used.append(config), ([lambda: None], {}))[1])
    monkeypatch.setattr(bench_gemm_run, "check_outputs", lambda *_: 1e-3)
    for text in ("2:64,96:4", None):
        found, = bench_gemm.run_case(MASKED, text, 3, False, ABOUT, lambda launch: 100.0)
        assert (found.us, found.error, found.provider, found.config) == (100.0, 1e-3, "megamoe", text or config_text(MASKED.choose(132)))
    assert used == [parse_config("2:64,96:4", "store", 32), MASKED.choose(132)]


@pytest.mark.parametrize("op, num_groups", [("dense", 1), ("contiguous", 3), ("masked", 3), ("swiglu", 3)])
def test_operands_and_check(op, num_groups, monkeypatch):
    """The benchmark's comparison accepts the twin's result and refuses one wrong row at the end of a group."""
    case = Case(op, num_groups, 9, 128, 96, "exact" if op == "dense" else "uniform")
    operands = bench_gemm_run.make_operands(case, device="cpu")
    assert len(operands.weights) >= 2 and operands.x.group == "token" and operands.x.sf.unique().numel() > 1
    w = operands.weights[0]
    assert w.interleaved == (op == "swiglu")
    repacked = layout_sm90.pack(w.unpack(), w.interleaved)
    assert torch.equal(repacked.unpack().dequantize(), w.unpack().dequantize()), "the units are legal weights"

    signature = inspect.signature(bench_gemm_run.fp4_gemm)

    def fake(codes, sf, weight, config, **arguments):
        signature.bind(codes, sf, weight, config, **arguments)
        values = bench_gemm_run.QuantizedTokens(codes, sf, "token").dequantize()
        for group, (begin, count) in enumerate(zip(operands.begins, operands.counts)):
            y = values[begin:begin + count] @ weight.unpack().dequantize()[group].T
            if op == "swiglu":
                a = bench_gemm_run.quantize_tokens(bench_gemm_run.swiglu(*y.chunk(2, dim=1)), 32)
                arguments["a_codes"].view(torch.uint8)[begin:begin + count] = a.codes.view(torch.uint8)
                arguments["a_sf"][begin:begin + count] = a.sf + 4 * is_broken * (torch.arange(count)[:, None] == count - 1)
            else:
                arguments["out"][begin:begin + count] = y
                arguments["out"][begin + count - 1] *= 1 + is_broken

    monkeypatch.setattr(bench_gemm_run, "fp4_gemm", fake)
    launches, outputs = bench_gemm_run.make_launches(case, operands, case.choose(132))
    assert len(launches) == len(operands.weights)
    is_broken = 0
    assert 0 < bench_gemm_run.check_outputs(case, operands, launches, outputs) < 0.05
    is_broken = 1
    with pytest.raises(AssertionError, match=re.escape(f"{case.name}, group 0")):
        bench_gemm_run.check_outputs(case, operands, launches, outputs)


def test_random_weights_are_what_the_layout_says():
    """One group against the twin of the op on the unpacked weights: the values the check computes with are those of the public op."""
    g = torch.Generator().manual_seed(0)
    w = bench_gemm_run.random_weight(2, 64, 128, False, g, "cpu")
    values = w.unpack().dequantize()
    assert values.abs().max() == 12 and values[values != 0].abs().min() == 1 / 16
    repacked = quantize_fp4(values)
    x = torch.randn(4, 128, generator=g)
    offsets = torch.tensor([0, 2, 4])
    assert torch.equal(grouped_gemm.grouped_gemm(x, repacked, offsets=offsets), grouped_gemm.grouped_gemm(x, w.unpack(), offsets=offsets))


def test_record_rates_by_hand(tmp_path):
    found = record(us=200.0)
    counts = MASKED.draw()
    assert found.counts == counts and found.config == "4:16,48:8"
    assert found.tflops == pytest.approx(2 * sum(counts) * 6144 * 7168 / 200e6)
    assert found.weights_gbps == pytest.approx(32 * 6144 * 7168 * 17 / 32 / 200e3)
    assert found.percent_of_floor == pytest.approx(found.floor_us / 2)
    path = tmp_path / "perf" / "out.jsonl"
    append_records(path, [found])
    append_records(path, [record(provider="deep_gemm fp8", us=350.0)])
    assert read_records([path], Record) == [found, record(provider="deep_gemm fp8", us=350.0)]
    lines = terminal_table(read_records([path], Record)).splitlines()
    assert len(lines) == 4 and "199.0-202.0" in lines[2] and "deep_gemm fp8  350.0" in lines[3]


def test_markdown_from_canned_records():
    stream = Case("masked", 32, 64, 6144, 7168, "uniform", Goal("weights_gbps", 3550, 4200))
    plain = Case("dense", 1, 128, 4096, 7168, "exact", None, 13.8)
    records = [record(us=250.0), record(us=200.0), record(provider="deep_gemm fp8", us=350.0), record(provider="slow", us=400.0),
               record(provider="deep_gemm fp8", us=300.0, commit="other"), record(plain, us=20.0)]
    lines = markdown_table(records, [MASKED, stream, plain]).splitlines()
    counts = MASKED.draw()
    tflops, floor = 2 * sum(counts) * 6144 * 7168 / 200e6, record().floor_us
    assert lines[2] == (f"| {MASKED.name} | 200 us ({tflops:.0f} TFLOPS) | <= 205 us | 195 | required | 350 us (deep_gemm fp8, same run) "
                        f"| {floor:.0f} | {floor / 2:.0f} % | 199-202 | NVIDIA H200 | abc1234 |")
    assert lines[3] == f"| {stream.name} | not measured | >= 3550 GB/s of weights | 4200 |  |  | | | | | |"
    assert lines[4].startswith(f"| {plain.name} | 20 us (376 TFLOPS) | | | | 13.8 us (DeepGEMM, 2026-11-21, another run) | ")
    assert lines[5:] == ["", "- NVIDIA H200, commit abc1234, 2026-11-21: `python launch/bench_gemm.py`"]
    assert len({line.count("|") for line in lines[:5]}) == 1, "every row has every column"


def test_rates_are_shown_in_the_metric_of_the_goal():
    stream = Case("masked", 32, 64, 6144, 7168, "uniform", Goal("weights_gbps", 3550, 4200))
    row = markdown_table([record(stream, us=200.0)], [stream]).splitlines()[2]
    assert f"| {32 * 6144 * 7168 * 17 / 32 / 200e3:.0f} GB/s of weights (200 us) | >= 3550 GB/s of weights | 4200 | required |" in row


def test_markdown_rewrites_only_between_the_markers(tmp_path, monkeypatch, capsys):
    page, data = tmp_path / "PERFORMANCE.md", tmp_path / "a.jsonl"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    append_records(data, [record(DEFAULT_CASES[0])])
    monkeypatch.setattr(bench_gemm, "PAGE", page)
    assert bench_gemm.main(["--markdown", str(data)]) == 0
    assert page.read_text() == f"before\n{BEGIN}\n{markdown_table(read_records([data], Record))}{END}\nafter\n"
    assert bench_gemm.main(["--markdown", str(data)]) == 0 and page.read_text().count("| case |") == 1


def test_the_page_in_docs_has_the_markers():
    page = bench_gemm.PAGE.read_text()
    assert page.count(BEGIN) == page.count(END) == 1 and bench.FLOOR_FORMULA.split(" = ")[1] in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("program, name", [(bench_gemm, "bench_gemm"), (tune_gemm, "tune_gemm")])
def test_without_a_gpu(program, name, capsys):
    assert program.main(["--op", "dense"]) == 1
    assert capsys.readouterr().err.startswith(f"{name}: a CUDA device must be there to measure, found none")
