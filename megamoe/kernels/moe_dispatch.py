"""ArenaDispatch: one call's tokens to the ranks of their experts and back, by kernels that read and write the arenas of all ranks.

Legend: W ranks, T tokens of this rank, K top-k slots, e local experts, H hidden, P pool rows.

    moe_stage -> moe_route -> moe_assign -> each pass: moe_pull, the experts, whose last kernel stores row r at row_dst[r] -> moe_combine
                                         -> or in one pass: mega_moe, which pulls, pushes and combines itself
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megamoe.comm.device_calls import DeviceCalls
from megamoe.comm.protocol import Layout
from megamoe.errors import check
from megamoe.kernels import devices, jit, moe_sources
from megamoe.kernels.moe_sources import CHUNK_ENTRIES, OPS, PARAMS, ROUTING_OPS, Symm, blocks_per_sm, threads

_COMBINE_CHANNELS_PER_THREAD = 8


@dataclass(frozen=True, eq=False)
class PulledRows:
    """The rows of one pass, ordered by expert, source rank (from this one on, round), token, slot.

    The next pass overwrites them; rows past the last are undefined.

    Args:
        codes: [P, H] float8_e4m3fn, one exponent per row.
        sf: [P] uint8 UE8M0.
        row_weight: [P] float32 top-k weight.
        row_dst: [P] int64 address of the row's H values in the partials of the rank it came from.
        offsets: [e + 1] int32, first row of each expert in this pass.
        bounds: [1, 2] int32, 0 and the number of rows.
    """

    codes: torch.Tensor
    sf: torch.Tensor
    row_weight: torch.Tensor
    row_dst: torch.Tensor
    offsets: torch.Tensor
    bounds: torch.Tensor


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """Where the rows of a call come from, in the order of PulledRows; entries past the last row are undefined.

    Args:
        row_entry: [R] int32, src * T * K + token * K + slot of each row, with T = max_tokens; R: most rows a call can have.
        offsets: [e + 1] int32, first row of each expert.
    """

    row_entry: torch.Tensor
    offsets: torch.Tensor


class ArenaDispatch:
    """Dispatch and combine of one rank. Compiles and allocates at construction; afterwards all is stream-ordered and capturable.

    Args:
        layout: of the arena; precision fp8xfp4 or fp8xfp8.
        rank: this rank.
        peer_ptrs: address of every rank's arena as this rank loads and stores it.
        own_bytes: [num_bytes] uint8, this rank's arena.
        device: CUDA device; must be current at every call.
        calls: epoch and failures of the arena's calls.
        is_one_pass: the rows are for mega_moe: `rows` has them all, and there is no `pull` and no `combine`.

    Raises:
        ValueError: more local experts or entries than the kernels count.
    """

    def __init__(self, layout: Layout, rank: int, peer_ptrs: Sequence[int], own_bytes: torch.Tensor, device: torch.device,
                 calls: DeviceCalls, is_one_pass: bool = False):
        dims = layout.dims
        num_local, num_entries = dims.num_experts // dims.num_ranks, moe_sources.num_entries(dims)
        for what, got, limit, fix in (("experts per rank", num_local, threads("moe_route", dims) + 1, "use more ranks"),
                                      ("num_ranks * max_tokens * num_topk", num_entries, 2**31, "lower max_tokens_per_rank")):
            check(got < limit, "ArenaDispatch", what, f"below {limit}", got, fix)
        self.dims, self.device, self.calls, self._is_one_pass = dims, device, calls, is_one_pass
        self.num_passes = 1 if is_one_pass else moe_sources.num_passes(dims)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._kernels = {op: jit.build(op, (dims, is_one_pass), lambda op=op: moe_sources.source(op, dims, is_one_pass), op, device.index)
                         for op in (ROUTING_OPS if is_one_pass else OPS)}
        self._inputs = {name: layout.view(name, own_bytes) for name in ("x", "x_sf")}
        self._allocate(num_local, num_entries)
        self._passes = [] if is_one_pass else self._make_passes(layout, own_bytes)
        self._fill_params(Symm.of(rank, peer_ptrs))

    def stage(self, x: torch.Tensor, x_sf: torch.Tensor | None, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> None:
        """Begin a call: put this rank's tokens and routing into its arena and publish them to every rank.

        Tokens are folded to one exponent, which every byte of their x_sf then holds; those in the arena's own region change in place. For
        mega_moe they may go there in thread order (formats/thread_order.py).

        Args:
            x: [T, H] bfloat16, which is quantised; or float8_e4m3fn with x_sf. Contiguous.
            x_sf: [T, H/32] uint8, or None for bfloat16. What lies in the arena's own regions is not copied; for mega_moe it must lie elsewhere.
            topk_idx: [T, K] int64; values outside [-1, E) count as -1 and are reported to `calls`.
            topk_weights: [T, K] float32.

        Raises:
            ValueError: rows of x are not at multiples of 16 bytes, or are the arena's own in a call of mega_moe.
        Sync: stream-ordered. Every rank must come here.
        """
        num_tokens = topk_idx.shape[0]
        check(x.data_ptr() % 16 == 0, "moe_stage", "x", "at a multiple of 16 bytes", x.data_ptr() % 16, "copy it with .clone()")
        is_own = x.data_ptr() == self._inputs["x"].data_ptr()
        check(not (is_own and self._is_one_pass), "moe_stage", "x", "outside the arena", "the arena's x", "take FusedEngine.token_views")
        params = self._params["moe_stage"]
        params.x, params.x_sf = self._source(x, "x"), 0 if x_sf is None else self._source(x_sf, "x_sf")
        params.topk_idx, params.topk_weights = topk_idx.data_ptr(), topk_weights.data_ptr()
        params.num_tokens, params.is_quantized = num_tokens, x_sf is not None
        self._launch("moe_stage", self._grid("moe_stage", num_tokens))

    def route(self, expert_load: torch.Tensor, ahead: torch.Tensor | None = None) -> None:
        """Wait for every rank's inputs and give each (token, slot) that names a local expert a row.

        Args:
            expert_load: [e] int64, to which the rows of each expert are added.
            ahead: contiguous, of a multiple of 16 bytes; brought to L2 meanwhile.

        Sync: stream-ordered; the device waits for every rank's `stage`, at most calls.timeout_s.
        """
        params = self._params["moe_route"]
        params.expert_load = expert_load.data_ptr()
        params.ahead, params.ahead_bytes = (0, 0) if ahead is None else (ahead.data_ptr(), ahead.nbytes)
        for op in ("moe_route", "moe_assign"):  # each starts while the one before it ends, and waits for it
            self._launch(op, self._num_chunks, pdl=True)

    def rows(self) -> RoutedRows:
        """All rows of the call that `route` has seen, in one pass. The same tensors in every call. Sync: none."""
        return RoutedRows(self._row_entry, self._offsets[0])

    def pull(self, pass_idx: int) -> PulledRows:
        """Fetch the rows of one pass, in [0, num_passes). Passes without rows cost an empty launch. Sync: stream-ordered."""
        params = self._params["moe_pull"]
        params.row_entry = self._row_entry.data_ptr() + 4 * pass_idx * self.dims.pool_rows
        params.bounds = self._passes[pass_idx].bounds.data_ptr()
        self._launch("moe_pull", self._grid("moe_pull", self._blocks("moe_pull", 32 * self.dims.pool_rows)))
        return self._passes[pass_idx]

    def combine(self, y: torch.Tensor) -> None:
        """End the call: y [T, H] bfloat16, contiguous, becomes the sum over slots; NaN if the call failed.

        Sync: stream-ordered; the device waits for every rank's partials, at most calls.timeout_s.
        """
        params = self._params["moe_combine"]
        params.y, params.num_tokens = y.data_ptr(), y.shape[0]
        self._launch("moe_combine", self._grid("moe_combine", self._blocks("moe_combine", y.numel() // _COMBINE_CHANNELS_PER_THREAD)))

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def _allocate(self, num_local: int, num_entries: int) -> None:
        self._num_chunks = self.dims.num_ranks * moe_sources.num_chunks(self.dims)
        self._entry_expert = self._empty(self._num_chunks, CHUNK_ENTRIES, dtype=torch.int16)
        self._chunk_rows = self._empty(self._num_chunks, num_local, dtype=torch.int32)
        self._row_entry = self._empty(num_entries, dtype=torch.int32)
        self._offsets = self._empty(self.num_passes, num_local + 1, dtype=torch.int32)
        self._bounds = self._empty(self.num_passes, 1, 2, dtype=torch.int32)
        self._num_arrived = torch.zeros(2, dtype=torch.int32, device=self.device)

    def _make_passes(self, layout: Layout, own_bytes: torch.Tensor) -> list[PulledRows]:
        rows = self.dims.pool_rows
        codes, sf = layout.view("pool_x", own_bytes), layout.view("pool_x_sf", own_bytes).view(-1)[:rows]
        row_weight, row_dst = self._empty(rows, dtype=torch.float32), self._empty(rows, dtype=torch.int64)
        return [PulledRows(codes, sf, row_weight, row_dst, *of_pass) for of_pass in zip(self._offsets, self._bounds)]

    def _fill_params(self, symm: Symm) -> None:
        """One block per kernel, of which each call sets only what is the caller's."""
        calls = self.calls.params()
        routing = {"entry_expert": self._entry_expert.data_ptr(), "chunk_rows": self._chunk_rows.data_ptr()}
        values = {
            "moe_stage": {"symm": symm, "calls": calls, "num_arrived": self._num_arrived[0:].data_ptr()},
            "moe_route": {"symm": symm, "calls": calls, **routing, "offsets": self._offsets.data_ptr(),
                          "bounds": self._bounds.data_ptr(), "num_arrived": self._num_arrived[1:].data_ptr()},
            "moe_assign": {"calls": calls, **routing, "row_entry": self._row_entry.data_ptr(), "rank": symm.rank},
            "moe_combine": {"symm": symm, "calls": calls},
        }
        if self._passes:
            rows = self._passes[0]
            values["moe_pull"] = {"symm": symm, "codes": rows.codes.data_ptr(), "sf": rows.sf.data_ptr(),
                                  "row_weight": rows.row_weight.data_ptr(), "row_dst": rows.row_dst.data_ptr()}
        self._params = {op: PARAMS[op].allocate(**values[op]) for op in self._kernels}

    def _source(self, tensor: torch.Tensor, name: str) -> int:
        """Address to copy from; 0 if the producer wrote into the arena."""
        pointer = tensor.data_ptr()
        return 0 if pointer == self._inputs[name].data_ptr() else pointer

    def _blocks(self, op: str, num_threads: int) -> int:
        return -(-num_threads // threads(op, self.dims))

    def _grid(self, op: str, num_blocks: int) -> int:
        """At most `blocks_per_sm`; one block to post and wait if there is no work."""
        return max(1, min(num_blocks, blocks_per_sm(op, self.dims) * self._num_sms))

    def _launch(self, op: str, grid: int, pdl: bool = False) -> None:
        stream = devices.stream(self.device.index)
        self._kernels[op].launch(grid, threads(op, self.dims), 0, self._params[op], stream, pdl=pdl)
