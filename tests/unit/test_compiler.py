"""megamoe.kernels.compiler: finding a compiler, the machine code of both, errors with source line and file, and what the log means."""

import importlib.util
import re
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from megamoe.comm.protocol import EVERY
from megamoe.errors import EngineUnavailableError
from megamoe.kernels import compiler
from megamoe.kernels.compiler import CompileError, Cubin, compile_cubin, find_compiler
from megamoe.kernels.shipped import PROBE_ENTRY, shipped_kernels

needs_nvcc = pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
needs_nvrtc = pytest.mark.skipif(importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None,
                                 reason="cuda-bindings is not installed")
BOTH = [pytest.param("nvcc", marks=needs_nvcc), pytest.param("nvrtc", marks=needs_nvrtc)]
KERNEL = """\
#include <megamoe/comm/symm.cuh>
extern "C" __global__ void __launch_bounds__(128, 1) scale(megamoe::uint32* x) {
  x[threadIdx.x] *= FACTOR;
}
"""


def probe() -> str:
    return next(make_source() for op, _, make_source, _ in shipped_kernels() if op == "layout_probe")


@pytest.mark.parametrize("name", BOTH)
def test_compiles_the_layout_probe(name):
    cubin = compile_cubin(probe(), compiler=name)
    assert cubin.code[:4] == b"\x7fELF" and PROBE_ENTRY.encode() in cubin.code
    assert 16 <= cubin.num_registers <= 64
    assert (cubin.stack_bytes, cubin.spill_bytes, cubin.warnings) == (0, 0, [])
    assert "for 'sm_90a'" in cubin.log


@needs_nvcc
@needs_nvrtc
def test_both_report_the_same_resources():
    nvcc, nvrtc = (compile_cubin(KERNEL.replace("FACTOR", "3"), compiler=name) for name in ("nvcc", "nvrtc"))
    assert nvcc.num_registers > 0 and (nvcc.num_registers, nvcc.spill_bytes) == (nvrtc.num_registers, nvrtc.spill_bytes)


@pytest.mark.parametrize("name", BOTH)
def test_spills_are_counted(name):
    """200 live values in 32 registers. The numbers come from the assembler's log, so each compiler has to ask for it."""
    loads = "".join(f"  float v{i} = x[{i} * n];\n" for i in range(200))
    stores = "".join(f"  x[{i}] = v{199 - i};\n" for i in range(200))
    source = f'extern "C" __global__ void __launch_bounds__(1024, 2) spill(float* x, int n) {{\n{loads}  __syncthreads();\n{stores}}}\n'
    cubin = compile_cubin(source, compiler=name)
    assert cubin.num_registers == 32 and cubin.spill_bytes > 400 and cubin.stack_bytes > 200


@pytest.mark.parametrize("name", BOTH)
def test_an_error_shows_file_line_and_source(name, tmp_path):
    path = tmp_path / "scale.cu"
    with pytest.raises(CompileError) as caught:
        compile_cubin(KERNEL, compiler=name, path=path)
    chosen = find_compiler(name)
    text = str(caught.value)
    assert text.startswith(f"kernels: {name} {chosen.version} refused {path}:\n{path}(3): error: identifier \"FACTOR\" is undefined\n")
    assert "x[threadIdx.x] *= FACTOR;" in text
    assert path.read_text() == KERNEL


@pytest.mark.parametrize("name", BOTH)
def test_the_text_of_an_error_stays_and_that_of_a_success_does_not(name, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path))
    compile_cubin(KERNEL.replace("FACTOR", "3"), compiler=name)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CompileError) as caught:
        compile_cubin(KERNEL, compiler=name)
    kept = Path(re.search(r"refused (\S+):\n", str(caught.value))[1])
    assert kept.parent.parent == tmp_path and kept.read_text() == KERNEL


def test_log_of_the_assembler():
    log = "\n".join([
        "ptxas info    : 0 bytes gmem",
        "    16 bytes stack frame, 24 bytes spill stores, 8 bytes spill loads", "ptxas info    : Used 168 registers, used 1 barriers",
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", "ptxas info    : Used 40 registers",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"])
    cubin = compiler._describe(b"code", log)
    assert cubin == Cubin(b"code", log, num_registers=168, stack_bytes=16, spill_bytes=32)
    assert cubin.warnings == [log.splitlines()[-1]]


def hide(monkeypatch, *, nvcc: bool, wheels: dict[str, str]) -> None:
    """Let this machine have nvcc or not, and these wheels only."""
    def version(name):
        if name not in wheels:
            raise metadata.PackageNotFoundError(name)
        return wheels[name]

    compiler._nvrtc_version.cache_clear()
    monkeypatch.setattr(compiler.metadata, "version", version)
    monkeypatch.setattr(compiler.shutil, "which", lambda name, path: "/opt/cuda/bin/nvcc" if nvcc else None)
    told = "Cuda compilation tools, release 13.0, V13.0.88\n"
    compiler._nvcc_version.cache_clear()
    monkeypatch.setattr(compiler.subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0, stdout=told))


@pytest.fixture
def fresh_versions():
    yield
    compiler._nvcc_version.cache_clear()
    compiler._nvrtc_version.cache_clear()


WHEELS = {"cuda-bindings": "13.3.1", "nvidia-cuda-nvrtc-cu12": "12.8.93"}
NO_NVCC = "nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda"
NO_BINDINGS = "NVRTC cannot be called because cuda-bindings is not installed"
INSTALL = "install the CUDA toolkit (>= 12.8)"
INSTALL_EITHER = f"{INSTALL} or cuda-bindings and nvidia-cuda-nvrtc"


@pytest.mark.parametrize("requested, nvcc, expected", [
    ("auto", True, ("nvcc", "V13.0.88")), ("nvcc", True, ("nvcc", "V13.0.88")),
    ("auto", False, ("nvrtc", "12.8.93 (bindings 13.3.1)")), ("nvrtc", True, ("nvrtc", "12.8.93 (bindings 13.3.1)"))])
def test_choice(monkeypatch, fresh_versions, requested, nvcc, expected):
    hide(monkeypatch, nvcc=nvcc, wheels=WHEELS)
    chosen = find_compiler(requested)
    assert (chosen.name, chosen.version) == expected


@pytest.mark.parametrize("requested, message", [
    ("auto", f"kernels: {NO_NVCC}; {NO_BINDINGS}; {INSTALL_EITHER}"), ("nvcc", f"kernels: {NO_NVCC}; {INSTALL}"),
    ("nvrtc", f"kernels: {NO_BINDINGS}; {INSTALL_EITHER}")])
def test_nothing_to_choose(monkeypatch, fresh_versions, requested, message):
    hide(monkeypatch, nvcc=False, wheels={})
    with pytest.raises(EngineUnavailableError, match=f"^{re.escape(message)}$"):
        find_compiler(requested)


def test_an_unknown_compiler_is_refused():
    message = "kernels: compiler must be one of ('auto', 'nvcc', 'nvrtc'), got 'clang'; pick one of them"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        find_compiler("clang")


def test_headers_are_where_the_package_says():
    assert (compiler.include_dir() / "megamoe/comm/symm.cuh").is_file()
    assert len(EVERY) == sum(op == "layout_probe" for op, *_ in shipped_kernels())
