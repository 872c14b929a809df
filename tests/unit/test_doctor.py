"""`python -m megamoe.doctor`: every row is there and true, with and without a GPU, a compiler or a writable cache."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import megamoe
from megamoe import doctor
from megamoe.env import Env

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without a GPU reports")


def rows() -> dict[str, str]:
    return dict(doctor.report())


def test_versions():
    found = rows()
    assert found["megamoe"] == megamoe.__version__
    assert found["python"] == f"{platform.python_version()} ({sys.executable})"
    assert found["torch"].startswith(f"{torch.__version__} (")


@CPU_ONLY
def test_without_a_gpu():
    found = rows()
    assert found["GPU"] == "none visible: layers run on the CPU"
    assert "peer access" not in found
    assert found["backend 'local'"] == found["backend 'shm'"] == found["backend 'unmapped'"] == "available"
    assert found["backend 'torch'"].startswith("cannot run here: ") and found["backend 'nvshmem'"].startswith("cannot run here: ")
    assert found["backend 'auto'"] == "local for 1 rank, shm for 2 ranks, because the device is cpu"
    assert found["engine 'reference'"] == "available"
    assert found["engine 'unfused'"] == found["engine 'fused'"] == "cannot run here: it needs a Hopper GPU, not device cpu"
    assert found["engine 'auto'"] == "reference for fp8xfp4: unfused needs a Hopper GPU, not device cpu"


def test_backends_on_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = dict(doctor._backends(torch.device("cuda")))
    assert found["backend 'torch'"] == found["backend 'unmapped'"] == "available"
    assert found["backend 'auto'"] == "local for 1 rank, torch for 4 ranks (unmapped across NVLink domains), because the device is cuda"


def test_engines_on_a_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert dict(doctor._engines(torch.device("cuda"))) == {
        "engine 'reference'": "available", "engine 'unfused'": "available, transport auto",
        "engine 'fused'": "available inside an NVLink domain",
        "engine 'auto'": "fused for fp8xfp4: the fastest one here"}


def test_gpus_and_their_peers(monkeypatch):
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda source, peer: {source, peer} == {0, 2})
    assert doctor._gpus() == [(f"GPU {index}", "NVIDIA H200, sm_90, 132 SMs, 141.0 GiB") for index in range(3)]
    assert doctor._peer_access() == [("peer access", "GPU 0 reaches 2"), ("", "GPU 1 reaches no other"), ("", "GPU 2 reaches 0")]


def fake_nvcc(folder: Path, script: str) -> str:
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_compiler_in_path_comes_first(tmp_path, monkeypatch):
    nvcc = fake_nvcc(tmp_path / "path", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    fake_nvcc(tmp_path / "home/bin", "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert rows()["CUDA compiler"] == f"{nvcc} (release 13.0, V13.0.88)"


@pytest.mark.parametrize("script, release", [
    ("echo 'tools, release 12.4, V12.4.1'", "release 12.4, V12.4.1"), ("exit 3", "unknown release")])
def test_compiler_in_cuda_home(tmp_path, monkeypatch, script, release):
    nvcc = fake_nvcc(tmp_path / "bin", script)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert rows()["CUDA compiler"] == f"{nvcc} ({release})"


def test_compiler_that_does_not_start(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("not a program")
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path: str(nvcc))
    assert rows()["CUDA compiler"] == f"{nvcc} (does not run: [Errno 13] Permission denied: '{nvcc}')"


@pytest.mark.parametrize("wheel, expected", [
    ("nvidia-cuda-nvrtc-cu13", "NVRTC 13.0.88 (wheel nvidia-cuda-nvrtc-cu13)"),
    (None, "none: no nvcc in PATH, CUDA_HOME or /usr/local/cuda, and no NVRTC wheel")])
def test_no_nvcc(monkeypatch, wheel, expected):
    def version(name):
        if name != wheel:
            raise metadata.PackageNotFoundError(name)
        return "13.0.88"

    monkeypatch.setattr(doctor.shutil, "which", lambda name, path: None)
    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor._compiler() == expected


def test_cache_and_shared_memory(tmp_path, monkeypatch):
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(doctor, "env", Env(cache_dir=tmp_path / "not" / "yet", shm_dir=tmp_path))
    assert rows()["kernel cache"] == f"{tmp_path / 'not' / 'yet'} (writable)"
    assert rows()["shared memory"].startswith(f"{tmp_path} (") and rows()["shared memory"].endswith(" GiB)")
    monkeypatch.setattr(doctor, "env", Env(cache_dir=tmp_path / "a_file" / "cache", shm_dir=tmp_path / "absent"))
    assert rows()["kernel cache"] == f"{tmp_path / 'a_file' / 'cache'} (not writable: {tmp_path / 'a_file'} refuses it)"
    assert rows()["shared memory"] == f"{tmp_path / 'absent'} (unusable: No such file or directory)"


def test_read_only_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "env", Env(cache_dir=tmp_path))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: Path(path) != tmp_path)
    assert rows()["kernel cache"] == f"{tmp_path} (not writable: {tmp_path} refuses it)"


def test_printed_aligned_with_exit_code_0():
    run = subprocess.run([sys.executable, "-m", "megamoe.doctor"], cwd=Path(megamoe.__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    expected = doctor.report()
    width = max(len(label) for label, _ in expected)
    lines = run.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, (label, value) in zip(lines, expected, strict=True):
        assert line[: width + 2] == label.ljust(width + 2)
        assert line[width + 2 :] == value or label == "shared memory"  # free space moves while other tests run
