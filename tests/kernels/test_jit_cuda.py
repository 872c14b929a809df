"""On a GPU: build and launch, parameters by value, tensor maps, CUDA graphs, launch attributes, time of a launch and of a cached load."""

import ctypes
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megamoe.env import Env
from megamoe.kernels import compiler, jit
from megamoe.kernels.driver import TensorMap
from megamoe.kernels.launch import params_struct, tensor_map

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_hopper = pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9, reason="needs sm_90 or later")

ADD = """\
struct Params { unsigned* out; unsigned value; unsigned long long offset; };
extern "C" __global__ void add(const __grid_constant__ Params p) {
  extern __shared__ unsigned smem[];
  smem[threadIdx.x] = p.value;
  __syncthreads();
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // with pdl, the sums of the launch before may still be on their way
#endif
  p.out[p.offset + blockIdx.x * blockDim.x + threadIdx.x] += smem[blockDim.x - 1 - threadIdx.x];
}
"""
COPY = """\
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
struct Params { unsigned char* out; TensorMap map; int row, col; };
extern "C" __global__ void copy_box(const __grid_constant__ Params p) {  // one box of 8 x 16, without swizzle
  __shared__ alignas(128) unsigned char box[128];
  __shared__ alignas(8) unsigned long long barrier;
  const unsigned to = __cvta_generic_to_shared(box), full = __cvta_generic_to_shared(&barrier);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(full));
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 128;" ::"r"(full) : "memory");
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(&p.map), "r"(p.col), "r"(p.row), "r"(full) : "memory");
  }
  __syncthreads();
  unsigned done = 0;
  while (!done)
    asm volatile("{.reg .pred q; mbarrier.try_wait.parity.shared.b64 q, [%1], 0; selp.u32 %0, 1, 0, q;}"
                 : "=r"(done) : "r"(full) : "memory");
  p.out[threadIdx.x] = box[threadIdx.x];
}
"""
RANK = """\
struct Params { unsigned* out; };
extern "C" __global__ void cluster_rank(const __grid_constant__ Params p) {
  unsigned rank, size;
  asm("mov.u32 %0, %%cluster_ctarank; mov.u32 %1, %%cluster_nctarank;" : "=r"(rank), "=r"(size));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x == 0) p.out[blockIdx.x] += 10 * size + rank;
}
"""
AddParams = params_struct("AddParams", [("out", ctypes.c_void_p), ("value", ctypes.c_uint32), ("offset", ctypes.c_uint64)])
CopyParams = params_struct("CopyParams", [("out", ctypes.c_void_p), ("map", TensorMap), ("row", ctypes.c_int), ("col", ctypes.c_int)])
RankParams = params_struct("RankParams", [("out", ctypes.c_void_p)])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "env", Env(cache_dir=tmp_path))
    monkeypatch.setattr(jit, "_kernels", {})
    return tmp_path


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def build_add():
    return jit.build("add", None, lambda: ADD, "add")


