"""megamoe.kernels.launch and driver without a GPU: what reaches a stand-in for libcuda, layout of parameter blocks, refusals, host time."""

import ctypes
import re
import shutil
import subprocess
import time

import pytest
import torch

from megamoe.kernels import driver, launch
from megamoe.kernels.compiler import Cubin
from megamoe.kernels.driver import LaunchAttribute, LaunchConfig, TensorMap
from megamoe.kernels.launch import Kernel, params_struct, tensor_map

CUBIN = Cubin(b"code", "", 168, 0, 0)
Params = params_struct("Params", [("out", ctypes.c_void_p), ("x_maps", TensorMap * 2), ("rows", ctypes.c_uint32)])


def target(reference, kind):
    """What a byref() argument or a pointer points to."""
    return ctypes.cast(reference, ctypes.POINTER(kind)).contents


class FakeDriver:
    """As much of libcuda as is called; records launches and tensor maps, and refuses with `status`."""

    def __init__(self):
        self.status, self.launches, self.maps, self.attributes = 0, [], [], []
        self.optin, self.static = 232448, 1024

    def __getattr__(self, name):
        assert name.startswith("cu"), name
        return lambda *args: 0

    def cuGetErrorName(self, status, name):
        target(name, ctypes.c_char_p).value = b"CUDA_ERROR_INVALID_VALUE"

    def cuGetErrorString(self, status, text):
        target(text, ctypes.c_char_p).value = b"invalid argument"

    def cuDeviceGetAttribute(self, value, attribute, device):
        target(value, ctypes.c_int).value = {97: self.optin}[attribute]
        return 0

    def cuKernelGetAttribute(self, value, attribute, kernel, device):
        target(value, ctypes.c_int).value = {1: self.static}[attribute]
        return 0

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.attributes.append((attribute, value))
        return 0

    def cuLaunchKernelEx(self, config, function, params, extra):
        told = target(config, LaunchConfig)
        attributes = [(a.id, tuple(a.value.cluster) if a.id == driver.CLUSTER_DIMENSION else a.value.flag)
                      for a in (told.attributes[i] for i in range(told.num_attributes))]
        address = target(params, ctypes.c_void_p).value
        self.launches.append((tuple(told.grid), tuple(told.block), told.smem_bytes, told.stream, attributes, address, extra))
        return self.status

    def cuTensorMapEncodeTiled(self, tensor_map, *args):
        assert ctypes.addressof(target(tensor_map, TensorMap)) % 64 == 0
        dtype, rank, address, dims, strides, box, steps, interleave, swizzle, promotion, fill = args
        sizes = tuple(dims), tuple(strides), tuple(box), tuple(steps)
        self.maps.append((dtype, rank, address.value, *sizes, interleave, swizzle, promotion, fill))
        target(tensor_map, TensorMap).opaque[0] = len(self.maps)
        return self.status


