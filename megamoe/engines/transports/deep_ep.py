"""DeepEPTransport: dispatch and combine by the NVLink kernels of the deep_ep package, for comparison. Eager only.

A token crosses to a rank once, whatever number of experts it has there, and one sum of their results comes back. DeepEP owns the wire;
this file owns the way from received tokens to rows in expert order and back.

Legend: T tokens of this rank, n tokens received, K top-k slots, e local experts, W ranks, P pool rows, R rows received, H hidden.
"""

import importlib
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from megamoe.comm import Arena, agree
from megamoe.config import MoEConfig
from megamoe.engines.transports.host_driven import folded_tokens, load_kernels, meet
from megamoe.errors import EngineUnavailableError
from megamoe.kernels.permute import permute_tokens, unpermute_tokens

# The groups DeepEP's NVLink kernels are compiled for, and their longest row: half of one, and a barrier, must fit 8 KiB of shared memory.
_WORLDS = (2, 4, 8)
_MAX_HIDDEN = 16352
# combine synchronises a warp in the loop over a row: every lane must take part to the end, so a row is a multiple of 32 x 16 bytes.
_COMBINE_CHANNELS = 256


@dataclass(frozen=True, eq=False)
class DispatchedRows:
    """Rows whose results go to `out`."""

    codes: torch.Tensor  # [P, H] float8_e4m3fn
    sf: torch.Tensor  # [P] uint8
    row_weight: torch.Tensor  # [P] float32
    offsets: torch.Tensor  # [e+1] int32
    bounds: torch.Tensor  # [1, 2] int32
    out: torch.Tensor  # [P, H] bfloat16
    first_row: int  # of this pass, in expert order


@dataclass(frozen=True, eq=False)
class ReceivedTokens:
    """What one dispatch brought, tokens by source rank, then token."""

    codes: torch.Tensor  # [n, H] float8_e4m3fn
    sf: torch.Tensor  # [n, 1] int32
    topk_weights: torch.Tensor  # [n, K] float32
    entry: torch.Tensor  # [R] int64: received token * K + slot of each row, in expert order
    row: torch.Tensor  # [n, K] int64: row of each slot, negative where its expert lives elsewhere
    ends: tuple[int, ...]  # e entries: where the rows of each local expert end
    handle: tuple  # combine takes it


