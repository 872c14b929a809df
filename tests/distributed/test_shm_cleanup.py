"""Files of the shm backend: none is left after any exit, a live one is never taken away, and a small tmpfs is an error, not a SIGBUS."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from megamoe.comm import Arena
from megamoe.comm.backends import shm
from megamoe.comm.budget import plan_dims
from megamoe.comm.protocol import pack
from megamoe.config import MoEConfig
from megamoe.errors import ArenaError
from megamoe.testing.ranks import RankFailures

CFG = MoEConfig(hidden=64, intermediate=32, num_experts=12, num_topk=2, max_tokens_per_rank=16)
BIG = replace(CFG, hidden=1024, max_tokens_per_rank=256)


@contextlib.contextmanager
def shm_dir(directory: Path):
    """Use `directory` instead of /dev/shm in this process."""
    before = shm.env
    shm.env = replace(before, shm_dir=directory)
    try:
        yield
    finally:
        shm.env = before


@pytest.fixture
def small_tmpfs(tmp_path):
    """A tmpfs of 1 MiB."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def create(rank: int, num_ranks: int, directory: Path, cfg: MoEConfig = CFG) -> list[str]:
    with shm_dir(directory), Arena.create(cfg, timeout_s=10.0) as arena:
        arena.barrier()
        return os.listdir(directory)


def create_and_die(rank: int, num_ranks: int, directory: Path) -> None:
    """SIGKILL rank 1 between the creation of the files and their unlinking."""
    if rank == 1:
        shm._map = lambda path, num_bytes: os.kill(os.getpid(), signal.SIGKILL)
    create(rank, num_ranks, directory)


def test_the_next_start_removes_what_a_killed_rank_left(rank_pool, tmp_path):
    pool = rank_pool(3)
    with pytest.raises(RankFailures) as caught:
        pool.run(create_and_die, tmp_path)
    assert "rank 1 died with exit code -9" in str(caught.value.errors[1])
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(f"megamoe-{os.getuid()}-1-"), "the others unlink their own, even when they fail"
    (tmp_path / "megamoe-somebody-else").touch()
    assert pool.run(create, tmp_path) == [["megamoe-somebody-else"]] * 3


def test_a_file_of_a_living_process_stays(tmp_path):
    file = shm._SharedFile(tmp_path, 0, 4096)
    shm.remove_stale(tmp_path)
    assert file.path.exists() and file.path.stat().st_mode & 0o777 == 0o600 and file.path.stat().st_size == 4096
    file.unlink()
    assert not file.path.exists()


def test_a_file_taken_away_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    taken = []

    def flock_after_another_start(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not taken:
            taken.extend(tmp_path.iterdir())
            shm.remove_stale(tmp_path)
        original(fd, operation)

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock_after_another_start)
    file = shm._SharedFile(tmp_path, 0, 4096)
    assert len(taken) == 1 and not taken[0].exists()
    assert list(tmp_path.iterdir()) == [file.path] and os.fstat(file._fd).st_ino == file.path.stat().st_ino
    file.unlink()


def test_a_small_tmpfs_is_an_error_on_every_rank(rank_pool, small_tmpfs):
    with pytest.raises(RankFailures) as caught:
        rank_pool(2).run(create, small_tmpfs, BIG)
    needed = pack(plan_dims(BIG, num_ranks=2)).num_bytes
    fix = "enlarge it (docker run --shm-size), pass a smaller arena_bytes, or point MEGAMOE_SHM_DIR at a larger tmpfs"
    one = "Arena: {dir} has 1048576 bytes free but rank {rank} needs {needed}; {fix} (on rank {rank})"
    message = "; ".join(one.format(dir=small_tmpfs, rank=rank, needed=needed, fix=fix) for rank in range(2))
    for error in caught.value.errors.values():
        assert type(error) is ArenaError and str(error) == message
    assert len(caught.value.errors) == 2 and not os.listdir(small_tmpfs)


def create_without_space(rank: int, num_ranks: int, directory: Path) -> list[str]:
    """Rank 1 alone gets no space, as when the last rank fills the tmpfs."""
    allocate = os.posix_fallocate

    def no_space(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        os.posix_fallocate = no_space
    try:
        return create(rank, num_ranks, directory)
    finally:
        os.posix_fallocate = allocate


def test_one_rank_without_space_fails_all(rank_pool, tmp_path):
    with pytest.raises(RankFailures) as caught:
        rank_pool(2).run(create_without_space, tmp_path)
    assert len(caught.value.errors) == 2 and not os.listdir(tmp_path)
    for error in caught.value.errors.values():
        assert type(error) is ArenaError and "bytes free but rank 1 needs" in str(error) and str(error).endswith("(on rank 1)")


def test_a_missing_directory(rank_pool, tmp_path):
    with pytest.raises(RankFailures) as caught:
        rank_pool(2).run(create, tmp_path / "absent")
    message = (f"Arena: no file can be created in {tmp_path / 'absent'}: No such file or directory; "
               "point MEGAMOE_SHM_DIR at a writable tmpfs")
    for error in caught.value.errors.values():
        assert type(error) is ArenaError and str(error) == message
