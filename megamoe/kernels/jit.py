"""Kernels by name and config: a dict of loaded kernels in front of a folder of cubins in front of the compiler.

The folder (MEGAMOE_CACHE_DIR) is shared by any number of processes. An entry is one file, written aside and renamed, so it is whole or
absent; its checksum catches what a disk or a crash still breaks. A lock per entry lets one process compile while the others wait for it.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import torch

from megamoe.env import env
from megamoe.kernels.compiler import FLAGS, Cubin, compile_cubin, find_compiler, include_dir
from megamoe.kernels.launch import Kernel

_MAGIC = b"megamoe cubin 1\n"

_kernels: dict[tuple[str, Hashable, int], Kernel] = {}
_requested_compiler = "auto"
_fallback: Path | None = None  # where entries go when the folder cannot be written
_fallback_lock = threading.Lock()


def build(op: str, config: Hashable, make_source: Callable[[], str], entry: str, device: int | None = None) -> Kernel:
    """The kernel of `op` with `config`, loaded on `device`: from memory, from disk, or compiled now.

    Args:
        op: name of the operator; begins the names of its files in the cache.
        config: what the text depends on. The same (op, config) must always mean the same text.
        make_source: gives the CUDA C++ text; not called for a kernel that is loaded already.
        entry: name of the kernel in the cubin, i.e. mangled unless it is extern "C".
        device: CUDA device index; None for the current one.

    Raises:
        CompileError: the compiler refused the text.
        EngineUnavailableError: there is no compiler, or no driver.

    Sync: none on the device. Blocks while another process compiles the same kernel. Not to be called for the first time inside a CUDA graph
    capture, since loading allocates.
    """
    if device is None:
        device = torch.cuda.current_device()
    kernel = _kernels.get((op, config, device))
    if kernel is not None:
        return kernel
    major, minor = torch.cuda.get_device_capability(device)
    cubin = fetch(op, make_source(), f"sm_{major}{minor}{'a' if major >= 9 else ''}")
    # Two threads may both come here: all use what the first one stored.
    return _kernels.setdefault((op, config, device), Kernel(op, cubin, entry, device))


def use_compiler(name: str) -> None:
    """Compile with "nvcc", "nvrtc" or "auto" from now on, and forget what is loaded, e.g. to compare the two. Affects this process."""
    global _requested_compiler
    find_compiler(name)
    _requested_compiler = name
    _kernels.clear()


def folder() -> Path:
    """Where this process keeps new entries."""
    return _fallback or env.cache_dir


def fetch(op: str, source: str, arch: str) -> Cubin:
    """The cubin of `source` for `arch`, from the folder or compiled into it. Needs no GPU.

    Where the folder cannot be written, a folder of this process takes its place, with one warning.
    """
    key = cache_key(source, arch)

    def compile_to(path: Path) -> Cubin:
        return compile_cubin(source, arch, _requested_compiler, path)

    try:
        return _fetch(env.cache_dir, f"{op}-{key.hex()}", key, compile_to)
    except OSError as error:
        return _fetch(_fallback_folder(error), f"{op}-{key.hex()}", key, compile_to)


def cache_key(source: str, arch: str) -> bytes:
    """Everything the machine code depends on, as 32 bytes: text, headers, architecture, flags, and the compiler with its version.

    The text stands for the config: it is written from it, so a change of how it is written is a change of the key too.
    """
    compiler = find_compiler(_requested_compiler)
    parts = [arch, *FLAGS, compiler.name, compiler.version, source]
    for header in sorted(include_dir().rglob("*.cuh")):
        parts += [header.relative_to(include_dir()).as_posix(), header.read_text()]
    # As JSON, because plain concatenation could give two lists the same bytes.
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _fetch(folder: Path, name: str, key: bytes, compile_to: Callable[[Path], Cubin]) -> Cubin:
    path = folder / f"{name}.cubin"
    cubin = _read(path, key)
    if cubin is not None:
        return cubin
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f"{name}.lock"):
        cubin = _read(path, key)  # by whoever held the lock before
        if cubin is None:
            path.unlink(missing_ok=True)
            cubin = compile_to(folder / f"{name}.cu")
            (folder / f"{name}.log").write_text(cubin.log)
            _write(path, key, cubin)
    return cubin


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file; the kernel releases it if this process dies. It stays: removing it would let two processes hold two files."""
    with open(path, "a") as file:
        # A file system without locks costs a second compilation, nothing else: the rename is atomic anyway.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, key: bytes, cubin: Cubin) -> None:
    facts = {"log": cubin.log, "num_registers": cubin.num_registers, "stack_bytes": cubin.stack_bytes, "spill_bytes": cubin.spill_bytes}
    head = json.dumps(facts).encode()
    payload = len(head).to_bytes(8, "little") + head + cubin.code
    aside = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(_MAGIC + key + hashlib.sha256(payload).digest() + payload)
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power cut leaves a whole name with half a file
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _read(path: Path, key: bytes) -> Cubin | None:
    """The entry at `path`; None if there is none, or if it is not what was written for `key`."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + 64
    payload = data[start:]
    if data[:start] != _MAGIC + key + hashlib.sha256(payload).digest():
        return None
    size = int.from_bytes(payload[:8], "little")
    return Cubin(payload[8 + size:], **json.loads(payload[8:8 + size]))


def _fallback_folder(reason: OSError) -> Path:
    """A folder that lives as long as this process. Warns when it is made."""
    global _fallback
    with _fallback_lock:
        if _fallback is not None:
            return _fallback
        _fallback = path = Path(tempfile.mkdtemp(prefix="megamoe-cache-"))
    owner = os.getpid()
    # A forked child copies the registration; only the process that made the folder may remove it.
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(path, ignore_errors=True))
    warnings.warn(f"kernels: the cache in {env.cache_dir} cannot be used ({reason}), so every process compiles for itself; set "
                  f"MEGAMOE_CACHE_DIR to a folder that can be written", RuntimeWarning, stacklevel=4)
    return path
