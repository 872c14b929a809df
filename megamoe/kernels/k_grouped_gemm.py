"""megamoe.k_grouped_gemm: rows in groups, one product over each group's rows, as weight gradients need it. Runs its plain-torch twin.

Legend: R rows of all groups, G groups, M and N the sizes of one product.
"""

import torch

from megamoe.errors import check
from megamoe.kernels.library import FLOATS, INDICES, Operands, check_offsets, register
from megamoe.reference import k_grouped_gemm as reference

OP = "k_grouped_gemm"


def k_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Compute a[o_g:o_(g+1)].T @ b[o_g:o_(g+1)] for every group g, with FP32 accumulation.

    Args:
        a: [R, M] BF16 or FP32.
        b: [R, N] BF16 or FP32.
        offsets: [G+1] int32 or int64 from 0, non-decreasing; rows past the last are not read. A group without rows gives zeros.
        out: [G, M, N] float32, takes the result. None: a new tensor.
        accumulate: add the result to `out`.

    Returns:
        [G, M, N] float32, `out` if given.

    Raises:
        ValueError: an operand has the wrong dtype, shape or device, is not contiguous or requires grad; offsets are out of range or
            decrease; or accumulate without out.

    Sync: reads offsets on the host.
    """
    operands = Operands(OP)
    operands.tensor("a", a, "R M", FLOATS)
    operands.tensor("b", b, "R N", FLOATS)
    operands.tensor("offsets", offsets, "G+1", INDICES)
    num_groups = offsets.shape[0] - 1
    check(num_groups >= 0, OP, "offsets", "[G+1] values", "none", "pass the cumulative row counts, from 0")
    operands.sizes["G"] = num_groups
    operands.out(out, "G M N", (torch.float32,), accumulate)
    if out is None:
        out = a.new_empty(num_groups, a.shape[1], b.shape[1], dtype=torch.float32)
    torch.ops.megamoe.k_grouped_gemm(a, b, offsets, out, accumulate)
    return out


def _launch(a, b, offsets, out, accumulate) -> None:
    check_offsets(OP, offsets, a.shape[0])
    reference.k_grouped_gemm(a, b, offsets, out=out, accumulate=accumulate)


register("k_grouped_gemm(Tensor a, Tensor b, Tensor offsets, Tensor(a!) out, bool accumulate) -> ()", _launch)
