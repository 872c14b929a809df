"""NcclTransport: all-to-all through torch.distributed. For comparison, and for ranks that cannot reach each other's memory.

Eager only: counts go through the host. Received rows never exceed the pool; skewed routing takes more passes.

Legend: T tokens of this rank, K top-k slots, E experts, e local experts, W ranks, P pool rows, H hidden, N rows this rank sends.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megamoe.comm import Arena
from megamoe.config import MoEConfig
from megamoe.engines.transports.host_driven import folded_tokens, load_kernels, meet
from megamoe.engines.transports.nccl_plan import ExchangePlan, plan_exchange
from megamoe.errors import EngineUnavailableError
from megamoe.formats import QuantizedTokens

# A row on the wire: H codes, 4 bytes of top-k weight, its exponent, and padding that keeps rows at multiples of 16 bytes.
_TAIL_BYTES = 16


@dataclass(frozen=True, eq=False)
class ExchangedRows:
    """Rows whose results go to `out`; `order` brings rows from order of arrival to expert order."""

    codes: torch.Tensor  # [P, H] float8_e4m3fn
    sf: torch.Tensor  # [P] uint8
    row_weight: torch.Tensor  # [P] float32
    offsets: torch.Tensor  # [e+1] int32
    bounds: torch.Tensor  # [1, 2] int32
    out: torch.Tensor  # [P, H] bfloat16
    order: torch.Tensor  # [n] int64
    pass_idx: int


class NcclTransport:
    """All-to-all over the arena's group; of the arena it uses this rank's memory only.

    Nobody can wake a rank that waits inside a collective. So each rank first does all that can fail on it alone, and the ranks meet by
    signals, with a deadline, before the first collective and after the last one.

    Raises:
        EngineUnavailableError: torch.distributed is not initialised, or the group has no collectives for the device.
    """

    is_capturable = False
    scatters = False

    def __init__(self, cfg: MoEConfig, arena: Arena):
        if not dist.is_initialized():
            raise EngineUnavailableError("MegaMoE: transport 'nccl' cannot run here: torch.distributed is not initialised; "
                                         "unset MEGAMOE_TRANSPORT")
        if arena.device.type == "cuda" and "nccl" not in (collectives := dist.get_backend_config(arena.group)):
            raise EngineUnavailableError(f"MegaMoE: transport 'nccl' cannot run here: the backend of the group must be nccl for cuda, got "
                                         f"{collectives}; pass group=torch.distributed.new_group(backend='nccl')")
        arena.claim("host")
        self._arena, self._group = arena, arena.group
        self._num_experts = cfg.num_experts
        num_pool_rows, device = arena.dims.pool_rows, arena.device
        self._sf = torch.empty(num_pool_rows, dtype=torch.uint8, device=device)
        self._row_weight = torch.empty(num_pool_rows, dtype=torch.float32, device=device)
        self._out = torch.empty(num_pool_rows, cfg.hidden, dtype=torch.bfloat16, device=device)
        self.num_passes = 0
        load_kernels(cfg.hidden, device)

    def dispatch(self, x, x_sf, topk_idx, topk_weights, expert_load) -> None:
        tokens, expert = folded_tokens(x, x_sf), topk_idx.flatten()
        self._is_routed = (topk_idx >= 0) & (topk_idx < self._num_experts)  # [T, K]
        entry = self._is_routed.flatten().nonzero().squeeze(1)
        self._entry = entry[expert[entry].argsort(stable=True)]  # [N] token * K + slot, by expert
        self._wire = _pack_rows(tokens, topk_weights, self._entry)
        counts = torch.bincount(expert[self._entry], minlength=self._num_experts)
        meet(self._arena, "inputs_ready", "dispatch")
        self._plan = self._exchange_counts(counts)
        self.num_passes = self._plan.num_passes
        expert_load += self._plan.receive_counts.sum((0, 1)).to(expert_load.device)

    def rows(self, pass_idx: int) -> ExchangedRows:
        plan, device = self._plan, self._arena.device
        received = self._all_to_all(self._wire[self._sent(pass_idx)], *self._splits(pass_idx))
        num_rows = len(received)
        order, offsets = plan.expert_order(pass_idx).to(device), plan.offsets(pass_idx)
        received = received[order]
        codes = self._arena.view("pool_x")
        hidden = codes.shape[1]
        codes[:num_rows].view(torch.uint8).copy_(received[:, :hidden])
        self._row_weight[:num_rows] = received[:, hidden:hidden + 4].contiguous().view(torch.float32).squeeze(1)
        self._sf[:num_rows] = received[:, hidden + 4]
        bounds = torch.tensor([[0, num_rows]], dtype=torch.int32, device=device)
        return ExchangedRows(codes, self._sf, self._row_weight, offsets.to(device), bounds, self._out, order, pass_idx)

    def push(self, rows: ExchangedRows) -> None:
        send, receive = self._splits(rows.pass_idx)
        results = torch.empty_like(self._out[: len(rows.order)])
        results[rows.order] = self._out[: len(rows.order)]
        partials = self._arena.view("partials").flatten(0, 1)  # [T * K, H]
        partials[self._entry[self._sent(rows.pass_idx)]] = self._all_to_all(results, receive, send)

    def finish(self, y) -> None:
        meet(self._arena, "combine_ready", "combine")
        partials = self._arena.view("partials")[: len(y)]
        total = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
        for slot in range(partials.shape[1]):
            total += torch.where(self._is_routed[:, slot, None], partials[:, slot].float(), 0.0)
        y.copy_(total)

    def _exchange_counts(self, counts: torch.Tensor) -> ExchangePlan:
        """counts [E] int64 -> the plan, from the counts of every rank. Sync: blocks the host."""
        arena = self._arena
        gathered = [torch.empty_like(counts) for _ in range(arena.num_ranks)]
        dist.all_gather(gathered, counts, group=self._group)
        return plan_exchange(torch.stack(gathered).cpu(), arena.rank, arena.dims.pool_rows)

    def _sent(self, pass_idx: int) -> torch.Tensor:
        """Which of this rank's rows go out in a pass: [n] int64, by receiver."""
        plan = self._plan
        ranges = zip(plan.send_begin[pass_idx].tolist(), plan.send_counts[pass_idx].tolist())
        return torch.cat([torch.arange(begin, begin + count) for begin, count in ranges]).to(self._arena.device)

    def _splits(self, pass_idx: int) -> tuple[list[int], list[int]]:
        """Rows sent to and received from each rank in a pass."""
        return self._plan.send_counts[pass_idx].tolist(), self._plan.receive_counts[pass_idx].sum(1).tolist()

    def _all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        received = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(received, rows, receive, send, group=self._group)
        return received


def _pack_rows(tokens: QuantizedTokens, topk_weights: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
    """[N, H + 16] uint8, one row per (token, slot) in `entry`."""
    token = entry // topk_weights.shape[1]
    hidden = tokens.shape[1]
    wire = torch.zeros(len(entry), hidden + _TAIL_BYTES, dtype=torch.uint8, device=entry.device)
    wire[:, :hidden] = tokens.codes.view(torch.uint8)[token]
    wire[:, hidden:hidden + 4] = topk_weights.flatten()[entry][:, None].view(torch.uint8)
    wire[:, hidden + 4] = tokens.sf[token, 0]
    return wire