class DeepEPTransport:
    """deep_ep.Buffer over the arena's group, W one of 2, 4, 8 inside an NVLink domain. Arena signals tell refused and silent ranks first.

    Results differ from the other transports in rounding: the sum of a token's slots on one rank is FP32 rounded to BF16 (per pass, if
    rows take several), and DeepEP adds those of the ranks in FP32. A token whose experts all live on one rank has the same bits. Received
    tokens are W * max_tokens_per_rank at worst; their rows go through the pool in passes.

    A rank that dies between the two meetings of a call leaves its peers in DeepEP's kernels, which trap after about 100 s.

    Raises:
        EngineUnavailableError: deep_ep cannot be imported, or has no kernels for this group or width; on every rank.
    Sync: construction is collective. So is the end of DeepEP's buffer, which comes with the arena's `close`.
    """

    is_capturable = False
    scatters = False

    def __init__(self, cfg: MoEConfig, arena: Arena):
        reason, self._deep_ep = _why_unavailable(cfg, arena.num_ranks), None
        try:
            self._deep_ep = importlib.import_module("deep_ep")
        except ImportError as error:
            reason = f"deep_ep cannot be imported ({error}); install DeepEP 1.2 or unset MEGAMOE_TRANSPORT"
        unavailable = None if reason is None else EngineUnavailableError(f"MegaMoE: transport 'deep_ep' cannot run here: {reason}")
        agree(arena.group, "MegaMoE", {}, unavailable)  # before ranks that have it wait in its collective constructor
        arena.claim("host")
        self._arena, self._num_experts = arena, cfg.num_experts
        self._combine_pad = -cfg.hidden % _COMBINE_CHANNELS
        arena.shared("deep_ep buffer", self._create_buffer)
        num_pool_rows, device = arena.dims.pool_rows, arena.device
        self._sf = torch.empty(num_pool_rows, dtype=torch.uint8, device=device)
        self._row_weight = torch.empty(num_pool_rows, dtype=torch.float32, device=device)
        self._out = torch.empty(num_pool_rows, cfg.hidden, dtype=torch.bfloat16, device=device)
        self._received: ReceivedTokens | None = None
        self._sums: torch.Tensor | None = None  # [n, H], of the passes so far
        self.num_passes = 0
        self._load_kernels()

    @property
    def _buffer(self):
        # NOTE: only the arena holds it, no attribute, and no local that a traceback would keep. DeepEP frees it in a destructor that waits
        # for the peers', and arenas close together.
        return self._arena.shared("deep_ep buffer", self._create_buffer)

    def _create_buffer(self):
        arena, api = self._arena, self._deep_ep.Buffer
        row_bytes = 2 * (arena.dims.hidden + self._combine_pad)
        configs = api.get_dispatch_config(arena.num_ranks), api.get_combine_config(arena.num_ranks)
        num_bytes = max(config.get_nvl_buffer_size_hint(row_bytes, arena.num_ranks) for config in configs)
        return api(dist.group.WORLD if arena.group is None else arena.group, num_bytes)

    def _load_kernels(self) -> None:
        """Run every kernel of a call that is not DeepEP's on one row, so that no rank compiles while its peers wait inside DeepEP."""
        row, out = torch.zeros(1, dtype=torch.int64, device=self._arena.device), self._out[:1]
        load_kernels(out.shape[1], out.device)
        permute_tokens(self._arena.view("pool_x")[:1], row)
        unpermute_tokens(out, row[:, None])

    def dispatch(self, x, x_sf, topk_idx, topk_weights, expert_load) -> None:
        tokens = folded_tokens(x, x_sf)
        is_routed = (topk_idx >= 0) & (topk_idx < self._num_experts)
        topk_idx = torch.where(is_routed, topk_idx, -1)
        per_rank, _, per_expert, is_token_in_rank, _ = self._buffer.get_dispatch_layout(topk_idx, self._num_experts)
        # NOTE: DeepEP moves scales as 4-byte words without looking at them; one word per token holds the exponent.
        wire = tokens.codes, tokens.sf.int()
        meet(self._arena, "inputs_ready", "dispatch")
        (codes, sf), local_idx, weights, counts, handle, _ = self._buffer.dispatch(
            wire, topk_idx=topk_idx, topk_weights=topk_weights, num_tokens_per_rank=per_rank, num_tokens_per_expert=per_expert,
            is_token_in_rank=is_token_in_rank)
        ends = tuple(accumulate(counts))
        entry = _expert_order(local_idx, len(counts), ends[-1])
        row = torch.full_like(local_idx, -1)
        row.view(-1)[entry] = torch.arange(len(entry), device=row.device)
        self._received = ReceivedTokens(codes, sf, weights, entry, row, ends, handle)
        self.num_passes = max(1, -(-len(entry) // len(self._sf)))
        expert_load += torch.tensor(counts, device=expert_load.device)

    def rows(self, pass_idx: int) -> DispatchedRows:
        received, num_pool_rows, device = self._received, len(self._sf), self._arena.device
        first = pass_idx * num_pool_rows
        entry = received.entry[first: first + num_pool_rows]
        token, num_rows = entry // received.topk_weights.shape[1], len(entry)
        codes = self._arena.view("pool_x")
        torch.ops.megamoe.permute_tokens(received.codes, token, codes[:num_rows])
        self._sf[:num_rows] = received.sf[token, 0]
        self._row_weight[:num_rows] = received.topk_weights.flatten()[entry]
        offsets = [min(max(end - first, 0), num_rows) for end in (0, *received.ends)]
        bounds = torch.tensor([[0, num_rows]], dtype=torch.int32, device=device)
        return DispatchedRows(codes, self._sf, self._row_weight, torch.tensor(offsets, dtype=torch.int32, device=device), bounds, self._out,
                              first)

    def push(self, rows: DispatchedRows) -> None:
        row = self._received.row - rows.first_row
        is_here = (row >= 0) & (row < len(rows.out))
        sums = unpermute_tokens(rows.out, torch.where(is_here, row, -1))
        self._sums = sums if rows.first_row == 0 else self._sums.float().add_(sums)

    def finish(self, y) -> None:
        sums = self._sums.bfloat16()
        if self._combine_pad:
            sums = pad(sums, (0, self._combine_pad))
        meet(self._arena, "combine_ready", "combine")
        combined, _, _ = self._buffer.combine(sums, self._received.handle)
        y.copy_(combined[:, : y.shape[1]])
        self._received = self._sums = None


def _why_unavailable(cfg: MoEConfig, num_ranks: int) -> str | None:
    if num_ranks not in _WORLDS:
        return f"its kernels are for 2, 4 or 8 ranks, got {num_ranks}; unset MEGAMOE_TRANSPORT"
    if cfg.hidden > _MAX_HIDDEN:
        return f"its kernels hold rows of up to {_MAX_HIDDEN} channels, got hidden {cfg.hidden}; unset MEGAMOE_TRANSPORT"
    return None


def _expert_order(local_idx: torch.Tensor, num_local_experts: int, num_rows: int) -> torch.Tensor:
    """local_idx [n, K] int64, -1 where a slot's expert lives elsewhere -> [R] int64, slots by expert, then as they lie. Sync: none."""
    expert = torch.where(local_idx < 0, num_local_experts, local_idx)
    return expert.flatten().argsort(stable=True)[:num_rows]
