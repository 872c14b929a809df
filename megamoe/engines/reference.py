"""The reference engine: the executable form of the numerics contract, on CPU ranks and on GPUs.

It dispatches by pulling and combines by pushing through the arena, like the kernels, and computes experts in plain torch. It is
synchronous: when `forward` returns, the result is there and every peer has finished with this rank's inputs. It does not try to be fast.

Legend: T tokens on this rank, K top-k slots, R rows received, P pool rows, W ranks, e local experts, H hidden, I intermediate.
"""

from dataclasses import dataclass

import torch

from megamoe.comm import Arena
from megamoe.config import X_GROUP, MoEConfig
from megamoe.engines.base import Traffic, arena_token_views
from megamoe.formats import ExpertWeights, QuantizedTokens, quantize_tokens
from megamoe.reference.expert_mlp import expert_mlp

# Act group of the fp8 precisions: what fp8xfp8 prescribes, used for fp8xfp4 too.
ACT_GROUP = 128


@dataclass(frozen=True)
class Rows:
    """The (token, slot) pairs routed to this rank, ordered by expert, then source rank, token, slot."""

    expert: torch.Tensor  # [R] int64, local
    src: torch.Tensor  # [R] int64, rank the token lives on
    token: torch.Tensor  # [R] int64
    slot: torch.Tensor  # [R] int64

    def __len__(self) -> int:
        return self.expert.numel()

    def chunk(self, begin: int, end: int) -> "Rows":
        return Rows(self.expert[begin:end], self.src[begin:end], self.token[begin:end], self.slot[begin:end])


