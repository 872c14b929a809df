"""The fused engine: stage, route, then one persistent kernel from pulling the rows to summing the slots. Hopper, one NVLink domain.

Legend: T tokens of this rank, K top-k slots, e local experts, H hidden.
"""

import torch

from megamoe.comm import Arena
from megamoe.config import X_GROUP, MoEConfig
from megamoe.engines.packed_experts import ACT_GROUP, PackedExperts, gate_constants
from megamoe.formats import ExpertWeights
from megamoe.kernels import devices
from megamoe.kernels.fp4_gemm import num_sms
from megamoe.kernels.mega_moe import MegaExperts, MegaMoe
from megamoe.kernels.mega_moe_config import MegaMoeConfig, has_thread_order
from megamoe.kernels.moe_dispatch import ArenaDispatch
from megamoe.kernels.tuning.mega import all_mega
from megamoe.kernels.tuning.moe_shape import MoEShape, token_bucket

# Weights of linear 1 that moe_route brings to L2 while it waits for the other ranks, where nearly every expert gets rows: from this many
# per expert on. Less than half of an H200's L2, since the rest has to hold what is in use; 16 to 40 MB are within 1 %.
ROWS_PER_EXPERT_FOR_AHEAD = 2
AHEAD_BYTES = 24 << 20


class FusedKernels:
    """The kernels of a call on one arena, and their memory. Calls follow each other, so all layers of the arena share them."""

    def __init__(self, arena: Arena):
        calls, device = arena.drive_by_device(), arena.device
        where = arena.layout, arena.rank, arena.peer_ptrs, arena.own_bytes, device, calls
        self.dispatch = ArenaDispatch(*where, is_one_pass=True)
        self.mega = MegaMoe(*where, num_blocks=num_sms(device.index))


class FusedEngine:
    """moe_stage, moe_route, moe_assign, mega_moe, all on the current stream.

    Collective: every rank of the arena's group calls `forward` the same number of times. Construction compiles the routing kernels,
    `load` mega_moe for every number of tokens, so a call neither compiles nor waits for the device.
    """

    name = "fused"
    act_group = ACT_GROUP
    is_synchronous = False
    traffic = None

    def __init__(self, cfg: MoEConfig, arena: Arena):
        self.cfg, self.arena = cfg, arena
        with devices.current(arena.device.index):
            self._kernels: FusedKernels = arena.shared("fused kernels", lambda: FusedKernels(arena))
        self.timeline: torch.Tensor | None = None  # from testing.timeline.allocate: calls record into it, by slower kernels
        self._packed: PackedExperts | None = None
        self._experts: MegaExperts | None = None
        self._configs: dict[int, MegaMoeConfig] = {}  # by token_bucket
        self._ahead: torch.Tensor | None = None  # the weights that the first tasks read

    @property
    def is_loaded(self) -> bool:
        return self._packed is not None

    def load(self, weights: ExpertWeights) -> None:
        """Bring the experts into kernel layout and load the kernels. Sync: reads the device once per expert."""
        cfg, arena = self.cfg, self.arena
        device = arena.device
        with devices.current(device.index):
            packed = PackedExperts.pack(weights.to_precision(cfg.precision), device, has_thread_order(cfg.hidden, cfg.intermediate))
            shape = MoEShape(hidden=cfg.hidden, intermediate=cfg.intermediate, num_experts=cfg.num_experts, num_topk=cfg.num_topk,
                             num_ranks=arena.num_ranks, has_down_bias=packed.down_bias is not None, scatter=True,
                             num_sms=num_sms(device.index))
            configs = all_mega(shape, cfg.max_tokens_per_rank, arena.dims.pool_rows)
            self._kernels.mega.load(configs.values())
        self._packed, self._experts, self._configs = packed, packed.for_mega_moe(gate_constants(cfg)), configs
        self._ahead = packed.gate_up.blocks.view(-1)[:AHEAD_BYTES]

    def weights(self) -> ExpertWeights | None:
        """The canonical form, unpacked anew by each call: nothing holds a second copy."""
        return None if self._packed is None else self._packed.unpack()

    def token_views(self):
        """Beside the arena, where staging puts tokens in another order: as they are there they could not be staged again. Made when asked for;
        one for all layers of the arena."""
        arena, cfg = self.arena, self.cfg
        return arena.shared("fused token views", lambda: (
            torch.empty(cfg.max_tokens_per_rank, cfg.hidden, dtype=torch.float8_e4m3fn, device=arena.device),
            torch.empty(cfg.max_tokens_per_rank, cfg.hidden // X_GROUP, dtype=torch.uint8, device=arena.device)))

    def forward(self, x, x_sf, topk_idx, topk_weights, expert_load):
        """x [T, H] BF16 (codes with x_sf [T, H/32] if given), topk_idx [T, K] int64, topk_weights [T, K] float32 -> y [T, H] BF16.

        Adds the rows received to `expert_load` [e] int64. Sync: stream-ordered; y is NaN if the call fails.
        """
        num_tokens, dispatch = topk_idx.shape[0], self._kernels.dispatch
        with devices.current(self.arena.device.index):
            y = torch.empty(num_tokens, self.cfg.hidden, dtype=torch.bfloat16, device=self.arena.device)
            dispatch.stage(x, x_sf, topk_idx, topk_weights)
            self.arena.note_published()
            dispatch.route(expert_load, self._ahead if self._hits_nearly_every_expert(num_tokens) else None)
            self._kernels.mega.launch(self._configs[token_bucket(num_tokens)], self._experts, dispatch.rows(), y, self.timeline)
        return y

    def _hits_nearly_every_expert(self, num_tokens: int) -> bool:
        """If all ranks bring about as many tokens and the routing is even."""
        num_rows = num_tokens * self.arena.num_ranks * self.cfg.num_topk
        return num_rows >= ROWS_PER_EXPERT_FOR_AHEAD * self.cfg.num_experts
