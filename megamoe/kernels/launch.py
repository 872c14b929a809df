"""Launching: Kernel.launch, parameter blocks with the layout of C++, tensor maps. Allocates nothing on the device, never synchronises."""

import ctypes
import functools

import torch

from megamoe.errors import check
from megamoe.kernels import driver
from megamoe.kernels.compiler import Cubin
from megamoe.kernels.driver import TensorMap

_MAX_CONFIGS = 1024  # of one kernel; a launch shape that changes with every call must not grow memory
_MAX_TENSOR_MAPS = 4096
_byref, _addressof, _pointer = ctypes.byref, ctypes.addressof, ctypes.c_void_p


class Kernel:
    """A kernel loaded on one device. `num_registers` is what a thread is launched with."""

    def __init__(self, name: str, cubin: Cubin, entry: str, device: int):
        self.name = name
        self.device = device
        self.num_registers = cubin.num_registers
        function = driver.load(cubin.code, entry, device)
        self.max_smem_bytes = function.max_dynamic_smem_bytes
        self._function = function.handle
        self._call = driver.library().cuLaunchKernelEx
        self._configs: dict[tuple, object] = {}

    def __repr__(self) -> str:
        return f"Kernel({self.name}, cuda:{self.device}, {self.num_registers} registers, up to {self.max_smem_bytes} B of shared memory)"

    def launch(self, grid: int, block: int, smem_bytes: int, params: "Params", stream: int, *, cluster: int = 1, pdl: bool = False,
               cooperative: bool = False) -> None:
        """Enqueue one launch. The kernel's device must be current.

        Args:
            grid, block: number of blocks, and of threads per block.
            smem_bytes: dynamic shared memory.
            params: the kernel's only parameter, by value; the driver copies it before this returns. See `params_struct`.
            stream: cudaStream_t, e.g. devices.stream(device).
            cluster: blocks per cluster along x.
            pdl: the kernel may start before the one before it in the stream ends (it waits itself with griddepcontrol.wait).
            cooperative: refuse a grid that does not fit on the device at once.

        Raises:
            RuntimeError: the driver refused; carries its text and the launch shape.

        Sync: stream-ordered, no host sync, safe under CUDA graph capture.
        """
        key = (grid, block, smem_bytes, stream, cluster, pdl, cooperative)
        config = self._configs.get(key)
        if config is None:
            config = self._add_config(key)
        status = self._call(config, self._function, params.argument, None)
        if status:
            shape = f"grid {grid}, block {block}, cluster {cluster}, {smem_bytes} B of shared memory"
            driver.check(status, f"launching {self.name} with {shape}")

    def _add_config(self, key: tuple) -> object:
        """The launch shape as the driver wants it. Never written again, so that threads may share it."""
        grid, block, smem_bytes, stream, cluster, pdl, cooperative = key
        attributes = []
        if cluster > 1:
            attributes.append(driver.LaunchAttribute(id=driver.CLUSTER_DIMENSION))
            attributes[-1].value.cluster[:] = (cluster, 1, 1)
        for is_set, attribute in ((pdl, driver.PROGRAMMATIC_STREAM_SERIALIZATION), (cooperative, driver.COOPERATIVE)):
            if is_set:
                attributes.append(driver.LaunchAttribute(id=attribute))
                attributes[-1].value.flag = 1
        array = (driver.LaunchAttribute * len(attributes))(*attributes)
        config = driver.LaunchConfig((grid, 1, 1), (block, 1, 1), smem_bytes, stream, array, len(attributes))
        if len(self._configs) >= _MAX_CONFIGS:
            self._configs.clear()
        self._configs[key] = _byref(config)
        return self._configs[key]


class Params(ctypes.Structure):
    """Base of parameter blocks. `argument` is what the driver wants for one: a pointer to a list of one pointer to it."""

    argument: object

    @classmethod
    def allocate(cls, **values: object) -> "Params":
        """A block at an address of the alignment that its members want, with `values` filled in and the rest zero."""
        buffer = ctypes.create_string_buffer(ctypes.sizeof(cls) + cls.alignment)
        block = cls.from_buffer(buffer, -_addressof(buffer) % cls.alignment)
        for name, value in values.items():
            setattr(block, name, value)
        block.argument = _byref(_pointer(_addressof(block)))
        return block