def zeros(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("name", ["nvcc", "nvrtc"])
def test_build_and_launch(name):
    if name == "nvcc" and compiler.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    if name == "nvrtc" and importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed")
    jit.use_compiler(name)
    try:
        kernel = build_add()
    finally:
        jit.use_compiler("auto")
    out, params = zeros(1024 + 64), AddParams.allocate()
    params.out, params.value, params.offset = out.data_ptr(), 5, 64
    for _ in range(3):
        kernel.launch(8, 128, kernel.max_smem_bytes, params, stream())
        params.value += 1  # the launch before has its own copy
    torch.cuda.synchronize()
    assert not out[:64].any() and (out[64:] == 5 + 6 + 7).all()


def test_every_device_has_its_own():
    kernels = {device: jit.build("add", None, lambda: ADD, "add", device) for device in range(torch.cuda.device_count())}
    for device, kernel in kernels.items():
        with torch.cuda.device(device):
            out = zeros(128)
            kernel.launch(1, 128, 512, AddParams.allocate(out=out.data_ptr(), value=device + 1), stream())
            assert (out == device + 1).all()


def test_first_launch_inside_a_graph():
    kernel, out = build_add(), zeros(256)
    params = AddParams.allocate(out=out.data_ptr(), value=3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(2, 128, 512, params, stream())
        kernel.launch(2, 128, 512, params, stream(), pdl=True)
    params.value = 1000  # captured by value
    torch.cuda.synchronize()
    assert not out.any()
    for _ in range(4):
        graph.replay()
    torch.cuda.synchronize()
    assert (out == 4 * 2 * 3).all()


@needs_hopper
def test_attributes():
    kernel, out = jit.build("cluster_rank", None, lambda: RANK, "cluster_rank"), zeros(8)
    params = RankParams.allocate(out=out.data_ptr())
    for cluster, expected in ((1, [10] * 8), (2, [20, 21] * 4), (4, [40, 41, 42, 43] * 2)):
        for options in ({}, {"pdl": True}, {"cooperative": True}):
            out.zero_()
            for _ in range(5):
                kernel.launch(8, 32, 0, params, stream(), cluster=cluster, **options)
            assert out.tolist() == [5 * value for value in expected], (cluster, options)


def test_a_grid_that_does_not_fit_is_refused_when_cooperative():
    kernel, params = build_add(), AddParams.allocate()
    shape = f"grid 100000, block 1024, cluster 1, {kernel.max_smem_bytes} B of shared memory"
    with pytest.raises(RuntimeError, match=f"^CUDA driver: launching add with {re.escape(shape)} failed with CUDA_ERROR_"):
        kernel.launch(100000, 1024, kernel.max_smem_bytes, params, stream(), cooperative=True)
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_INVALID_VALUE \(1\): invalid argument$"):
        kernel.launch(1, 128, kernel.max_smem_bytes + 1, params, stream())
    torch.cuda.synchronize()


@needs_hopper
def test_tensor_map():
    kernel = jit.build("copy_box", None, lambda: COPY, "copy_box")
    x = torch.randint(1, 256, (20, 48), dtype=torch.uint8, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    padded = torch.zeros(32, 80, dtype=torch.uint8)
    padded[:20, :40] = x[:, :40].cpu()
    out = torch.full((128,), 255, dtype=torch.uint8, device="cuda")
    box = tensor_map(x[:, :40], (8, 16))
    for row, col in ((0, 0), (3, 16), (16, 32), (24, 0)):
        kernel.launch(1, 128, 0, CopyParams.allocate(out=out.data_ptr(), map=box, row=row, col=col), stream())
        assert torch.equal(out.cpu().view(8, 16), padded[row : row + 8, col : col + 16]), "zeros outside"


def test_host_time_of_a_launch():
    kernel, out = build_add(), zeros(128)
    params, on = AddParams.allocate(out=out.data_ptr(), value=1), stream()
    times = []
    for i in range(2000):
        if i % 100 == 0:
            torch.cuda.synchronize()  # or the queue fills and launches wait for the GPU
        begin = time.perf_counter_ns()
        kernel.launch(1, 128, 512, params, on, pdl=True)
        times.append((time.perf_counter_ns() - begin) / 1e3)
    median = statistics.median(times)
    print(f"Kernel.launch: median {median:.2f} us")
    assert (out == 2000).all()
    assert median <= 12, f"{median:.2f} us"


def test_a_cached_load_in_a_fresh_process(cache):
    program = f"""
import time, torch
from megamoe.kernels import jit
torch.zeros(1, device="cuda")
begin = time.perf_counter()
jit.build("add", None, lambda: {ADD!r}, "add")
print((time.perf_counter() - begin) * 1e3)
"""
    def run() -> float:
        ran = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True,
                             env=os.environ | {"MEGAMOE_CACHE_DIR": str(cache)})
        assert ran.returncode == 0, ran.stderr
        return float(ran.stdout)

    cold, cached = run(), min(run() for _ in range(3))
    print(f"cold build {cold:.0f} ms, cached load {cached:.1f} ms")
    assert len(list(cache.glob("*.cubin"))) == 1
    assert cold <= 15000 and cached <= 50
