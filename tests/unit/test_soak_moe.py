"""launch/soak_moe.py without a GPU: rounds, the verdict on a call, and a short run on two CPU ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))

import soak_moe  # noqa: E402
from soak_moe import Progress, Round  # noqa: E402


def test_rounds_repeat_and_cover_the_extremes():
    rounds = [Round.draw(seed, 64, 4) for seed in range(300)]
    assert rounds == [Round.draw(seed, 64, 4) for seed in range(300)]
    tokens = {t for each in rounds for t in each.tokens}
    assert {0, 1, 64} <= tokens and max(tokens) == 64 and len(tokens) > 40
    assert {each.routing for each in rounds} == {"uniform", "zipf", "one-rank"}
    assert {each.late_rank for each in rounds} == {0, 1, 2, 3} and {each.with_pause for each in rounds} == {True, False}
    assert max(t for seed in range(50) for t in Round.draw(seed, 8, 2).tokens) == 8


def test_a_wrong_token_is_named(monkeypatch):
    monkeypatch.setattr(soak_moe.dist, "get_rank", lambda: 2)
    due, each = torch.randn(9, 64), Round(7, "zipf", (9, 9, 9), 0, False)
    y = due.clone()
    assert soak_moe.judge(each, y, due) == (0.0, "")
    y[4] *= 1.5
    error, problem = soak_moe.judge(each, y, due)
    assert error == pytest.approx(0.5)
    assert problem == f"rank 2: error median 0.00e+00, largest 5.00e-01 in token 4, all finite; {each}"
    y[4] = torch.nan
    assert soak_moe.judge(each, y, due)[1].endswith(f"NaN or Inf; {each}")
    assert soak_moe.judge(each, due[:0], due[:0]) == (0.0, "")


@pytest.mark.parametrize("num_tokens, is_right", ((63, True), (64, False)))
def test_the_median_of_a_large_call_is_judged_by_itself(monkeypatch, num_tokens, is_right):
    monkeypatch.setattr(soak_moe.dist, "get_rank", lambda: 0)
    due, each = torch.randn(num_tokens, 64), Round(7, "uniform", (num_tokens,), 0, False)
    assert (soak_moe.judge(each, due * 1.02, due)[1] == "") == is_right


def test_the_median_is_judged_over_many_rounds(monkeypatch):
    monkeypatch.setattr(soak_moe.dist, "get_rank", lambda: 1)
    rounds = [Round(seed, "uniform", (t,), 0, False) for seed, t in ((40, 1), (41, 0), (42, 30))]
    due = [torch.randn(t, 64) for t in (1, 0, 30)]
    one_is_off = [(due[0] * 1.02, due[0]), (due[1], due[1]), (due[2], due[2])]
    assert soak_moe.judge_median(rounds, one_is_off) == ""
    most_are_off = [(due[0], due[0]), (due[1], due[1]), (due[2] * 1.02, due[2])]
    assert soak_moe.judge_median(rounds, most_are_off) == "rank 1: median error 2.00e-02 over the tokens of seeds 40 to 42"
    nothing = [(due[1], due[1])]
    assert soak_moe.judge_median(rounds[1:2], nothing) == ""


def test_the_line():
    assert Progress(1200, 34567, 0.00123).line(10.4) == "    10 s  1,200 rounds  34,567 tokens  largest error of a token 1.2e-03"


def test_needs_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit):
        soak_moe.parse_args([])
    assert "soak_moe: ranks must be started by torchrun, got a plain process; see --help for the command" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU, where ranks are processes on the CPU")
def test_a_short_run_on_two_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
               "launch/soak_moe.py", "--model", "tiny", "--engine", "reference", "--against", "reference", "--max-tokens", "8",
               "--minutes", "0"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEGAMOE_SHM_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    line, verdict = done.stdout.splitlines()[-2:]
    assert "20 rounds" in line and "largest error of a token 0.0e+00" in line
    assert verdict == "PASS: tiny, reference against reference, 2 ranks"
    assert not list(tmp_path.iterdir())
