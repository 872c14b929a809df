"""The emitted `struct Layout` means what the torch views mean: compared by a host compiler, compiled for sm_90a, and run on a GPU."""

import ctypes
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamoe.comm.protocol import EVERY, ArenaDims, Layout, emit_struct, pack
from megamoe.kernels.compiler import include_dir
from megamoe.kernels.layout_probe import corners, probe_source

INCLUDE = include_dir()
SMALL = ArenaDims(num_ranks=3, max_tokens=5, num_topk=2, num_experts=6, hidden=96, intermediate=32, precision="fp8xfp4", pool_rows=64)
LARGE = replace(SMALL, max_tokens=65536, num_topk=8, hidden=7168, intermediate=3072, pool_rows=524288)  # 13 GB
KERNEL = "_ZN7megamoe12layout_probeI5ProbeEEvNS_4SymmEj"
MAX_RANKS = 72

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Symm(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("offsets", ctypes.c_int64 * MAX_RANKS), ("rank", ctypes.c_uint32),
                ("num_ranks", ctypes.c_uint32)]


def host_program(layout: Layout) -> str:
    lines = ["#include <cstdio>", "#include <megamoe/comm/symm.cuh>", emit_struct(layout), "int main() {",
             "  megamoe::Symm symm{1ull << 40, {0, 1ll << 33, -(1ll << 35)}, 0, 3};",
             "  for (megamoe::uint32 peer = 0; peer < 3; ++peer) {"]
    lines += [f'    std::printf("{name} %p %p\\n", (void*){first}, (void*){last});' for name, first, last in corners(layout)]
    return "\n".join([*lines, "  }", "}", ""])


def compile_probe(layout: Layout, tmp_path: Path, arch: str) -> Path:
    source, cubin = tmp_path / "probe.cu", tmp_path / "probe.cubin"
    source.write_text(probe_source(layout))
    command = ["nvcc", "-cubin", f"-arch={arch}", "-std=c++17", "-Werror", "all-warnings", f"-I{INCLUDE}", "-o", cubin, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return cubin


@needs_gxx
@pytest.mark.parametrize("dims", [*(replace(SMALL, precision=precision) for precision in EVERY), LARGE], ids=str)
def test_host_compiler_computes_the_same_addresses(dims, tmp_path):
    layout = pack(dims)
    source, program = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text(host_program(layout))
    subprocess.run(["g++", "-std=c++17", "-O0", "-Wall", "-Werror", f"-I{INCLUDE}", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split("\n")[:-1]
    expected = []
    for base in (2**40, 2**40 + 2**33, 2**40 - 2**35):
        for name, place in layout.placements.items():
            first = base + place.offset
            expected.append(f"{name} {first:#x} {first + place.num_bytes - place.dtype.itemsize:#x}")
    assert printed == expected


@needs_nvcc
def test_compiles_for_hopper_without_a_call_left(tmp_path):
    cubin = compile_probe(pack(LARGE), tmp_path, "sm_90a")
    assert KERNEL.encode() in cubin.read_bytes()
    if shutil.which("cuobjdump"):
        sass = subprocess.run(["cuobjdump", "-sass", cubin], check=True, capture_output=True, text=True).stdout
        assert "ST.E" in sass and "CALL" not in sass


@needs_gpu
@needs_nvcc
@pytest.mark.parametrize("precision", EVERY)
def test_kernel_writes_where_views_read(precision, tmp_path):
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    layout = pack(replace(SMALL, precision=precision))
    major, minor = torch.cuda.get_device_capability()
    cubin = compile_probe(layout, tmp_path, f"sm_{major}{minor}" + ("a" if major >= 9 else ""))
    arenas = torch.zeros(2, layout.num_bytes, dtype=torch.uint8, device="cuda")
    symm = Symm(base=arenas[0].data_ptr(), rank=0, num_ranks=2)
    symm.offsets[1] = arenas[1].data_ptr() - arenas[0].data_ptr()

    def call(result):
        assert result[0] == driver.CUresult.CUDA_SUCCESS, result[0]
        return result[1] if len(result) > 1 else None

    module = call(driver.cuModuleLoadData(cubin.read_bytes()))
    kernel = call(driver.cuModuleGetFunction(module, KERNEL.encode()))
    peer = ctypes.c_uint32(1)
    params = (ctypes.c_void_p * 2)(ctypes.addressof(symm), ctypes.addressof(peer))
    call(driver.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, 0, ctypes.addressof(params), 0))
    torch.cuda.synchronize()

    expected = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    for i, (name, place) in enumerate(layout.placements.items()):
        view = layout.view(name, expected).view(-1)
        for element, value in ((0, 2 * i + 1), (math.prod(place.shape) - 1, 2 * i + 2)):
            if place.dtype == torch.float8_e4m3fn:
                view.view(torch.uint8)[element] = value
            elif place.dtype == torch.bfloat16:
                view.view(torch.int16)[element] = value
            else:
                view[element] = value
    assert torch.equal(arenas[1].cpu(), expected), "each corner in its place and nothing else touched"
    assert not arenas[0].any(), "the other arena is untouched"
