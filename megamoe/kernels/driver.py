"""The CUDA driver as far as kernels need it, through ctypes: structs, error text, loading a cubin, encoding a tensor map.

ctypes on libcuda itself: a launch passes prebuilt structs by address, which costs 1 us, and no package is needed.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megamoe.errors import EngineUnavailableError

# Values of cuda.h.
_SHARED_SIZE_BYTES, _MAX_DYNAMIC_SHARED_SIZE_BYTES = 1, 8  # CUfunction_attribute
_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # CUdevice_attribute
COOPERATIVE, CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 2, 4, 6  # CUlaunchAttributeID
_UNSIGNED = {1: 0, 2: 1, 4: 2, 8: 4}  # bytes -> CUtensorMapDataType
_NO_INTERLEAVE, _ZERO_FILL = 0, 0  # CUtensorMap*
L2_PROMOTIONS = {0: 0, 64: 1, 128: 2, 256: 3}  # bytes -> CUtensorMapL2promotion
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes -> CUtensorMapSwizzle


class TensorMap(ctypes.Structure):
    """CUtensorMap: 128 opaque bytes, aligned to 64 in device code (see launch.params_struct)."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]
    alignment = 64


class _AttributeValue(ctypes.Union):
    _fields_ = [("cluster", ctypes.c_uint * 3), ("flag", ctypes.c_int), ("pad", ctypes.c_char * 64)]


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", _AttributeValue)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("smem_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(LaunchAttribute)), ("num_attributes", ctypes.c_uint)]


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda. Raises EngineUnavailableError where there is no NVIDIA driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        message = "kernels: the CUDA driver (libcuda.so.1) was not found; run on a machine with an NVIDIA driver"
        raise EngineUnavailableError(message) from error
    return cuda


def check(status: int, what: str) -> None:
    """Raise RuntimeError with the driver's name and text unless `status` is success."""
    if status != 0:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        library().cuGetErrorName(status, ctypes.byref(name))
        library().cuGetErrorString(status, ctypes.byref(text))
        told = f"{(name.value or b'an unknown error').decode()} ({status}): {(text.value or b'no text').decode()}"
        raise RuntimeError(f"CUDA driver: {what} failed with {told}")


@dataclass(frozen=True)
class Function:
    """A loaded kernel of one device: what a launch takes, and the shared memory it may ask for."""

    handle: ctypes.c_void_p
    max_dynamic_smem_bytes: int


@contextlib.contextmanager
def _primary_context(device: int) -> Iterator[ctypes.c_int]:
    """Make the context that torch uses on `device` current, and create it if this is its first use. Yields the driver's device."""
    cuda = library()
    ordinal, context = ctypes.c_int(), ctypes.c_void_p()
    check(cuda.cuInit(0), "initialising")
    check(cuda.cuDeviceGet(ctypes.byref(ordinal), device), f"opening device {device}")
    # Retained for the life of the process, as the kernels loaded into it are.
    check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal), f"creating the context of device {device}")
    check(cuda.cuCtxPushCurrent_v2(context), f"entering the context of device {device}")
    try:
        yield ordinal
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(context))


def load(code: bytes, entry: str, device: int) -> Function:
    """Load `entry` of a cubin and allow it all shared memory of `device`.

    The code is made resident here, so that a first launch may be captured into a CUDA graph. It stays loaded for the life of the process.
    """
    cuda = library()
    lib, kernel, function, optin, static = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    with _primary_context(device) as ordinal:
        check(cuda.cuLibraryLoadData(ctypes.byref(lib), code, None, None, 0, None, None, 0), f"loading {entry}")
        check(cuda.cuLibraryGetKernel(ctypes.byref(kernel), lib, entry.encode()), f"finding {entry}")
        check(cuda.cuDeviceGetAttribute(ctypes.byref(optin), _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, ordinal), "reading the shared memory size")
        check(cuda.cuKernelGetAttribute(ctypes.byref(static), _SHARED_SIZE_BYTES, kernel, ordinal), f"reading the shared memory of {entry}")
        dynamic = optin.value - static.value
        allow = cuda.cuKernelSetAttribute(_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic, kernel, ordinal)
        check(allow, f"allowing {entry} {dynamic} B of shared memory")
        check(cuda.cuKernelGetFunction(ctypes.byref(function), kernel), f"making {entry} resident on device {device}")
    return Function(function, dynamic)


def encode_tensor_map(address: int, element_bytes: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int],
                      swizzle_bytes: int, l2_bytes: int) -> TensorMap:
    """A tiled map; what a box reads outside is zero. Sizes, box (elements) and strides (bytes) outermost first; the last has no stride."""
    # The driver wants the map at a multiple of 64 bytes, which ctypes does not promise.
    buffer = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + TensorMap.alignment)
    aligned = TensorMap.from_buffer(buffer, -ctypes.addressof(buffer) % TensorMap.alignment)
    rank = len(sizes)
    status = library().cuTensorMapEncodeTiled(
        ctypes.byref(aligned), _UNSIGNED[element_bytes], rank, ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(sizes)), (ctypes.c_uint64 * (rank - 1))(*reversed(strides)),
        (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE, SWIZZLES[swizzle_bytes], L2_PROMOTIONS[l2_bytes], _ZERO_FILL)
    check(status, f"describing a tensor of {list(sizes)} x {element_bytes} bytes, box {list(box)}")
    return aligned