def params_struct(name: str, members: list[tuple[str, type]]) -> type[Params]:
    """A ctypes struct laid out like the C++ struct with the same members, TensorMaps (and arrays of them) at multiples of 64 bytes.

    ctypes has no alignas before Python 3.13, hence the explicit padding. Members are assigned by name: block.x_map = tensor_map_2d(...).
    """
    padded, size, alignment = [], 0, 1
    for member, kind in members:
        wanted = _alignment(kind)
        if size % wanted:
            gap = -size % wanted
            padded.append((f"_pad_before_{member}", ctypes.c_uint8 * gap))
            size += gap
        padded.append((member, kind))
        size += ctypes.sizeof(kind)
        alignment = max(alignment, wanted)
    if size % alignment:
        padded.append(("_pad_at_end", ctypes.c_uint8 * (-size % alignment)))
    return type(name, (Params,), {"_fields_": padded, "alignment": alignment})


def _alignment(kind: type) -> int:
    """alignof in C++: of the element for arrays."""
    while hasattr(kind, "_length_"):
        kind = kind._type_
    return getattr(kind, "alignment", None) or ctypes.alignment(kind)


def tensor_map(tensor: torch.Tensor, box: tuple[int, ...], swizzle_bytes: int = 0, l2_bytes: int = 0) -> TensorMap:
    """Describe a tensor for tensor copies of a box; what a box reads outside the tensor is zero.

    Args:
        tensor: of 2 to 5 dimensions on a GPU, the last contiguous, the others at multiples of 16 bytes.
        box: elements of each dimension, 1 to 256; the last is a multiple of 16 bytes and, with a swizzle, at most its width.
        swizzle_bytes: 0, 32, 64 or 128.
        l2_bytes: 0, 64, 128 or 256: what a copy fetches to L2 at least. More than the box wants is wasted where no other box follows.

    Returns:
        128 bytes to assign to a member of a parameter block. Cached by address, shape, strides and box: do not write to it.

    Raises:
        ValueError: the tensor or the box is not of this kind; an empty tensor has no map.
    """
    return _tensor_map(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype.itemsize, box, swizzle_bytes, l2_bytes)


@functools.lru_cache(maxsize=_MAX_TENSOR_MAPS)
def _tensor_map(address: int, shape: torch.Size, strides: tuple[int, ...], itemsize: int, box: tuple[int, ...], swizzle_bytes: int,
                l2_bytes: int) -> TensorMap:
    op = "tensor_map"
    is_tensor = 2 <= len(shape) <= 5 and min(shape) > 0
    check(is_tensor, op, "shape", "2 to 5 dimensions, none zero", list(shape), "launch nothing for an empty tensor")
    *outer, last = (stride * itemsize for stride in strides)
    are_legal = last == itemsize and all(stride % 16 == 0 for stride in outer)
    check(are_legal, op, "strides", "multiples of 16 bytes, the last 1 element", strides, "call .contiguous() or pad the rows")
    check(address % 16 == 0, op, "data_ptr", "a multiple of 16", address, "do not start the tensor inside a 16-byte block")
    check(swizzle_bytes in driver.SWIZZLES, op, "swizzle_bytes", f"one of {tuple(driver.SWIZZLES)}", swizzle_bytes, "pick one of them")
    check(l2_bytes in driver.L2_PROMOTIONS, op, "l2_bytes", f"one of {tuple(driver.L2_PROMOTIONS)}", l2_bytes, "pick one of them")
    fits = len(box) == len(shape) and all(1 <= side <= 256 for side in box) and box[-1] * itemsize % 16 == 0
    fits = fits and (not swizzle_bytes or box[-1] * itemsize <= swizzle_bytes)
    widest = f"{swizzle_bytes} bytes" if swizzle_bytes else "256 elements"
    check(fits, op, "box", f"a side of 1..256 per dimension, the last a multiple of 16 bytes up to {widest}", list(box),
          "copy in several boxes")
    return driver.encode_tensor_map(address, itemsize, shape, outer, box, swizzle_bytes, l2_bytes)
