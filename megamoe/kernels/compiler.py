"""CUDA C++ text -> cubin with nvcc. Knows where the headers are and which flags every kernel gets; knows no kernel."""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from megamoe.errors import EngineUnavailableError

_PACKAGE = Path(__file__).parents[1]
_RESOURCE_LINE = re.compile(r"Used (\d+) registers")
_SPILL_LINE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


class CompileError(RuntimeError):
    """The compiler refused a kernel; the text is the compiler's, with the source line."""


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
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def compile_cubin(source: str, arch: str = "sm_90a") -> Cubin:
    """Compile one translation unit for `arch`.

    Raises:
        CompileError: the compiler refused it; carries the compiler's text.
        EngineUnavailableError: there is no nvcc.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise EngineUnavailableError("kernels: nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda; install the CUDA toolkit (>= 12.8)")
    with tempfile.TemporaryDirectory(prefix="megamoe-") as folder:
        text, cubin = Path(folder, "kernel.cu"), Path(folder, "kernel.cubin")
        text.write_text(source)
        virtual = arch.replace("sm_", "compute_")
        command = [nvcc, "-cubin", f"-gencode=arch={virtual},code={arch}", "-std=c++17", "-O3", "-Xptxas", "-v", "-I", include_dir(),
                   "-o", cubin, text]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise CompileError(run.stderr)
        return _describe(cubin.read_bytes(), run.stderr)


def _describe(code: bytes, log: str) -> Cubin:
    registers = [int(n) for n in _RESOURCE_LINE.findall(log)]
    spills = [tuple(map(int, found)) for found in _SPILL_LINE.findall(log)]
    return Cubin(code, log, max(registers, default=0), max((s[0] for s in spills), default=0), max((s[1] + s[2] for s in spills), default=0))