class ReferenceEngine:
    """Plain-torch engine. Collective: every rank of the arena's group calls `forward` the same number of times."""

    name = "reference"
    is_synchronous = True

    def __init__(self, cfg: MoEConfig, arena: Arena, act_group: int | str = ACT_GROUP):
        arena.claim("host")
        self.cfg = cfg
        self.arena = arena
        self.act_group = act_group
        self.traffic = Traffic()
        self._weights: ExpertWeights | None = None
        self._is_fp8 = cfg.is_fp8
        self._num_local_experts = cfg.num_local_experts(arena.num_ranks)

    @property
    def is_loaded(self) -> bool:
        return self._weights is not None

    def load(self, weights: ExpertWeights) -> None:
        self._weights = weights.to_precision(self.cfg.precision).to(self.arena.device)

    def weights(self) -> ExpertWeights | None:
        return self._weights

    def token_views(self):
        return arena_token_views(self.arena)

    def forward(self, x, x_sf, topk_idx, topk_weights, expert_load):
        """x [T, H] (codes with x_sf [T, H/32] if given), topk_idx [T, K] int64, topk_weights [T, K] float32 -> y [T, H].

        Adds the rows received to `expert_load` [e] int64. Raises PeerTimeoutError when a peer is silent past the deadline or aborted.
        """
        arena, epoch = self.arena, self.arena.epoch
        peers = range(arena.num_ranks)
        self._publish(x, x_sf, topk_idx, topk_weights)
        for peer in peers:
            arena.post(peer, "inputs_ready", epoch)
        for peer in peers:
            arena.wait("inputs_ready", peer, epoch, "dispatch")
        rows = self._received_rows()
        expert_load += torch.bincount(rows.expert, minlength=self._num_local_experts)
        num_pool_rows = arena.dims.pool_rows
        for begin in range(0, len(rows), num_pool_rows):
            self._process(rows.chunk(begin, begin + num_pool_rows))
        for peer in peers:
            arena.post(peer, "combine_ready", epoch)
        for peer in peers:
            arena.wait("combine_ready", peer, epoch, "combine")
        return self._reduce(topk_idx)

    def _publish(self, x, x_sf, topk_idx, topk_weights) -> None:
        """Step 1: put this rank's tokens, as linear 1 reads them, and their routing where peers can pull them."""
        num_tokens = topk_idx.shape[0]
        if self._is_fp8:
            tokens = quantize_tokens(x, group=X_GROUP) if x_sf is None else QuantizedTokens(x, x_sf, X_GROUP)
            _copy(self.arena.view("x_sf")[:num_tokens], tokens.sf)
            x = tokens.codes
        else:
            # A clamp would turn Inf back into a number: the contract wants the whole token to be NaN.
            x = torch.where(x.isfinite().all(-1, keepdim=True), x, torch.nan)
        _copy(self.arena.view("x")[:num_tokens], x)
        _copy(self.arena.view("topk_idx")[:num_tokens], topk_idx)
        _copy(self.arena.view("topk_weights")[:num_tokens], topk_weights)
        self.arena.view("num_tokens").fill_(num_tokens)

    def _received_rows(self) -> Rows:
        """Read every peer's routing and list the pairs that name one of this rank's experts."""
        first = self.arena.rank * self._num_local_experts
        found = []
        for src in range(self.arena.num_ranks):
            num_tokens = int(self.arena.peer_view(src, "num_tokens"))
            local = self.arena.peer_view(src, "topk_idx")[:num_tokens].to(self.arena.device) - first
            token, slot = torch.where((local >= 0) & (local < self._num_local_experts))
            found.append(Rows(local[token, slot], torch.full_like(token, src), token, slot))
        merged = [torch.cat([getattr(rows, name) for rows in found]) for name in ("expert", "src", "token", "slot")]
        order = torch.argsort(merged[0], stable=True)
        return Rows(*(column[order] for column in merged))

    def _process(self, rows: Rows) -> None:
        """Pull one pool-full of rows, run their experts, push the partial results to where the tokens came from."""
        x, weight = self._pull(rows)
        partials = torch.empty(x.shape, dtype=self.arena.view("partials").dtype, device=x.device)
        counts = torch.bincount(rows.expert, minlength=self._num_local_experts).tolist()
        end = 0
        for expert, count in enumerate(counts):
            begin, end = end, end + count
            if count:
                partials[begin:end] = self._expert(expert, x[begin:end], weight[begin:end])
        self._push(rows, partials)

    def _expert(self, expert: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate_up, down = self._weights.dequantized(expert)
        biases = (None if bias is None else bias[expert] for bias in (self._weights.gate_up_bias, self._weights.down_bias))
        return expert_mlp(x, weight, gate_up, down, *biases, self.cfg, self.act_group)

    def _pull(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows' tokens [r, H] float32, dequantised, and their top-k weights [r]; the raw rows are staged in the pool."""
        arena = self.arena
        pool_x = arena.view("pool_x")[: len(rows)]
        pool_sf = arena.view("pool_x_sf")[: len(rows)] if self._is_fp8 else None
        weight = torch.empty(len(rows), dtype=torch.float32, device=arena.device)
        for src in range(arena.num_ranks):
            mine = torch.where(rows.src == src)[0]
            if not mine.numel():
                continue
            token = rows.token[mine]
            _as_bytes(pool_x)[mine] = _as_bytes(arena.peer_view(src, "x"))[token]
            if self._is_fp8:
                pool_sf[mine] = arena.peer_view(src, "x_sf")[token]
            weight[mine] = arena.peer_view(src, "topk_weights")[token, rows.slot[mine]]
            if src != arena.rank:
                self.traffic.rows_pulled += mine.numel()
                self.traffic.bytes_pulled += mine.numel() * (pool_x[0].nbytes + (pool_sf[0].nbytes if self._is_fp8 else 0) + 4)
        return (QuantizedTokens(pool_x, pool_sf, X_GROUP).dequantize() if self._is_fp8 else pool_x.float()), weight

    def _push(self, rows: Rows, partials: torch.Tensor) -> None:
        for src in range(self.arena.num_ranks):
            mine = torch.where(rows.src == src)[0]
            if not mine.numel():
                continue
            self.arena.peer_view(src, "partials")[rows.token[mine], rows.slot[mine]] = partials[mine]
            if src != self.arena.rank:
                self.traffic.bytes_pushed += mine.numel() * partials[0].nbytes

    def _reduce(self, topk_idx: torch.Tensor) -> torch.Tensor:
        """Step 6: y [T, H] = sum of the slots in slot order. Slots nobody computed hold old data and are masked, never multiplied."""
        partials = self.arena.view("partials")[: topk_idx.shape[0]]
        is_routed = (topk_idx >= 0) & (topk_idx < self.cfg.num_experts)
        y = torch.zeros(partials.shape[0], partials.shape[2], dtype=torch.float32, device=partials.device)
        for slot in range(self.cfg.num_topk):
            y += torch.where(is_routed[:, slot, None], partials[:, slot].float(), 0.0)
        return y.to(partials.dtype)


def _copy(dst: torch.Tensor, src: torch.Tensor) -> None:
    """Copy unless the producer already wrote there (`layer.inputs`)."""
    if dst.data_ptr() != src.data_ptr():
        dst.copy_(src)


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    """Rows as bytes: indexed copies of float8 rows are not implemented for every torch version and device."""
    return t.view(torch.uint8)
