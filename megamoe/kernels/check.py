"""`python -m megamoe.kernels.check`: compile every shipped kernel for sm_90a, without a GPU, and fail on what would make it slow or wrong.

Prints registers, stack and spills per kernel. Fails on a compiler error, on spills, and on the assembler's C75xx messages (wgmma serialised,
setmaxnreg ignored).
"""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from megamoe.comm.protocol import EVERY, pack
from megamoe.comm.budget import plan_dims
from megamoe.config import MoEConfig
from megamoe.kernels.compiler import CompileError, compile_cubin
from megamoe.kernels.layout_probe import probe_source

V4_PRO = {"hidden": 7168, "intermediate": 3072, "num_experts": 384, "num_topk": 6, "max_tokens_per_rank": 8192}


def shipped() -> dict[str, str]:
    """Name -> source of every kernel that is compiled at run time, in the configs that matter."""
    return {f"layout_probe, v4-pro over 4 ranks, {precision}": probe_source(pack(plan_dims(MoEConfig(precision=precision, **V4_PRO), 4)))
            for precision in EVERY}


def check(name: str, source: str) -> tuple[str, list[str]]:
    """Compile one kernel; return its line of the report and what is wrong with it."""
    begin = time.monotonic()
    try:
        cubin = compile_cubin(source)
    except CompileError as error:
        return f"{name}: does not compile", [str(error)]
    problems = list(cubin.warnings)
    if cubin.spill_bytes:
        problems.append(f"{cubin.spill_bytes} bytes spilled")
    line = f"{name}: {cubin.num_registers} registers, {cubin.stack_bytes} B stack, {len(cubin.code)} B, {time.monotonic() - begin:.1f} s"
    return line, problems


def main() -> int:
    sources = shipped()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(check, sources, sources.values()))
    num_bad = 0
    for line, problems in reports:
        num_bad += bool(problems)
        print("FAIL" if problems else "ok  ", line, *problems, sep="\n      " if problems else " ")
    print(f"{len(reports) - num_bad} passed, {num_bad} failed")
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
