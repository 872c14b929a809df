"""The arena between real processes: construction agrees or fails on all ranks, signals order memory, and nobody waits for ever."""

import fcntl
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megamoe.comm import Arena, Topology, agree
from megamoe.config import MoEConfig
from megamoe.env import env
from megamoe.errors import ArenaBudgetError, ArenaError, CollectiveMismatchError, EngineUnavailableError
from megamoe.testing.ranks import RankFailures

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=12, num_topk=2, max_tokens_per_rank=16)


def no_files_left() -> bool:
    """Whether no arena file has lost its creator; those of other test runs on this machine have one, and so a lock."""
    for path in env.shm_dir.glob(f"megamoe-{os.getuid()}-*"):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
        except (FileNotFoundError, BlockingIOError):
            continue
    return True


def mapped_files() -> list[str]:
    """The arena files this process has mapped, as the kernel names them."""
    return [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/megamoe-" in line]


def raised_everywhere(pool, fn, *args) -> list[BaseException]:
    with pytest.raises(RankFailures) as caught:
        pool.run(fn, *args)
    assert len(caught.value.errors) == pool.num_ranks
    assert no_files_left()
    return [caught.value.errors[rank] for rank in range(pool.num_ranks)]


def create(rank: int, num_ranks: int, *options: dict) -> None:
    Arena.create(**({"cfg": CFG, "timeout_s": 10.0} | options[rank])).close()


def describe(rank: int, num_ranks: int):
    with Arena.create(CFG, timeout_s=10.0) as arena:
        topology = Topology.from_group(None, "cpu")
        assert arena.peer_ptrs[rank] == arena.peer_view(rank, "inputs_ready").data_ptr() == arena.view("inputs_ready").data_ptr()
        assert len(set(arena.peer_ptrs)) == num_ranks
        assert not any(arena.view(name).view(torch.uint8).any() for name in arena.layout.placements), "zeroed at creation"
        return repr(arena), topology, arena.layout.hash, mapped_files()


def test_creation(rank_pool):
    results = rank_pool(3).run(describe)
    assert [result[0] for result in results] == [f"Arena(shm, rank {rank} of 3, cpu, 0.0 MiB, 256 pool rows)" for rank in range(3)]
    assert [result[1] for result in results] == [Topology(rank, 3, (0, 1, 2)) for rank in range(3)]
    assert len({result[2] for result in results}) == 1
    for files in (result[3] for result in results):
        assert len(files) == 3 and all(file.endswith(" (deleted)") for file in files), "the names are gone before create returns"


def write_and_read_peers(rank: int, num_ranks: int):
    """Every rank writes a row of its own into each peer's x and reads all rows back from each peer, through FP8 views."""
    with Arena.create(CFG, timeout_s=10.0) as arena:
        for peer in range(num_ranks):
            arena.peer_view(peer, "x")[rank] = torch.full((64,), float(3 * peer + rank + 1)).to(torch.float8_e4m3fn)
        arena.barrier()
        rows = [arena.peer_view(peer, "x")[:num_ranks, 63].float().tolist() for peer in range(num_ranks)]
        arena.barrier()
        return rows


def test_every_rank_reads_and_writes_every_arena(rank_pool):
    expected = [[3.0 * peer + rank + 1 for rank in range(3)] for peer in range(3)]
    assert rank_pool(3).run(write_and_read_peers) == [expected] * 3


@pytest.mark.parametrize("options, field, values", (
    ({"cfg": replace(CFG, hidden=96)}, "hidden", "rank 0 has 64, rank 1 has 96"),
    ({"cfg": replace(CFG, swiglu_limit=7.0)}, "swiglu_limit", "rank 0 has None, rank 1 has 7.0"),
    ({"cfg": replace(CFG, precision="bf16")}, "precision", "rank 0 has 'fp8xfp4', rank 1 has 'bf16'"),
    ({"backend": "shm"}, "backend", "rank 0 has 'auto', rank 1 has 'shm'"),
    ({"arena_bytes": 2**20}, "arena_bytes", "rank 0 has None, rank 1 has 1048576"),
    ({"timeout_s": 11.0}, "timeout_s", "rank 0 has 10.0, rank 1 has 11.0"),
), ids=lambda value: value if isinstance(value, str) else "")
def test_a_mismatch_is_raised_on_every_rank(rank_pool, options, field, values):
    for error in raised_everywhere(rank_pool(2), create, {}, options):
        assert type(error) is CollectiveMismatchError
        assert str(error) == f"Arena: {field} differs between ranks: {values}; construct every rank with the same arguments"


def create_with_another_table(rank: int, num_ranks: int) -> None:
    import megamoe.comm.protocol as protocol

    table = protocol.REGIONS
    try:
        if rank == 1:
            protocol.REGIONS = tuple(replace(region, alignment=4096) if region.name == "pool_x" else region for region in table)
        Arena.create(CFG)
    finally:
        protocol.REGIONS = table


def test_a_layout_mismatch_names_the_region(rank_pool):
    for error in raised_everywhere(rank_pool(2), create_with_another_table):
        assert re.fullmatch(r"Arena: region pool_x differs between ranks: rank 0 has '\[256, 64\] float8_e4m3fn at \d+', "
                            r"rank 1 has '\[256, 64\] float8_e4m3fn at \d+'; construct every rank with the same arguments", str(error))


def test_a_failure_of_one_rank_is_raised_on_every_rank(rank_pool):
    for error in raised_everywhere(rank_pool(2), create, {}, {"arena_bytes": 4096}):
        assert type(error) is ArenaBudgetError
        assert str(error) == ("Arena: arena_bytes must be at least 22528 for 16 tokens per rank and a pool of 64 rows, got 4096; "
                              "pass arena_bytes >= 22528 (on rank 1)")


def test_a_failure_of_every_rank_is_raised_as_it_is(rank_pool):
    for error in raised_everywhere(rank_pool(2), create, {"arena_bytes": 4096}, {"arena_bytes": 4096}):
        assert type(error) is ArenaBudgetError and str(error).endswith("pass arena_bytes >= 22528")
    for error in raised_everywhere(rank_pool(2), create, {"timeout_s": 0}, {"timeout_s": 0}):
        assert type(error) is ValueError and str(error) == "Arena: timeout_s must be positive, got 0; pass seconds"


@pytest.mark.parametrize("backend, message", (
    ("pigeon", "Arena: backend must be one of ('auto', 'local', 'shm', 'torch', 'nvshmem', 'unmapped'), got 'pigeon'; pick one of them"),
    ("local", "Arena: backend 'local' cannot run here: it serves one rank and the group has 2; use 'auto'"),
    ("torch", "Arena: backend 'torch' cannot run here: it holds GPU memory and the device is cpu; use 'shm'"),
    ("nvshmem", "Arena: backend 'nvshmem' cannot run here: it holds GPU memory and the device is cpu; use 'shm'"),
))
def test_a_backend_that_cannot_run_says_why(rank_pool, backend, message):
    for error in raised_everywhere(rank_pool(2), create, {"backend": backend}, {"backend": backend}):
        assert type(error) is EngineUnavailableError and str(error) == message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu():
    message = "Arena: backend 'local' cannot run here: no CUDA device was found; use device='cpu'"
    with pytest.raises(EngineUnavailableError, match=re.escape(message)):
        Arena.create(CFG, device="cuda")


def agree_on(rank: int, num_ranks: int, fields: list[dict], errors: list) -> None:
    agree(None, "MegaMoE", fields[rank], errors[rank])


def test_agree_reports_every_failing_rank(rank_pool):
    errors = [None, OSError("disk on fire"), ValueError("MegaMoE: x must be y, got z; fix it")]
    for error in raised_everywhere(rank_pool(3), agree_on, [{"a": 1}] * 3, errors):
        assert type(error) is RuntimeError
        assert str(error) == "disk on fire (on rank 1); MegaMoE: x must be y, got z; fix it (on rank 2)"
    for error in raised_everywhere(rank_pool(3), agree_on, [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}], [None] * 3):
        assert str(error) == ("MegaMoE: b differs between ranks: rank 0 has 2, rank 1 has 3, rank 2 has 2; construct every rank with the "
                              "same arguments")
    assert rank_pool(3).run(agree_on, [{"a": 1}] * 3, [None] * 3) == [None] * 3


