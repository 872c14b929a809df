"""megamoe.kernels.check: what it reads from machine code, and that each thing it must refuse is refused."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamoe.kernels import check, compiler
from megamoe.kernels.check import Instruction, budget_problems, main_loops, parse_sass, permutes_of, sass_report
from megamoe.kernels.compiler import Cubin

SASS = """\
        code for sm_90a
                Function : k
        .headerflags    @"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;    /* 0x000000f0000079c8 */
        /*0020*/              @!P1 BRA 0x20 ;                                  /* 0x0000000400f89947 */
        /*0030*/                   PRMT R4, R5, R6, R7 ;                       /* 0x0 */
        /*0040*/                   QGMMA.64x64x32.F32.E5M2.E4M3 R24, R4, gdesc[UR4], R24 ; /* 0x0 */
        /*0050*/                   PRMT R5, R5, R6, R7 ;                       /* 0x0 */
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;             /* 0x0 */
        /*0070*/              @!UP0 BRA 0x30 ;                                 /* 0x0 */
        /*0080*/                   EXIT ;                                      /* 0x0 */
"""


def code(*opcodes: str) -> list[Instruction]:
    """A loop over these instructions; a number is a wait that leaves so many in flight."""
    def instruction(i: int, opcode: str) -> Instruction:
        wait = opcode.isdigit()
        return Instruction(16 * i, "WARPGROUP.DEPBAR.LE" if wait else opcode, f"gsb0, 0x{opcode}" if wait else "R0")

    return [*(instruction(i, opcode) for i, opcode in enumerate(opcodes)), Instruction(16 * len(opcodes), "BRA", "0x0")]


def test_reads_what_the_disassembler_prints():
    found = parse_sass(SASS)
    assert [i.address for i in found] == list(range(0, 0x90, 0x10))
    assert found[1] == Instruction(0x10, "USETMAXREG.TRY_ALLOC.CTAPOOL", "UP0, 0xf0")
    assert [[i.address for i in loop] for loop in main_loops(found)] == [[0x30, 0x40, 0x50, 0x60, 0x70]]
    assert sass_report(found, True) == ("9 instructions, 1 wgmma, 2 PRMT, 1 of 2 in main loops before the wait", [])


@pytest.mark.parametrize("opcodes, overlaps", [
    (("QGMMA.X", "PRMT", "0"), [True]), (("QGMMA.X", "0", "PRMT"), [False]),
    (("PRMT", "QGMMA.X", "0"), [False]), (("PRMT", "0", "QGMMA.X"), [True]),
    (("QGMMA.X", "1", "PRMT", "0", "PRMT"), [True, False])])
def test_a_permute_overlaps_while_something_is_in_flight(opcodes, overlaps):
    assert list(permutes_of(code(*opcodes)).values()) == overlaps


def test_the_innermost_loop_counts():
    inner = code("QGMMA.X", "PRMT", "0")
    outer = [*inner, Instruction(64, "PRMT", "R0"), Instruction(80, "BRA", "0x0")]
    assert main_loops(outer) == [inner]


def test_expansion_that_sank_past_the_wait_is_refused():
    _, problems = sass_report(code("QGMMA.X", "0", "PRMT", "PRMT", "PRMT"), False)
    assert problems == ["only 0 of 3 PRMT of the main loops run under wgmma, the others after WARPGROUP.DEPBAR"]


def test_missing_register_budgets_are_refused():
    assert sass_report(code("QGMMA.X", "PRMT", "0"), True)[1] == ["no USETMAXREG, so the math warps do not get their registers"]


@pytest.mark.parametrize("num_registers, math, aux, problems", [
    (168, 240, 24, []), (168, 240, 32, ["the warpgroups ask for 65536 registers, the launch has 64512: setmaxnreg would hang"]),
    (176, 240, 24, ["67584 registers to launch 384 threads, an SM has 65536"])])
def test_budgets(num_registers, math, aux, problems):
    config = SimpleNamespace(num_threads=384, math_registers=math, aux_registers=aux)
    assert budget_problems(config, Cubin(b"", "", num_registers, 0, 0)) == problems
    assert budget_problems(SimpleNamespace(), Cubin(b"", "", 255, 0, 0)) == []


def test_cuobjdump_of_the_toolkit_comes_first(tmp_path, monkeypatch):
    tool = program(tmp_path / "bin" / "cuobjdump", "exit 0")
    monkeypatch.setattr(compiler.metadata, "files", lambda wheel: pytest.fail(f"looked for {wheel}"))
    monkeypatch.setenv("PATH", str(tool.parent))
    assert compiler.find_cuobjdump() == str(tool)


def test_cuobjdump_of_the_wheel(tmp_path, monkeypatch):
    """A wheel as pip installs it: found through its list of files, wherever the interpreter's packages lie."""
    tool = program(tmp_path / "nvidia" / "cu13" / "bin" / "cuobjdump", "exit 0")
    info = tmp_path / "nvidia_cuda_cuobjdump-13.5.37.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-cuobjdump\nVersion: 13.5.37\n")
    (info / "RECORD").write_text("nvidia_cuda_cuobjdump-13.5.37.dist-info/METADATA,,\nnvidia/cu13/bin/cuobjdump,,\n")
    monkeypatch.setattr(compiler, "find_tool", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert compiler.find_cuobjdump() == str(tool)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty")])
    assert compiler.find_cuobjdump() is None


def test_a_disassembler_that_fails_says_why(tmp_path):
    tool = program(tmp_path / "cuobjdump", "echo no nvdisasm >&2; exit 3")
    message = f"check-kernels: {tool} must read a cubin, got exit code 3: no nvdisasm"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        check.disassemble(str(tool), b"")


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def shipped_as(text: str, config: object = "config"):
    return lambda: [("op", config, lambda: text, "k")]


@pytest.mark.skipif(compiler.find_nvcc() is None, reason="nvcc is not installed")
def test_reports_and_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(check, "find_cuobjdump", lambda: None)
    monkeypatch.setattr(check, "shipped_kernels", shipped_as('extern "C" __global__ void k(int* x) { *x = 1; }'))
    assert check.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("cuobjdump was not found: machine instructions are not checked; pip install nvidia-cuda-cuobjdump "
                        "nvidia-cuda-nvdisasm")
    assert lines[-1] == "1 passed, 0 failed"
    assert lines[1].startswith("ok   op config: ") and " registers, 0 B stack, 0 B spilled, " in lines[1]
    monkeypatch.setattr(check, "shipped_kernels", shipped_as("no C++"))
    assert check.main() == 1
    output = capsys.readouterr().out
    assert "FAIL op config: does not compile" in output and "error: " in output and output.endswith("0 passed, 1 failed\n")
    loads, stores = "".join(f"float v{i} = x[{i} * n];" for i in range(200)), "".join(f"x[{i}] = v{199 - i};" for i in range(200))
    spilling = f'extern "C" __global__ void __launch_bounds__(1024, 2) k(float* x, int n) {{ {loads} __syncthreads(); {stores} }}'
    monkeypatch.setattr(check, "shipped_kernels", shipped_as(spilling))
    assert check.main() == 1 and " bytes spilled\n" in capsys.readouterr().out


@pytest.mark.skipif(compiler.find_nvcc() is None or compiler.find_cuobjdump() is None, reason="nvcc or cuobjdump is not installed")
def test_machine_code_of_a_real_kernel(monkeypatch, capsys):
    text = 'extern "C" __global__ void k(int* x, int n) { for (int i = 0; i < n; ++i) x[i] = __byte_perm(x[i], n, 0x2143); }'
    monkeypatch.setattr(check, "shipped_kernels", shipped_as(text, SimpleNamespace(num_threads=128, math_registers=24, aux_registers=24)))
    assert check.main() == 1
    output = capsys.readouterr().out
    assert " instructions, 0 wgmma, " in output and "no USETMAXREG, so the math warps do not get their registers" in output
