"""`python -m megamoe.kernels.check`: compile every shipped kernel for sm_90a, without a GPU, and fail on what would make it slow or wrong.

Prints registers, stack, spills and machine instructions, these where cuobjdump is installed (CUDA toolkit or wheel). Fails on a compiler
error, spills, the assembler's C75xx messages (wgmma serialised, setmaxnreg ignored), register budgets that do not fit the launch, and main
loops that expand weights after they have waited for the tensor cores.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from megamoe.errors import EngineUnavailableError
from megamoe.kernels.compiler import CUOBJDUMP_WHEEL, CompileError, Cubin, compile_cubin, find_compiler, find_cuobjdump
from megamoe.kernels.shipped import ShippedKernel, shipped_kernels

ARCH = "sm_90a"
SM_REGISTERS = 65536
# Of the weight expansion in a main loop; what cannot overlap is the first block of a tile. The loop whose speed is known has 0.75.
MIN_OVERLAP = 0.5
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_WAIT = "WARPGROUP.DEPBAR"


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    operands: str


def disassemble(cuobjdump: str, code: bytes) -> list[Instruction]:
    """The machine code of a cubin that holds one kernel, in address order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        run = subprocess.run([cuobjdump, "-sass", file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"check-kernels: {cuobjdump} must read a cubin, got exit code {run.returncode}: {run.stderr.strip()}")
    return parse_sass(run.stdout)


def parse_sass(text: str) -> list[Instruction]:
    found = map(_INSTRUCTION.match, text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3].strip()) for m in found if m]


def main_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that multiply and wait: from the target of a backward branch to the branch."""
    loops = []
    for last, branch in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", branch.operands) if branch.opcode.startswith("BRA") else None
        if target and int(target[1], 16) <= branch.address:
            first = next(i for i, instruction in enumerate(code) if instruction.address >= int(target[1], 16))
            body = code[first : last + 1]
            opcodes = [instruction.opcode for instruction in body]
            if any(o.startswith("QGMMA") for o in opcodes) and any(o.startswith(_WAIT) for o in opcodes):
                loops.append((first, last))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [code[first : last + 1] for first, last in inner]


def permutes_of(loop: list[Instruction]) -> dict[int, bool]:
    """Address of every PRMT of a loop -> whether it runs while wgmma is in flight.

    It does if, following the loop round, the last event before it is a wgmma, or a wait that leaves one in flight.
    """
    busy, found = False, {}
    for instruction in loop + loop:  # the first turn finds the state in which a turn begins
        if instruction.opcode.startswith("QGMMA"):
            busy = True
        elif instruction.opcode.startswith(_WAIT):
            busy = not instruction.operands.endswith(", 0x0")
        elif instruction.opcode == "PRMT":
            found[instruction.address] = busy
    return found


def sass_report(code: list[Instruction], wants_register_budgets: bool) -> tuple[str, list[str]]:
    """Counts of one kernel, and what is wrong with its machine code."""
    count = Counter(instruction.opcode.split(".")[0] for instruction in code)
    permutes: dict[int, bool] = {}
    for loop in main_loops(code):
        for address, overlaps in permutes_of(loop).items():
            permutes[address] = permutes.get(address, False) or overlaps
    num_overlapped = sum(permutes.values())
    text = (f"{len(code)} instructions, {count['QGMMA']} wgmma, {count['PRMT']} PRMT, {num_overlapped} of {len(permutes)} in main loops "
            "before the wait")
    problems = []
    if num_overlapped < MIN_OVERLAP * len(permutes):
        problems.append(f"only {num_overlapped} of {len(permutes)} PRMT of the main loops run under wgmma, the others after {_WAIT}")
    if wants_register_budgets and not count["USETMAXREG"]:
        problems.append("no USETMAXREG, so the math warps do not get their registers")
    return text, problems


def budget_problems(config: object, cubin: Cubin) -> list[str]:
    """Whether the registers that a config hands to its warpgroups are there. Configs without budgets have nothing to check."""
    num_threads = getattr(config, "num_threads", None)
    if num_threads is None:
        return []
    launched = -(-cubin.num_registers // 8) * 8 * num_threads
    problems = [f"{launched} registers to launch {num_threads} threads, an SM has {SM_REGISTERS}"] if launched > SM_REGISTERS else []
    if hasattr(config, "math_registers"):
        wanted = 128 * config.math_registers * (num_threads // 128 - 1) + 128 * config.aux_registers
        if wanted > launched:
            problems.append(f"the warpgroups ask for {wanted} registers, the launch has {launched}: setmaxnreg would hang")
    return problems


def check(kernel: ShippedKernel, cuobjdump: str | None) -> tuple[str, list[str]]:
    """Compile one kernel; return its line of the report and what is wrong with it."""
    op, config, make_source, _ = kernel
    begin = time.monotonic()
    try:
        cubin = compile_cubin(make_source(), ARCH)
    except CompileError as error:
        return f"{op} {config}: does not compile", [str(error)]
    seconds = time.monotonic() - begin
    problems = [*cubin.warnings, *budget_problems(config, cubin)]
    if cubin.spill_bytes:
        problems.append(f"{cubin.spill_bytes} bytes spilled")
    line = f"{op} {config}: {cubin.num_registers} registers, {cubin.stack_bytes} B stack, {cubin.spill_bytes} B spilled, {seconds:.1f} s"
    if cuobjdump is not None:
        text, found = sass_report(disassemble(cuobjdump, cubin.code), hasattr(config, "math_registers"))
        line, problems = f"{line}; {text}", problems + found
    return line, problems


def main() -> int:
    """Check every shipped kernel, print one line for each. Returns the exit code."""
    try:
        find_compiler()
    except EngineUnavailableError as error:
        print(error)
        return 1
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        print(f"cuobjdump was not found: machine instructions are not checked; pip install {CUOBJDUMP_WHEEL} nvidia-cuda-nvdisasm")
    num_good = num_bad = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for line, problems in pool.map(lambda kernel: check(kernel, cuobjdump), shipped_kernels()):
            num_bad += bool(problems)
            num_good += not problems
            print("FAIL" if problems else "ok  ", line, *(f"\n      {problem}" for problem in problems), flush=True)
    print(f"{num_good} passed, {num_bad} failed")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
