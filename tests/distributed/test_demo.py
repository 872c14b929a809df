"""The main job end to end under torchrun: verdict and exit code, the table, a Ctrl-C, a rank that dies."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the demo needs the transformers extra")

ROOT = Path(__file__).resolve().parents[2]


def start_demo(shm_dir: Path, *args: str) -> subprocess.Popen:
    """The demo on two ranks, in a process group of its own so that a signal reaches all of it, as a Ctrl-C does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2",
               "launch/demo.py", *args]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MEGAMOE_SHM_DIR": str(shm_dir)}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def read_until(demo: subprocess.Popen, text: bytes) -> None:
    seen = b""
    while text not in seen:
        chunk = os.read(demo.stdout.fileno(), 4096)
        assert chunk, f"the demo ended before {text!r}: {seen.decode()}"
        seen += chunk


def finish(demo: subprocess.Popen) -> str:
    output, _ = demo.communicate(timeout=120)
    return output.decode()


def rank_processes(demo: subprocess.Popen) -> list[int]:
    """Process ids of the ranks, in rank order: torchrun starts them in turn."""
    children = Path(f"/proc/{demo.pid}/task").glob("*/children")
    return sorted(int(pid) for path in children for pid in path.read_text().split())


def test_demo_passes_on_two_ranks(tmp_path):
    demo = start_demo(tmp_path, "--tokens", "4096")
    output = finish(demo)
    assert demo.returncode == 0, output
    assert "PASS: 28 of 28 checks passed" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["ranks", "2", "2", "2"] in rows
    assert ["backend", "shm", "shm", "shm"] in rows
    moved = next(row for row in rows if row[:4] == ["bytes", "moved", "between", "ranks"])
    assert all(int(cell.replace(",", "")) > 0 for cell in moved[4:])
    assert not list(tmp_path.iterdir())


def test_interrupt_ends_every_rank_quietly_and_leaves_nothing_behind(tmp_path):
    demo = start_demo(tmp_path)
    read_until(demo, b"fp32 replaced")
    ranks = rank_processes(demo)
    os.killpg(demo.pid, signal.SIGINT)
    output = finish(demo)
    assert demo.returncode != 0
    assert output.count("Traceback") <= 1, "torchrun may print its own traceback, the ranks print none"
    assert "demo_run.py" not in output
    assert len(ranks) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not list(tmp_path.iterdir())


def test_a_killed_rank_ends_the_job_and_is_named(tmp_path):
    demo = start_demo(tmp_path)
    read_until(demo, b"fp32 replaced")
    ranks = rank_processes(demo)
    os.kill(ranks[1], signal.SIGKILL)
    output = finish(demo)
    assert demo.returncode != 0
    assert re.search(rf"local_rank: 1 \(pid: {ranks[1]}\)|rank\s*: 1 \(local_rank: 1\)", output), output
    assert "Signal 9 (SIGKILL) received by PID" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert not list(tmp_path.iterdir())