@pytest.fixture
def fake(monkeypatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(driver, "library", lambda: fake)
    launch._tensor_map.cache_clear()
    yield fake
    launch._tensor_map.cache_clear()


def test_a_kernel_may_use_all_shared_memory_that_its_static_part_leaves(fake):
    kernel = Kernel("op", CUBIN, "entry", 3)
    assert fake.attributes == [(8, 231424)]
    assert repr(kernel) == "Kernel(op, cuda:3, 168 registers, up to 231424 B of shared memory)"


def test_what_a_launch_passes(fake):
    kernel, params = Kernel("op", CUBIN, "entry", 0), Params.allocate()
    kernel.launch(132, 384, 200000, params, 0x7F0012345678)
    kernel.launch(132, 384, 200000, params, 0, cluster=2, pdl=True, cooperative=True)
    address = ctypes.addressof(params)
    assert fake.launches == [
        ((132, 1, 1), (384, 1, 1), 200000, 0x7F0012345678, [], address, None),
        ((132, 1, 1), (384, 1, 1), 200000, None, [(4, (2, 1, 1)), (6, 1), (2, 1)], address, None)]


def test_structs_have_the_layout_of_cuda_h():
    offsets = LaunchConfig.stream.offset, LaunchConfig.attributes.offset, LaunchConfig.num_attributes.offset
    assert (*offsets, ctypes.sizeof(LaunchConfig)) == (32, 40, 48, 56)
    assert (ctypes.sizeof(LaunchAttribute), LaunchAttribute.value.offset) == (72, 8)


def test_launch_shapes_are_bounded(fake):
    kernel, params = Kernel("op", CUBIN, "entry", 0), Params.allocate()
    for grid in range(1, 3000):
        kernel.launch(grid, 128, 0, params, 0)
    assert len(kernel._configs) <= 1024 and [shape[0][0] for shape in fake.launches] == list(range(1, 3000))


def test_a_refused_launch_says_what_was_asked(fake):
    kernel = Kernel("op", CUBIN, "entry", 0)
    fake.status = 1
    message = ("CUDA driver: launching op with grid 1, block 2048, cluster 1, 0 B of shared memory failed with "
               "CUDA_ERROR_INVALID_VALUE (1): invalid argument")
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        kernel.launch(1, 2048, 0, Params.allocate(), 0)


def test_host_time_of_a_launch(fake):
    """Everything but the driver, with a cheap C function in its place: 1 us on an idle core."""
    kernel, params = Kernel("op", CUBIN, "entry", 0), Params.allocate()
    kernel._call, kernel._function = ctypes.CDLL(None).sched_yield, ctypes.c_void_p(1)
    times = []
    for _ in range(2000):
        begin = time.perf_counter_ns()
        kernel.launch(132, 384, 200000, params, 0x7F0012345678, pdl=True)
        times.append((time.perf_counter_ns() - begin) / 1e3)
    median = sorted(times)[1000]
    print(f"Kernel.launch without the driver: {median:.2f} us")
    assert median <= 12


def test_layout_of_a_parameter_block():
    assert (Params.out.offset, Params.x_maps.offset, Params.rows.offset, ctypes.sizeof(Params), Params.alignment) == (0, 64, 320, 384, 64)
    for _ in range(20):
        block = Params.allocate(rows=7)
        assert ctypes.addressof(block) % 64 == 0 and block.rows == 7 and block.out is None
    plain = params_struct("Plain", [("a", ctypes.c_uint8), ("b", ctypes.c_float), ("c", ctypes.c_uint8)])
    assert (plain.b.offset, plain.c.offset, ctypes.sizeof(plain), plain.alignment) == (4, 8, 12, 4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_layout_of_a_parameter_block_in_cpp(tmp_path):
    nested = params_struct("Nested", [("a", ctypes.c_uint8), ("map", TensorMap), ("b", ctypes.c_uint16)])
    outer = params_struct("Outer", [("n", ctypes.c_uint32), ("nested", nested * 2), ("p", ctypes.c_void_p), ("c", ctypes.c_uint8)])
    source = tmp_path / "layout.cpp"
    claims = [f"offsetof(Outer, {name}) == {getattr(outer, name).offset}" for name in ("n", "nested", "p", "c")]
    claims += [f"offsetof(Nested, {name}) == {getattr(nested, name).offset}" for name in ("a", "map", "b")]
    claims += [f"sizeof(Outer) == {ctypes.sizeof(outer)}", f"alignof(Outer) == {outer.alignment}"]
    source.write_text("#include <cstddef>\nstruct alignas(64) Map { unsigned long long opaque[16]; };\n"
                      "struct Nested { unsigned char a; Map map; unsigned short b; };\n"
                      "struct Outer { unsigned n; Nested nested[2]; void* p; unsigned char c; };\n"
                      + "".join(f"static_assert({claim});\n" for claim in claims))
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", source], check=True)


def aligned(rows: int, cols: int) -> torch.Tensor:
    return torch.zeros(rows, cols, dtype=torch.uint8)


def test_what_a_tensor_map_says(fake):
    x = aligned(100, 7168)[:, :2880].view(torch.float8_e4m3fn)
    found = tensor_map(x, (64, 128), swizzle_bytes=128, l2_bytes=256)
    # UINT8, 2-D, columns first, row stride in bytes, 128-byte swizzle, L2 promotion 256 B, zeros outside
    assert fake.maps == [(0, 2, x.data_ptr(), (2880, 100), (7168,), (128, 64), (1, 1), 0, 3, 3, 0)]
    assert bytes(found) == bytes([1] + [0] * 127)
    block = Params.allocate()
    block.x_maps[1] = found
    assert bytes(block)[192:320] == bytes(found)


def test_a_tensor_map_of_words(fake):
    x = torch.zeros(3, 2, 8, 136, dtype=torch.int64)
    tensor_map(x[1:], (1, 4, 4, 136))
    # UINT64, 4-D, the last dimension first, strides in bytes
    assert fake.maps == [(4, 4, x[1:].data_ptr(), (136, 8, 2, 2), (1088, 8704, 17408), (136, 4, 4, 1), (1, 1, 1, 1), 0, 0, 0, 0)]


def test_tensor_maps_are_cached_by_what_they_describe(fake):
    x = aligned(64, 256)
    first = tensor_map(x, (64, 128))
    assert tensor_map(x[:, :], (64, 128)) is first and len(fake.maps) == 1
    variants = [tensor_map(x[:32], (64, 128)), tensor_map(x[32:], (64, 128)), tensor_map(x, (32, 128)), tensor_map(x, (64, 64)),
                tensor_map(x, (64, 128), swizzle_bytes=128), tensor_map(x.view(128, 128), (64, 128)), tensor_map(x[:, :128], (64, 128)),
                tensor_map(x, (64, 128), l2_bytes=64), tensor_map(x.view(torch.int16), (64, 128))]
    assert len({id(v) for v in [first, *variants]}) == 10 and len(fake.maps) == 10


STRIDES = "strides must be multiples of 16 bytes, the last 1 element"
BOX = "a side of 1..256 per dimension, the last a multiple of 16 bytes up to"


@pytest.mark.parametrize("tensor, box, message", [
    (aligned(0, 128), (8, 128), "shape must be 2 to 5 dimensions, none zero, got [0, 128]; launch nothing for an empty tensor"),
    (aligned(8, 128)[0], (128,), "shape must be 2 to 5 dimensions, none zero, got [128]; launch nothing for an empty tensor"),
    (aligned(128, 8).T, (8, 128), f"{STRIDES}, got (1, 8); call .contiguous() or pad the rows"),
    (aligned(8, 120), (8, 64), f"{STRIDES}, got (120, 1); call .contiguous() or pad the rows"),
    (aligned(8, 120).short(), (8, 60), f"box must be {BOX} 128 bytes, got [8, 60]; copy in several boxes"),
    (aligned(8, 128), (257, 128), f"box must be {BOX} 128 bytes, got [257, 128]; copy in several boxes"),
    (aligned(8, 256), (8, 256), f"box must be {BOX} 128 bytes, got [8, 256]; copy in several boxes"),
    (aligned(8, 256), (8, 24), f"box must be {BOX} 128 bytes, got [8, 24]; copy in several boxes"),
    (aligned(8, 256), (1, 8, 32), f"box must be {BOX} 128 bytes, got [1, 8, 32]; copy in several boxes")])
def test_tensors_without_a_map_are_refused(fake, tensor, box, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'tensor_map: {message}')}$"):
        tensor_map(tensor, box, swizzle_bytes=128)
    assert fake.maps == []


def test_other_refusals(fake):
    x = aligned(9, 128)
    message = f"tensor_map: data_ptr must be a multiple of 16, got {x.data_ptr() + 8}; do not start the tensor inside a 16-byte block"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tensor_map(x.flatten()[8:1032].view(8, 128), (8, 128))
    for option, given, legal in (("swizzle_bytes", 16, (0, 32, 64, 128)), ("l2_bytes", 32, (0, 64, 128, 256))):
        message = f"tensor_map: {option} must be one of {legal}, got {given}; pick one of them"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            tensor_map(x, (8, 16), **{option: given})
    message = f"tensor_map: box must be {BOX} 256 elements, got [8, 272]; copy in several boxes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tensor_map(aligned(8, 512), (8, 272))
    fake.status = 1
    message = ("CUDA driver: describing a tensor of [9, 128] x 1 bytes, box [8, 128] failed with CUDA_ERROR_INVALID_VALUE (1): "
               "invalid argument")
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        tensor_map(x, (8, 128))
