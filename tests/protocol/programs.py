"""Builds the C++ programs of this folder against the protocol's headers, or against changed copies of them, and runs them."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megamoe.comm.protocol import ArenaDims, emit_struct, pack
from megamoe.kernels.compiler import include_dir

HERE = Path(__file__).parent
# Rows of 4 words: fp32 rows and partials have the size of the integers that stand for them.
DIMS = ArenaDims(num_ranks=3, max_tokens=8, num_topk=3, num_experts=6, hidden=4, intermediate=6, precision="fp32", pool_rows=1)
WRONG, SCOPE, RACE, HANG = 1, 3, 66, -14  # exit codes; the last one is SIGALRM


@dataclass(frozen=True)
class Run:
    """How a program ended."""

    code: int
    output: str


def write_layout(folder: Path) -> None:
    """The generated header of the programs."""
    (folder / "layout.hpp").write_text("#pragma once\n\n#include <megamoe/comm/symm.cuh>\n\nnamespace protocol {\n\n"
                                       f"{emit_struct(pack(DIMS))}\n}}  // namespace protocol\n")


def build(name: str, folder: Path, *, sanitized: bool, headers: Path | None = None, sources: Path = HERE) -> Path:
    """Compile `name`.cpp; returns the program.

    Args:
        folder: holds layout.hpp and gets the program.
        sanitized: with ThreadSanitizer.
        headers: an include tree that takes the place of csrc/include.
        sources: takes the place of this folder.
    """
    program = folder / (name + ("_tsan" if sanitized else ""))
    flags = ["-fsanitize=thread"] if sanitized else []
    command = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra", "-pthread", *flags, f"-I{folder}", f"-I{headers or include_dir()}",
               str(sources / f"{name}.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
    return program


def can_sanitize(folder: Path) -> bool:
    """Whether programs with ThreadSanitizer can be built and run here."""
    source, program = folder / "nothing.cpp", folder / "nothing"
    source.write_text("int main() {}")
    built = subprocess.run(["g++", "-fsanitize=thread", str(source), "-o", str(program)], capture_output=True)
    return built.returncode == 0 and subprocess.run([str(program)], capture_output=True).returncode == 0


def run(program: Path, **arguments: int | str) -> Run:
    """Run a program with arguments name=value."""
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 report_thread_leaks=0"}
    command = [str(program), *(f"{name}={value}" for name, value in arguments.items())]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return Run(done.returncode, (done.stdout + done.stderr)[-6000:])
