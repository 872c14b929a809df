"""The pool itself: results and errors of every rank come back, a lost rank costs one run, and no process outlives its parent."""

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megamoe.testing.ranks import RankFailures, RankLostError


def reduce_ranks(rank: int, num_ranks: int, scale: int):
    value = torch.tensor([float(scale * rank)])
    dist.all_reduce(value)
    return rank, num_ranks, value, torch.get_num_threads()


def fail_on_odd_ranks(rank: int, num_ranks: int):
    if rank % 2:
        raise KeyError(f"rank {rank} lost its key")
    return rank


def raise_unpicklable(rank: int, num_ranks: int):
    class Local(Exception):
        pass

    raise Local("cannot travel")


def sleep(rank: int, num_ranks: int, seconds: tuple[float, ...]):
    time.sleep(seconds[rank])
    return os.getpid()


@pytest.mark.parametrize("num_ranks", (1, 2, 4))
def test_results_come_in_rank_order(rank_pool, num_ranks):
    results = rank_pool(num_ranks).run(reduce_ranks, 10)
    total = torch.tensor([10.0 * sum(range(num_ranks))])
    assert results == [(rank, num_ranks, total, 1) for rank in range(num_ranks)]


def test_every_failing_rank_is_reported(rank_pool):
    pool = rank_pool(4)
    with pytest.raises(RankFailures) as caught:
        pool.run(fail_on_odd_ranks)
    failures = caught.value
    assert {rank: (type(error), error.args) for rank, error in failures.errors.items()} == {
        1: (KeyError, ("rank 1 lost its key",)), 3: (KeyError, ("rank 3 lost its key",))}
    assert failures.results == {0: 0, 2: 2}
    for rank in (1, 3):
        assert f"--- rank {rank} ---\nTraceback" in str(failures) and f"KeyError: 'rank {rank} lost its key'" in str(failures)
    assert "in fail_on_odd_ranks" in str(failures) and str(failures).startswith("2 of 4 ranks failed\n")


def test_an_exception_that_cannot_travel(rank_pool):
    with pytest.raises(RankFailures) as caught:
        rank_pool(1).run(raise_unpicklable)
    assert type(caught.value.errors[0]) is RuntimeError and str(caught.value.errors[0]) == "Local: cannot travel"


def test_a_killed_rank_is_reported_and_replaced(rank_pool):
    pool = rank_pool(2)
    before = pool.run(sleep, (0, 0))
    pool.start(sleep, (0, 30))
    pool.kill(1)
    with pytest.raises(RankFailures) as caught:
        pool.finish(timeout_s=10)
    assert set(caught.value.errors) == {1} and caught.value.results == {0: before[0]}
    assert type(caught.value.errors[1]) is RankLostError and str(caught.value.errors[1]) == "rank 1 died with exit code -9"
    after = pool.run(sleep, (0, 0))
    assert not set(after) & set(before)


def test_a_rank_that_does_not_answer(rank_pool):
    with pytest.raises(RankFailures) as caught:
        rank_pool(2).run(sleep, (0, 30), timeout_s=0.5)
    (rank, error), = caught.value.errors.items()
    assert rank == 1 and str(error).startswith("rank 1 did not answer within 0.5 s; its threads were at\n")
    assert f'File "{__file__}", line {sleep.__code__.co_firstlineno + 1} in sleep\n' in str(error)


def test_run_until_death_wants_exactly_the_dead_it_was_told(rank_pool):
    with pytest.raises(AssertionError, match="must die, but all 2 ranks answered"):
        rank_pool(2).run_until_death(sleep, (0, 0), expected_dead=(1,))
    with pytest.raises(RankFailures):
        rank_pool(2).run_until_death(fail_on_odd_ranks, expected_dead=(1,))


JOB = """
import os, time

def pid(rank, num_ranks):
    return os.getpid()

def busy(rank, num_ranks):
    time.sleep(60)
"""
PARENT = """
import os, signal, job
from megamoe.testing.ranks import RankPool

if __name__ == "__main__":
    pool = RankPool(2)
    print(*pool.run(job.pid), flush=True)
    pool.start(job.busy)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_die_with_their_parent(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "parent.py").write_text(PARENT)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "parent.py"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True, timeout=60)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and len(pids) == 2
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, f"{pids} outlived their parent"
        time.sleep(0.05)
