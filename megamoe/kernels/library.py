"""The `megamoe` operator library, and what its GEMM ops share: operand checks, and quantised operands as the plain tensors an op takes."""

from collections.abc import Callable

import torch

from megamoe.errors import check
from megamoe.formats import FP4Weight, FP8Weight, QuantizedTokens, Sm90Weight
from megamoe.reference.gemm import Tokens, Weight

library = torch.library.Library("megamoe", "FRAGMENT")

FLOATS = (torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64)
TOKEN_GROUPS = (32, 128, "token")


def register(schema: str, implementation: Callable[..., None]) -> None:
    """Define an op that writes its result into an argument: it returns nothing, so its fake has nothing to say either."""
    name = schema.partition("(")[0]
    library.define(schema)
    for dispatch_key in ("CPU", "CUDA"):
        library.impl(name, implementation, dispatch_key)
    torch.library.register_fake(f"megamoe::{name}", lambda *args: None, lib=library)


class Operands:
    """Matches the operands of one call against declared shapes.

    A shape is a string of size letters. The first operand that has a letter binds it in `sizes` and the later ones must agree. All operands
    must be contiguous, on one device, and need no gradient.
    """

    def __init__(self, op: str):
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None

    def tensor(self, name: str, tensor: torch.Tensor, letters: str, dtypes: tuple[torch.dtype, ...], kinds: str = "a tensor") -> None:
        """Raise ValueError unless `tensor` has one of `dtypes` and the shape `letters`."""
        check(isinstance(tensor, torch.Tensor), self.op, name, kinds, type(tensor).__name__, "convert it first")
        expected = " or ".join(map(str, dtypes))
        check(tensor.dtype in dtypes, self.op, f"{name}.dtype", expected, tensor.dtype, f"convert it with .to({dtypes[0]})")
        self._shape(name, tensor.shape, letters)
        self._storage(name, tensor)

    def tokens(self, name: str, x: Tokens, letters: str) -> None:
        """Raise ValueError unless `x` is tokens of the shape `letters`, BF16, FP32 or quantised."""
        if not isinstance(x, QuantizedTokens):
            return self.tensor(name, x, letters, FLOATS, kinds="a tensor or QuantizedTokens")
        check(x.group in TOKEN_GROUPS, self.op, f"{name}.group", f"one of {TOKEN_GROUPS}", x.group, "quantise with such a group")
        self._shape(name, x.shape, letters)
        self._storage(f"{name}.codes", x.codes)
        self._storage(f"{name}.sf", x.sf)

    def weight(self, name: str, w: Weight, letters: str) -> None:
        """Raise ValueError unless `w` is a weight of the shape `letters`: BF16, FP32, FP8Weight, FP4Weight, Sm90Weight not interleaved."""
        if isinstance(w, Sm90Weight):
            return self.packed_weight(name, w, letters, interleaved=False)
        if not isinstance(w, (FP4Weight, FP8Weight)):
            return self.tensor(name, w, letters, FLOATS, kinds="a tensor, FP4Weight, FP8Weight or Sm90Weight")
        self._shape(name, w.shape, letters)
        self._storage(f"{name}.codes", w.codes)
        self._storage(f"{name}.scales", w.scales)

    def packed_weight(self, name: str, w: Sm90Weight, letters: str, interleaved: bool) -> None:
        """Raise ValueError unless `w` has the shape `letters`, which leave out the only group of a dense GEMM, and this row order."""
        shape = w.shape[1:] if len(letters.split()) == 2 and w.shape[0] == 1 else w.shape
        self._shape(name, shape, letters)
        fix = "pad the weight with zeros before packing it"
        check(shape[-2] % 32 == 0, self.op, f"{name}.shape[-2]", "a multiple of 32", shape[-2], fix)
        fix = f"pack it with interleave_gate_up={interleaved}"
        check(w.interleaved == interleaved, self.op, f"{name}.interleaved", interleaved, w.interleaved, fix)
        check(not w.thread_order, self.op, f"{name}.thread_order", False, True, "pack it with thread_order=False, the order of the tokens")
        self._storage(f"{name}.blocks", w.blocks)
        self._storage(f"{name}.row_base", w.row_base)

    def optional(self, name: str, tensor: torch.Tensor | None, letters: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """Match `tensor` if there is one."""
        if tensor is not None:
            self.tensor(name, tensor, letters, dtypes)

    def out(self, out: torch.Tensor | None, letters: str, dtypes: tuple[torch.dtype, ...], accumulate: bool) -> None:
        """Match `out` if there is one; accumulating needs one."""
        check(out is not None or not accumulate, self.op, "out", "given with accumulate=True", None, "pass the tensor to add to")
        self.optional("out", out, letters, dtypes)

    def _shape(self, name: str, shape: torch.Size, letters: str) -> None:
        dims = letters.split()
        fits = len(shape) == len(dims) and all(self.sizes.get(dim, size) == size for dim, size in zip(dims, shape))
        expected = ", ".join(f"{dim}={self.sizes[dim]}" if dim in self.sizes else dim for dim in dims)
        check(fits, self.op, f"{name}.shape", f"[{expected}]", list(shape), "sizes of one letter must agree")
        self.sizes.update(zip(dims, shape))

    def _storage(self, name: str, tensor: torch.Tensor) -> None:
        self.device = self.device or tensor.device
        fix = f"move it with .to({str(self.device)!r})"
        check(tensor.device == self.device, self.op, f"{name}.device", f"{self.device} as of the first operand", tensor.device, fix)
        check(tensor.is_contiguous(), self.op, name, "contiguous", f"strides {tensor.stride()}", "call .contiguous()")
        needs_grad = tensor.requires_grad and torch.is_grad_enabled()
        fix = "training is not implemented yet, call it under torch.no_grad()"
        check(not needs_grad, self.op, f"{name}.requires_grad", False, True, fix)


def check_offsets(op: str, offsets: torch.Tensor, num_rows: int) -> None:
    """Raise ValueError unless offsets [G+1] start at 0, never decrease and end at `num_rows` or before. Sync: reads offsets on the host."""
    bounds = offsets.tolist()
    is_valid = bounds[:1] == [0] and bounds[-1] <= num_rows and all(begin <= end for begin, end in zip(bounds, bounds[1:]))
    check(is_valid, op, "offsets", f"non-decreasing from 0 to at most {num_rows}", bounds, "pass the cumulative row counts")


def split_tokens(x: Tokens) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """(values or codes, scale factors, channels per scale factor); a plain tensor has none of the last two."""
    if isinstance(x, torch.Tensor):
        return x, None, 0
    return x.codes, x.sf, x.codes.shape[-1] if x.group == "token" else x.group


def join_tokens(x: torch.Tensor, sf: torch.Tensor | None, channels_per_sf: int) -> Tokens:
    """Inverse of `split_tokens`."""
    if sf is None:
        return x
    return QuantizedTokens(x, sf, "token" if channels_per_sf == x.shape[-1] else channels_per_sf)


def split_weight(w: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(values, codes or blocks; scales or row_base); a plain tensor has no scales."""
    if isinstance(w, torch.Tensor):
        return w, None
    return (w.blocks, w.row_base) if isinstance(w, Sm90Weight) else (w.codes, w.scales)


def join_weight(w: torch.Tensor, scales: torch.Tensor | None) -> Weight:
    """Inverse of `split_weight`, which had a weight whose scales were checked."""
    if scales is None:
        return w
    kind = FP4Weight if w.dtype == torch.uint8 else FP8Weight
    return kind(w, scales, check_nan=False)
