"""Loading the kernels of a layer ahead of its calls, several compilations at once."""

import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ThreadPoolExecutor

from megamoe.kernels import jit

ARCH = "sm_90a"
KernelText = tuple[str, Hashable, Callable[[], str], str]  # op, config, make_source, entry: as jit.build takes them
_loaded: set[tuple[str, Hashable, int]] = set()  # op, config, device


def load_kernels(kernels: Iterable[KernelText], device: int) -> None:
    """Compile what the cache lacks and load all on `device`: launches then neither compile nor allocate."""
    missing = [kernel for kernel in kernels if (*kernel[:2], device) not in _loaded]
    with ThreadPoolExecutor(max(1, min(len(missing), os.cpu_count() or 1))) as pool:
        list(pool.map(lambda kernel: jit.fetch(kernel[0], kernel[2](), ARCH), missing))
    for op, config, make_source, entry in missing:
        jit.build(op, config, make_source, entry, device)
        _loaded.add((op, config, device))
