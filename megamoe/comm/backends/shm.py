"""Arenas of CPU ranks on one host: one file per rank in a tmpfs, mapped by all ranks, then unlinked.

A file has a name only between its creation and the end of the rendezvous. Its creator holds a lock on it for that long, and the kernel
drops the lock when the creator dies: a named file without a lock is the leftover of a killed process, and the next start removes it.
"""

import errno
import fcntl
import mmap
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from megamoe.comm.agreement import agree, gather
from megamoe.comm.signals import host_atomics
from megamoe.comm.topology import Topology
from megamoe.env import env
from megamoe.errors import ArenaError


def why_not(topology: Topology, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it holds CPU memory and the device is {device}; use 'torch'"
    if not topology.is_one_domain:
        return f"the ranks are on several hosts and only {topology.nvlink_ranks} are on this one; start all ranks on one host"
    try:
        host_atomics()
    except OSError as error:
        return str(error)
    return None


def create(topology: Topology, group: dist.ProcessGroup | None, num_bytes: int, device: torch.device) -> "ShmBackend":
    own, error = None, None
    try:
        remove_stale(env.shm_dir)
        own = _SharedFile(env.shm_dir, topology.rank, num_bytes)
    except ArenaError as caught:
        error = caught
    except OSError as caught:
        error = ArenaError(f"Arena: no file can be created in {env.shm_dir}: {caught.strerror}; point MEGAMOE_SHM_DIR at a writable tmpfs")
    try:
        agree(group, "Arena", {}, error)
        return ShmBackend(group, topology.rank, gather(group, own.path), num_bytes)
    finally:
        if own is not None:
            own.unlink()


def remove_stale(directory: Path) -> None:
    """Remove this user's files whose creators died before they could."""
    for path in directory.glob(f"{_prefix()}*"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue  # its creator was faster, or it only looks like ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            pass  # its creator is alive
        finally:
            os.close(fd)


class ShmBackend:
    name = "shm"
    words = None

    def __init__(self, group: dist.ProcessGroup | None, rank: int, paths: list[Path], num_bytes: int):
        self._group = group
        error = None
        try:
            self._peers = [_map(path, num_bytes) for path in paths]
        except OSError as caught:
            error = caught
        # NOTE: also the barrier after which every rank has mapped every file and the names can go.
        agree(group, "Arena", {}, error)
        self.local = self._peers[rank]
        self.peer_ptrs = tuple(peer.data_ptr() for peer in self._peers)

    def peer(self, rank: int) -> torch.Tensor:
        return self._peers[rank]

    def barrier(self) -> None:
        agree(self._group, "Arena", {})

    def close(self) -> None:
        """Drop the mappings; each goes when its last view does, and peers keep theirs."""
        self._peers, self.local = [], torch.empty(0, dtype=torch.uint8)


class _SharedFile:
    """One rank's file, locked by this process until it is unlinked."""

    def __init__(self, directory: Path, rank: int, num_bytes: int):
        self._fd, self.path = _create_locked(directory, rank)
        try:
            # NOTE: ftruncate would succeed on a tmpfs that is too small, and the first write past its end would be a SIGBUS.
            os.posix_fallocate(self._fd, 0, num_bytes)
        except OSError as error:
            self.unlink()
            if error.errno != errno.ENOSPC:
                raise
            raise ArenaError(_too_small(directory, rank, num_bytes)) from None

    def unlink(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._fd)


def _prefix() -> str:
    return f"megamoe-{os.getuid()}-"


def _create_locked(directory: Path, rank: int) -> tuple[int, Path]:
    while True:
        fd, name = tempfile.mkstemp(prefix=f"{_prefix()}{rank}-", dir=directory)  # O_EXCL, mode 0600
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink > 0:
            return fd, Path(name)
        os.close(fd)  # another start took it for a leftover in the instant before it was locked


def _too_small(directory: Path, rank: int, num_bytes: int) -> str:
    space = os.statvfs(directory)
    return (f"Arena: {directory} has {space.f_bavail * space.f_frsize} bytes free but rank {rank} needs {num_bytes}; enlarge it "
            f"(docker run --shm-size), pass a smaller arena_bytes, or point MEGAMOE_SHM_DIR at a larger tmpfs")


def _map(path: Path, num_bytes: int) -> torch.Tensor:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
    finally:
        os.close(fd)
