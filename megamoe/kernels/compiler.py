"""CUDA C++ text -> cubin, with nvcc or with NVRTC. Knows where the headers are and which flags every kernel gets; knows no kernel.

nvcc is taken where it is installed; NVRTC comes with the wheels of a CUDA build of torch, needs no host compiler, and takes the same flags.
"""

import functools
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from megamoe.errors import EngineUnavailableError, check

COMPILERS = ("auto", "nvcc", "nvrtc")
# Both compilers read these alike. -v: the assembler reports registers, spills, and where it had to serialise wgmma.
FLAGS = ("--std=c++17", "--ptxas-options=-v")
NVRTC_WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
CUOBJDUMP_WHEEL = "nvidia-cuda-cuobjdump"

_PACKAGE = Path(__file__).parents[1]
_RESOURCE_LINE = re.compile(r"Used (\d+) registers")
_SPILL_LINE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class CompileError(RuntimeError):
    """The compiler refused a kernel; the text is the compiler's, with the source line, and names the file that was compiled."""


@dataclass(frozen=True)
class Compiler:
    """One compiler of this machine. `path` is nvcc's; None for NVRTC."""

    name: str
    version: str
    path: str | None


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel and what the assembler said about it."""

    code: bytes
    log: str
    num_registers: int
    stack_bytes: int
    spill_bytes: int

    @property
    def warnings(self) -> list[str]:
        """Lines of the log that say the assembler serialised wgmma or ignored setmaxnreg (C75xx)."""
        return [line for line in self.log.splitlines() if "C75" in line]


def include_dir() -> Path:
    """The CUDA headers: inside the wheel, or beside the package in a checkout."""
    inside = _PACKAGE / "csrc" / "include"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc" / "include"


def find_nvcc() -> str | None:
    """Path of nvcc from PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda; None if there is none."""
    return find_tool("nvcc")


def find_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit from PATH, CUDA_HOME, CUDA_PATH or /usr/local/cuda; None if there is none."""
    homes = [os.environ[home] for home in ("CUDA_HOME", "CUDA_PATH") if home in os.environ] + ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes)]
    return shutil.which(name, path=os.pathsep.join(folders))


def find_cuobjdump() -> str | None:
    """Path of cuobjdump: the CUDA toolkit's, else that of this Python's wheel, which runs the nvdisasm beside it; None if there is none."""
    path = find_tool("cuobjdump")
    if path is not None:
        return path
    try:
        files = metadata.files(CUOBJDUMP_WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "cuobjdump"), None)


def find_compiler(requested: str = "auto") -> Compiler:
    """The compiler asked for; "auto" takes nvcc where it is installed, else NVRTC.

    Raises:
        EngineUnavailableError: it is not installed; the message says what to install.
        ValueError: `requested` is not one of COMPILERS.
    """
    check(requested in COMPILERS, "kernels", "compiler", f"one of {COMPILERS}", repr(requested), "pick one of them")
    nvcc = None if requested == "nvrtc" else find_nvcc()
    if nvcc is not None:
        return Compiler("nvcc", _nvcc_version(nvcc), nvcc)
    reasons = ["nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda"] if requested != "nvrtc" else []
    if requested != "nvcc":
        try:
            return Compiler("nvrtc", _nvrtc_version(), None)
        except EngineUnavailableError as error:
            reasons.append(str(error))
    alternative = "" if requested == "nvcc" else " or cuda-bindings and nvidia-cuda-nvrtc"
    raise EngineUnavailableError(f"kernels: {'; '.join(reasons)}; install the CUDA toolkit (>= 12.8){alternative}")


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    return next((line.rsplit(",", 1)[-1].strip() for line in text.splitlines() if "release" in line), "unknown")


@functools.cache
def _nvrtc_version() -> str:
    """Version of bindings and library. Read from the wheels where they are: loading the library takes longer than loading a cubin."""
    try:
        bindings = metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError as error:
        raise EngineUnavailableError("NVRTC cannot be called because cuda-bindings is not installed") from error
    for wheel in NVRTC_WHEELS:
        try:
            return f"{metadata.version(wheel)} (bindings {bindings})"
        except metadata.PackageNotFoundError:
            continue
    nvrtc = _load_nvrtc()
    return f"{'.'.join(str(n) for n in _call(nvrtc, nvrtc.nvrtcVersion()))} (bindings {bindings})"


def compile_cubin(source: str, arch: str = "sm_90a", compiler: str = "auto", path: Path | None = None) -> Cubin:
    """Compile one translation unit for `arch`.

    Args:
        source: CUDA C++ text; finds the headers of `include_dir()`.
        arch: e.g. "sm_90a".
        compiler: one of COMPILERS.
        path: file in which the text is kept and which errors name. None: a temporary file, which stays behind only after an error.

    Raises:
        CompileError: the compiler refused it.
        EngineUnavailableError: the compiler is not installed.
    """
    chosen = find_compiler(compiler)
    folder = None
    if path is None:
        folder = tempfile.mkdtemp(prefix="megamoe-")
        path = Path(folder, "kernel.cu")
    path.write_text(source)
    code, log = _run_nvcc(chosen, path, arch) if chosen.name == "nvcc" else _run_nvrtc(path, source, arch)
    if code is None:
        raise CompileError(f"kernels: {chosen.name} {chosen.version} refused {path}:\n{log}")
    if folder is not None:
        shutil.rmtree(folder)
    return _describe(code, log)


def _flags(arch: str) -> list[str]:
    return [f"--gpu-architecture={arch}", *FLAGS, f"--include-path={include_dir()}"]


def _run_nvcc(compiler: Compiler, path: Path, arch: str) -> tuple[bytes | None, str]:
    with tempfile.TemporaryDirectory(prefix="megamoe-") as folder:
        cubin = Path(folder, "kernel.cubin")
        run = subprocess.run([compiler.path, "--cubin", *_flags(arch), "-o", cubin, path], capture_output=True, text=True)
        return (cubin.read_bytes() if run.returncode == 0 else None), run.stdout + run.stderr


def _load_nvrtc():
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # the library itself is found and loaded by the first call
    except (ImportError, RuntimeError) as error:
        raise EngineUnavailableError(f"kernels: NVRTC cannot be loaded ({str(error).strip()}); install nvidia-cuda-nvrtc") from error
    return nvrtc


def _call(nvrtc, result: tuple) -> tuple:
    if result[0] != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"kernels: NVRTC failed with {result[0].name}")
    return result[1:]


def _run_nvrtc(path: Path, source: str, arch: str) -> tuple[bytes | None, str]:
    nvrtc = _load_nvrtc()
    (program,) = _call(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), str(path).encode(), 0, [], []))
    try:
        flags = [flag.encode() for flag in _flags(arch)]
        status = nvrtc.nvrtcCompileProgram(program, len(flags), flags)[0]
        log = _read(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0\n ").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return None, log or status.name
        return _read(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc, program, get_size, get) -> bytes:
    (size,) = _call(nvrtc, get_size(program))
    data = bytearray(size)
    _call(nvrtc, get(program, data))
    return bytes(data)


def _describe(code: bytes, log: str) -> Cubin:
    registers = [int(n) for n in _RESOURCE_LINE.findall(log)]
    spills = [tuple(map(int, found)) for found in _SPILL_LINE.findall(log)]
    stack, spilled = max((s[0] for s in spills), default=0), max((s[1] + s[2] for s in spills), default=0)
    return Cubin(code, log, max(registers, default=0), stack, spilled)
