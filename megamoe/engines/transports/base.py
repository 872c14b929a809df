"""What the unfused engine wants of a transport.

Legend: T tokens of this rank, K top-k slots, e local experts, P pool rows, H hidden.
"""

from typing import Protocol

import torch


class ReceivedRows(Protocol):
    """One pass: up to P rows for the local experts, ordered by expert, then source rank, token, slot; which rank comes first is the
    transport's. The next pass overwrites them.

    Beside these there is where linear 2 puts its rows: `row_dst` [P] int64, an address for each, if the transport scatters; else `out`
    [P, H] bfloat16.
    """

    codes: torch.Tensor  # [P, H] float8_e4m3fn, one exponent per row
    sf: torch.Tensor  # [P] uint8
    row_weight: torch.Tensor  # [P] float32, the slot's top-k weight
    offsets: torch.Tensor  # [e+1] int32: rows offsets[i] .. offsets[i+1] belong to local expert i
    bounds: torch.Tensor  # [1, 2] int32: 0 and the number of rows


class Transport(Protocol):
    """Moves tokens to experts and back. A call is `dispatch`, then `rows` and `push` for each pass, then `finish`.

    Every rank of the group makes the same calls. `is_capturable`: never looks at the device from the host. `scatters`: linear 2 writes
    each row to an address.
    """

    is_capturable: bool
    scatters: bool
    num_passes: int  # known after `dispatch`

    def dispatch(self, x: torch.Tensor, x_sf: torch.Tensor | None, topk_idx: torch.Tensor, topk_weights: torch.Tensor,
                 expert_load: torch.Tensor) -> None:
        """Publish this rank's tokens and learn what the local experts receive, which is added to `expert_load` [e] int64."""

    def rows(self, pass_idx: int) -> ReceivedRows:
        """Fetch the rows of one pass."""

    def push(self, rows: ReceivedRows) -> None:
        """Return the results of a pass to the ranks that the rows came from."""

    def finish(self, y: torch.Tensor) -> None:
        """Write y [T, H] bfloat16: the sum of each token's slots, in slot order, in FP32."""
