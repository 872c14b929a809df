"""Input checks shared by the number formats: the FormatError form of `errors.check`, and scans that name the first bad element."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megamoe.errors import FormatError

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(condition: bool, op: str, what: str, expected: object, got: object, fix: str) -> None:
    """Raise `FormatError("<op>: <what> must be <expected>, got <got>; <fix>")` unless `condition` holds."""
    if not condition:
        raise FormatError(f"{op}: {what} must be {expected}, got {got}; {fix}")


def matrices(w: Tensor) -> Iterator[Tensor]:
    """The [N, K] matrices of w [..., N, K] in order. Work goes matrix by matrix so that temporaries stay the size of one expert."""
    yield from w.unsqueeze(0).flatten(0, -3)


def require_weights(op: str, w: Tensor) -> None:
    """Raise FormatError unless `w` is a finite [..., N, K] tensor of a weight dtype. Sync: reads the device."""
    dtype_names = "bfloat16, float16 or float32"
    require(w.dtype in WEIGHT_DTYPES, op, "weights", dtype_names, str(w.dtype).removeprefix("torch."), "cast them first")
    require(w.dim() >= 2, op, "weights", "[..., N, K]", list(w.shape), "pass at least one matrix")
    for matrix_idx, matrix in enumerate(matrices(w)):
        bad = ~matrix.isfinite()
        if bad.any():
            index = _first_index(bad, w.shape, matrix_idx * matrix.numel())
            require(False, op, "weights", "finite", f"{w[index].item()} at {list(index)}", "repair the checkpoint")


def require_no_nan_scale(op: str, scales: Tensor) -> None:
    """Raise FormatError if UE8M0 `scales` (uint8) hold the NaN byte 255. Sync: reads the device."""
    bad = scales == 255
    if bad.any():
        index = list(_first_index(bad, scales.shape, 0))
        require(False, op, "scales", "UE8M0 bytes below 255 (255 is NaN)", f"{int(bad.sum())} of 255, the first at {index}",
                "repair the checkpoint, or check that these bytes are scales")


def _first_index(mask: Tensor, shape: torch.Size, flat_offset: int) -> tuple[int, ...]:
    first = flat_offset + mask.flatten().to(torch.uint8).argmax().cpu()
    return tuple(int(i) for i in torch.unravel_index(first, shape))
