"""The unfused engine: one kernel per step on Hopper, FP8 tokens x FP4 experts. docs/unfused.md shows the kernels of a call.

This file owns the weights in kernel layout and the order of the steps; how tokens cross ranks is the transport's business.

Legend: T tokens of this rank, K top-k slots, e local experts, P pool rows, H hidden, I intermediate.
"""

import torch

from megamoe.comm import Arena
from megamoe.config import MoEConfig
from megamoe.engines.base import arena_token_views
from megamoe.engines.packed_experts import ACT_GROUP, PackedExperts, gate_constants
from megamoe.engines.transports import ReceivedRows, Transport, create_transport
from megamoe.env import env
from megamoe.formats import ExpertWeights, QuantizedTokens
from megamoe.kernels import devices
from megamoe.kernels.fold_tokens import fold_tokens
from megamoe.kernels.fp4_gemm import allocate_workspace, fp4_gemm, num_sms
from megamoe.kernels.moe_gemms import MoEGemms, all_moe_gemms, load_gemms
from megamoe.kernels.tuning.moe_shape import MoEShape, token_bucket


class Scratch:
    """Memory between the kernels of a call that is not in the arena. Calls on one arena follow each other, so they share it."""

    def __init__(self, arena: Arena):
        self.act_row_sf = torch.empty(arena.dims.pool_rows, 1, dtype=torch.uint8, device=arena.device)
        self.gemm_workspace = allocate_workspace(arena.device.index)


class UnfusedEngine:
    """Quantise, dispatch, grouped GEMM with SwiGLU, grouped GEMM, combine: each a kernel, all on the current stream.

    Collective: every rank of the arena's group calls `forward` the same number of times. Construction compiles the transport's kernels,
    `load` the GEMMs of every number of tokens, so a call neither compiles nor waits for the device.
    """

    name = "unfused"
    act_group = ACT_GROUP
    traffic = None

    def __init__(self, cfg: MoEConfig, arena: Arena):
        self.cfg, self.arena = cfg, arena
        with devices.current(arena.device.index):
            self._transport: Transport = create_transport(env.transport, cfg, arena)
            self._scratch: Scratch = arena.shared("unfused scratch", lambda: Scratch(arena))
        self.is_synchronous = not self._transport.is_capturable
        self._experts: PackedExperts | None = None
        self._gemms: dict[int, MoEGemms] = {}  # by token_bucket
        self._gate = gate_constants(cfg)

    @property
    def is_loaded(self) -> bool:
        return self._experts is not None

    def load(self, weights: ExpertWeights) -> None:
        """Bring the experts into kernel layout and load the GEMM kernels. Sync: reads the device once per expert."""
        cfg, device = self.cfg, self.arena.device
        with devices.current(device.index):
            experts = PackedExperts.pack(weights.to_precision(cfg.precision), device)
            shape = MoEShape(hidden=cfg.hidden, intermediate=cfg.intermediate, num_experts=cfg.num_experts, num_topk=cfg.num_topk,
                             num_ranks=self.arena.num_ranks, has_down_bias=experts.down_bias is not None,
                             scatter=self._transport.scatters, num_sms=num_sms(device.index))
            gemms = all_moe_gemms(shape, cfg.max_tokens_per_rank)
            load_gemms(frozenset(config for pair in gemms.values() for config in (pair.gate_up, pair.down)), device.index)
        self._experts, self._gemms = experts, gemms

    def weights(self) -> ExpertWeights | None:
        return None if self._experts is None else self._experts.unpack()

    def token_views(self):
        return arena_token_views(self.arena)

    def forward(self, x, x_sf, topk_idx, topk_weights, expert_load):
        """x [T, H] BF16 (codes with x_sf [T, H/32] if given), topk_idx [T, K] int64, topk_weights [T, K] float32 -> y [T, H] BF16.

        Adds the rows received to `expert_load` [e] int64. Sync: stream-ordered with the arena transport; y is NaN if the call fails.
        """
        num_tokens, transport = topk_idx.shape[0], self._transport
        gemms = self._gemms[token_bucket(num_tokens)]
        with devices.current(self.arena.device.index):
            y = torch.empty(num_tokens, self.cfg.hidden, dtype=torch.bfloat16, device=self.arena.device)
            transport.dispatch(x, x_sf, topk_idx, topk_weights, expert_load)
            for pass_idx in range(transport.num_passes):
                rows = transport.rows(pass_idx)
                self._run_experts(rows, gemms)
                transport.push(rows)
            transport.finish(y)
        return y

    def _run_experts(self, rows: ReceivedRows, gemms: MoEGemms) -> None:
        """Both linears of one pass: rows -> pool_a -> rows.row_dst or rows.out."""
        experts, workspace = self._experts, self._scratch.gemm_workspace
        act_codes, act_sf = self.arena.view("pool_a"), self.arena.view("pool_a_sf")
        fp4_gemm(rows.codes, rows.sf, experts.gate_up, gemms.gate_up, offsets=rows.offsets, a_codes=act_codes, a_sf=act_sf,
                 bias=experts.kernel_gate_up_bias, row_weight=rows.row_weight, workspace=workspace, **self._gate)
        in_place = QuantizedTokens(act_codes, self._scratch.act_row_sf, "token")
        act = fold_tokens(QuantizedTokens(act_codes, act_sf, ACT_GROUP), rows.bounds, in_place)
        has_bias = experts.kernel_down_bias is not None
        destination = {"row_dst": rows.row_dst} if self._transport.scatters else {"out": rows.out}
        fp4_gemm(act.codes, act.sf, experts.down, gemms.down, offsets=rows.offsets, bias=experts.kernel_down_bias,
                 row_weight=rows.row_weight if has_bias else None, workspace=workspace, **destination)