def create_in_subgroup(rank: int, num_ranks: int):
    members = (0, 2)
    group = dist.new_group(members)
    if rank not in members:
        return None
    with Arena.create(CFG, group=group, timeout_s=10.0) as arena:
        arena.peer_view(1 - arena.rank, "num_tokens").fill_(100 + rank)
        arena.barrier()
        return arena.rank, arena.num_ranks, int(arena.view("num_tokens"))


def test_a_subgroup_counts_its_own_ranks(rank_pool):
    assert rank_pool(3).run(create_in_subgroup) == [(0, 2, 102), None, (1, 2, 100)]


def test_a_world_of_one():
    for backend in ("auto", "shm"):
        with Arena.create(CFG, backend=backend, timeout_s=10.0) as arena:
            assert arena.backend == ("local" if backend == "auto" else backend) and arena.num_ranks == 1
            arena.begin_call()
            arena.post(0, "inputs_ready", arena.epoch)
            arena.wait("inputs_ready", 0, arena.epoch, "dispatch")
            arena.barrier()
            arena.reset()
            assert arena.epoch == 0
    assert no_files_left()


def test_mismatch_of_a_shared_arena():
    with Arena.create(CFG) as arena:
        assert arena.mismatch(replace(CFG, swiglu_limit=7.0)) is None
        message = "Arena: hidden must be 64, as the arena has it, got 96; share arenas between equal shapes"
        assert str(arena.mismatch(replace(CFG, hidden=96))) == message
        message = "Arena: max_tokens_per_rank must be 16, as the arena has it, got 8; share arenas between equal shapes"
        assert str(arena.mismatch(replace(CFG, max_tokens_per_rank=8))) == message


def test_a_closed_arena():
    arena = Arena.create(CFG)
    arena.close()
    arena.close()
    assert repr(arena) == "Arena(local, rank 0 of 1, cpu, closed)"
    for use in (lambda: arena.view("x"), lambda: arena.post(0, "barrier", 1), lambda: arena.wait("barrier", 0, 1, "test"), arena.begin_call,
                arena.barrier, arena.reset):
        with pytest.raises(ArenaError, match=re.escape("Arena: it is closed; create another one")):
            use()


@pytest.mark.parametrize("backend", ("local", "shm"))
def test_an_arena_that_nobody_closed_ends_without_noise(backend):
    code = ("from megamoe.comm import Arena; from megamoe.config import MoEConfig; "
            f"arena = Arena.create(MoEConfig(**{CFG.as_dict()!r}), backend={backend!r}); view = arena.view('x')")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert no_files_left()
