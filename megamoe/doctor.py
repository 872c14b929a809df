"""`python -m megamoe.doctor`: what megamoe finds on this machine, what it would choose, and why. Reads only; runs without a GPU."""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import megamoe
from megamoe.comm import backends
from megamoe.comm.topology import Topology
from megamoe.engines import ENGINES, choose_engine
from megamoe.env import env
from megamoe.errors import EngineUnavailableError
from megamoe.kernels.compiler import NVRTC_WHEELS, find_nvcc

Rows = list[tuple[str, str]]


def report() -> Rows:
    """Everything found, as (label, value) rows in the order of printing. A label is empty where it continues the row above."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = torch.version.cuda
    return [
        ("megamoe", megamoe.__version__),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("torch", f"{torch.__version__} ({f'CUDA {cuda}' if cuda else 'built without CUDA'})"),
        *_gpus(),
        *_peer_access(),
        ("CUDA compiler", _compiler()),
        ("kernel cache", _cache(env.cache_dir)),
        ("shared memory", _free_space(env.shm_dir)),
        *_backends(device),
        *_engines(device),
    ]


def _gpus() -> Rows:
    if not torch.cuda.is_available():
        return [("GPU", "none visible: layers run on the CPU")]
    rows = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs, {_gib(gpu.total_memory)}"))
    return rows


def _peer_access() -> Rows:
    """One row per GPU: the GPUs whose memory it can load from and store to."""
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    rows = []
    for source in range(num_gpus):
        peers = [str(peer) for peer in range(num_gpus) if peer != source and torch.cuda.can_device_access_peer(source, peer)]
        rows.append(("" if rows else "peer access", f"GPU {source} reaches {' '.join(peers) or 'no other'}"))
    return rows


def _compiler() -> str:
    nvcc = find_nvcc()
    if nvcc is not None:
        return f"{nvcc} ({_nvcc_release(nvcc)})"
    for wheel in NVRTC_WHEELS:
        try:
            return f"NVRTC {metadata.version(wheel)} (wheel {wheel})"
        except metadata.PackageNotFoundError:
            continue
    return "none: no nvcc in PATH, CUDA_HOME or /usr/local/cuda, and no NVRTC wheel"


def _nvcc_release(nvcc: str) -> str:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"
    return next((line.split(",", 1)[1].strip() for line in text.splitlines() if "release" in line), "unknown release")


def _cache(path: Path) -> str:
    existing = next(folder for folder in (path, *path.parents) if os.path.exists(folder))
    is_writable = os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)
    return f"{path} ({'writable' if is_writable else f'not writable: {existing} refuses it'})"


def _free_space(path: Path) -> str:
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return f"{path} (unusable: {error.strerror})"
    return f"{path} ({_gib(usage.free)} free of {_gib(usage.total)})"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _backends(device: torch.device) -> Rows:
    """Every backend where it is meant to run (`local` with one rank, the others with one per GPU or two on the CPU), and the choice."""
    num_ranks = max(2, torch.cuda.device_count()) if device.type == "cuda" else 2
    rows = []
    for name in backends.NAMES:
        chosen = _choose_backend(name, 1 if name == "local" else num_ranks, device)
        rows.append((f"backend {name!r}", "available" if chosen == name else chosen))
    alone, together = (_choose_backend("auto", ranks, device) for ranks in (1, num_ranks))
    across = f" ({_choose_backend('auto', num_ranks, device, (0,))} across NVLink domains)" if device.type == "cuda" else ""
    return [*rows, ("backend 'auto'", f"{alone} for 1 rank, {together} for {num_ranks} ranks{across}, because the device is {device}")]


def _choose_backend(requested: str, num_ranks: int, device: torch.device, nvlink_ranks: tuple[int, ...] | None = None) -> str:
    """The backend chosen, or why there is none; for ranks that reach each other's memory where nvlink_ranks does not say otherwise."""
    topology = Topology(rank=0, num_ranks=num_ranks, nvlink_ranks=tuple(range(num_ranks)) if nvlink_ranks is None else nvlink_ranks)
    try:
        return backends.choose(requested, topology, device)
    except EngineUnavailableError as error:
        return str(error).removeprefix(f"Arena: backend {requested!r} ")


def _engines(device: torch.device) -> Rows:
    """Every engine for fp8xfp4 layers, and the choice."""
    rows = [(f"engine {name!r}", _engine_state(name, device)) for name in ENGINES]
    name, reason = choose_engine("auto", device, "fp8xfp4")
    return [*rows, ("engine 'auto'", f"{name} for fp8xfp4: {reason}")]


def _engine_state(name: str, device: torch.device) -> str:
    try:
        choose_engine(name, device, "fp8xfp4")
    except EngineUnavailableError as error:
        return str(error).removeprefix(f"MegaMoE: engine {name!r} ").removesuffix("; pass engine='auto'")
    if name == "unfused":
        return f"available, transport {env.transport}"
    if name == "fused":
        return "available inside an NVLink domain"
    return "available"


def main() -> int:
    """Print the report, aligned. Returns the exit code, always 0: what is missing is an answer, not a failure."""
    rows = report()
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
