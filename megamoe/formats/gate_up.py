"""Row order of a fused gate/up matrix: canonical (I gate rows, then I up rows) <-> slabs of 16 kernel rows (8 gate, the 8 matching up).

Both chips use it: one thread then holds gate and up of the same channel, and SwiGLU needs no exchange.
"""

from torch import Tensor

from megamoe.formats.checks import require

SLAB = 8


def require_rows(op: str, num_rows: int) -> None:
    """Raise FormatError unless `num_rows` = 2I rows can be interleaved."""
    require(num_rows % (2 * SLAB) == 0, op, "N", f"a multiple of {2 * SLAB} to interleave gate and up rows", num_rows, "pad I with zeros")


def interleave(rows: Tensor, dim: int = 0) -> Tensor:
    """Canonical -> kernel row order along `dim`, whose size is 2I; the shape stays."""
    return rows.unflatten(dim, (2, -1, SLAB)).transpose(dim, dim + 1).flatten(dim, dim + 2)


def deinterleave(rows: Tensor, dim: int = 0) -> Tensor:
    """The inverse of `interleave`."""
    return rows.unflatten(dim, (-1, 2, SLAB)).transpose(dim, dim + 1).flatten(dim, dim + 2)
