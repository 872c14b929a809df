"""`python -m megamoe.prewarm`: compile the shipped kernels into the cache ahead of their first use. Needs a compiler, no GPU."""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from tqdm import tqdm

from megamoe.env import env
from megamoe.errors import EngineUnavailableError
from megamoe.kernels import jit
from megamoe.kernels.compiler import CompileError, find_compiler
from megamoe.kernels.shipped import MODELS, shipped_kernels


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m megamoe.prewarm", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="whose kernels to compile (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled at once (default: %(default)s)")
    parser.add_argument("--arch", default="sm_90a", help="architecture to compile for (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"argument --jobs: must be at least 1, got {args.jobs}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Fill the cache and say what could not be compiled. Returns the exit code: 1 if a kernel failed or there is no compiler."""
    args = parse_args(argv)
    try:
        compiler = find_compiler()
    except EngineUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    kernels = shipped_kernels(tuple(args.model))
    failures = []
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(jit.fetch, op, make_source(), args.arch): f"{op} {config}" for op, config, make_source, _ in kernels}
        for future in tqdm(as_completed(running), total=len(running), desc=f"{compiler.name} {compiler.version}", unit="kernel"):
            if isinstance(future.exception(), CompileError):
                failures.append(f"{running[future]}: {future.exception()}")
            else:
                future.result()
    if jit.folder() != env.cache_dir:  # the warning has said why; what lives as long as this process helps nobody
        print(f"prewarm: {env.cache_dir} cannot be written, nothing was kept", file=sys.stderr)
        return 1
    print(*failures, f"{len(kernels) - len(failures)} of {len(kernels)} kernels for {args.arch} are in {env.cache_dir}", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
