"""MegaMoE: the MoE block of a model as one nn.Module. It owns a router (if given), this rank's experts, an engine and an arena.

Legend: T tokens on this rank, K top-k slots, E experts, e local experts, W ranks, H hidden, I intermediate.
"""

import torch
from torch import nn

from megamoe.comm import Arena, agree
from megamoe.config import MoEConfig
from megamoe.engines import Engine, choose_engine, create_engine
from megamoe.env import env
from megamoe.errors import EngineUnavailableError, check
from megamoe.formats import ExpertWeights, QuantizedTokens
from megamoe.layers import moe_op
from megamoe.layers.expert_state import expert_weights_from_state, expert_weights_to_state
from megamoe.layers.moe_inputs import OP, InputViews, check_inputs


class MegaMoE(nn.Module):
    """Expert-parallel MoE layer: dispatch, gated expert MLPs, weighted combine.

    Construction is collective over the EP group: every rank passes the same arguments (a difference raises on all of them). Experts
    [rank * e, (rank + 1) * e) live on `rank`. Calls are collective too: every rank calls the same layers in the same order, with any
    number of tokens including zero.

    Args:
        cfg: what the layer computes.
        group: process group of the EP ranks. None: the default group, or a single rank if torch.distributed is not initialised.
        device: where tokens, weights and arena live.
        engine: "auto" or the name of an engine; `repr` shows which one runs and why.
        backend: symmetric memory of the arena: "auto", "local", "shm", "torch", "nvshmem" or "unmapped".
        arena: share the arena of another layer of the same shape (`other.arena`) instead of creating one.
        arena_bytes: byte budget of the arena of this rank; a smaller one makes skewed routing slower, never wrong.
        timeout_s: deadline in seconds of every wait for a peer.
        router: module mapping x [T, H] (and input_ids) to (topk_idx, topk_weights); then `layer(x)` is enough.
        shared_expert: module mapping x [T, H] to [T, H], added to the routed result.

    Raises:
        CollectiveMismatchError: another rank passed other arguments; names the field. Raised on every rank.
        ArenaBudgetError: the config does not fit `arena_bytes`. ArenaError: the memory could not be created.
        EngineUnavailableError: the engine or backend asked for cannot run here; says why.
        ValueError: num_experts is not divisible by the ranks.
    """

    def __init__(self, cfg: MoEConfig, *, group=None, device="cpu", engine="auto", backend="auto", arena: Arena | None = None,
                 arena_bytes: int | None = None, timeout_s: float = 120.0, router: nn.Module | None = None,
                 shared_expert: nn.Module | None = None):
        super().__init__()
        self.cfg = cfg
        self._owns_arena = arena is None
        if arena is None:
            arena = Arena.create(cfg, group=group, device=device, backend=backend, arena_bytes=arena_bytes, timeout_s=timeout_s)
        self.arena = arena
        self.engine, self._engine_reason = self._agree_on_engine(engine)
        self.router = router
        self.shared_expert = shared_expert
        self._expert_load = torch.zeros(self.num_local_experts, dtype=torch.int64, device=arena.device)
        self._routing_error: str | None = None
        self._key = moe_op.register(self)

    @property
    def num_local_experts(self) -> int:
        return self.cfg.num_local_experts(self.arena.num_ranks)

    @property
    def device(self) -> torch.device:
        return self.arena.device

    @property
    def inputs(self) -> InputViews:
        """Views for producers that write a call's inputs in place. They may be written between calls, never during one.

        In the arena, but for x and x_sf of the fused engine, which stages tokens in another order. The unfused engine folds tokens in place: all
        bytes of a token's x_sf become its one exponent."""
        return InputViews(*self.engine.token_views(), self.arena.view("topk_idx"), self.arena.view("topk_weights"))

    def load_experts(self, gate_up, down, gate_up_bias=None, down_bias=None) -> None:
        """Hand over this rank's experts, in canonical order (all gate rows, then all up rows). Local, not collective.

        Args:
            gate_up: [e, 2I, H] floating-point tensor, FP4Weight or FP8Weight. down: [e, H, I] likewise.
            gate_up_bias: [e, 2I] or None. down_bias: [e, H] or None; it enters weighted by the slot's top-k weight.

        Raises:
            ValueError: a shape does not match the config. FormatError: values that the precision cannot hold.
        """
        e, hidden, intermediate = self.num_local_experts, self.cfg.hidden, self.cfg.intermediate
        expected = {"gate_up": (e, 2 * intermediate, hidden), "down": (e, hidden, intermediate),
                    "gate_up_bias": (e, 2 * intermediate), "down_bias": (e, hidden)}
        given = {"gate_up": gate_up, "down": down, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
        for name, weight in given.items():
            if weight is not None:
                check(tuple(weight.shape) == expected[name], f"{OP}.load_experts", f"shape of {name}", expected[name], tuple(weight.shape),
                      f"pass experts {self.arena.rank * e}..{self.arena.rank * e + e - 1}, the ones of rank {self.arena.rank}")
        self.engine.load(ExpertWeights(gate_up, down, gate_up_bias, down_bias))

    def forward(self, x, topk_idx=None, topk_weights=None, *, input_ids=None) -> torch.Tensor:
        """Run the layer on this rank's tokens. Collective over the EP group.

        Args:
            x: [T, H] BF16 (FP32 for precision "fp32"), or QuantizedTokens with group 32; T <= max_tokens_per_rank, 0 allowed.
            topk_idx: [T, K] int64 global expert indices, -1 = skip the slot. Omit with a router.
            topk_weights: [T, K] float32. Omit with a router.
            input_ids: [T] token ids for routers that hash them.

        Returns:
            [T, H] BF16 (FP32 for precision "fp32"): a fresh tensor, zero for a token without slots, NaN for a token with NaN or Inf in it.

        Raises:
            ValueError: bad argument, or a topk_idx outside [-1, E): that slot is skipped, the other ranks finish, and this rank raises
                naming rank, token and slot.
            PeerTimeoutError: a peer stayed silent past the deadline (then `reset` on all ranks) or failed before the call.

        Sync: the reference engine returns when every peer has finished with this call. The unfused and the fused engine are stream-ordered
        and may be captured in a CUDA graph; what their kernels find wrong, a silent peer or a topk_idx, is raised by the next call after it
        has been enqueued, by `check`, or at once with MEGAMOE_CHECK=1. A call that failed gives NaN.
        """
        codes, x_sf = (x.codes, x.sf) if isinstance(x, QuantizedTokens) else (x, None)
        if topk_idx is None:
            topk_idx, topk_weights = self._route(x, input_ids)
        # Eager calls go straight to the engine: the operator exists for graphs, and a registered operator costs 20 us a call.
        if torch.compiler.is_compiling():
            y = moe_op.moe(codes, x_sf, topk_idx, topk_weights, self._expert_load, self.arena.num_calls, self._key)
        else:
            y = self._run(codes, x_sf, topk_idx, topk_weights, self._expert_load, self.arena.num_calls)
        return y if self.shared_expert is None else y + self.shared_expert(x)

    def expert_load(self) -> torch.Tensor:
        """Tokens received per local expert [e] int64 since the last call of this method."""
        load = self._expert_load.clone()
        self._expert_load.zero_()
        return load

    def check(self) -> None:
        """Wait for the calls so far, and raise what they met and nobody has seen yet.

        Raises:
            PeerTimeoutError: a peer was silent or aborted; the call's result is NaN.
            ValueError: a topk_idx out of range.

        Sync: waits for the device. Not to be called inside a graph capture; call it after replays.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._raise_reported()

    def reset(self) -> None:
        """Make the arena usable again after a PeerTimeoutError. Collective; every rank of the group must be alive."""
        self._routing_error = None
        self.arena.reset()

    def close(self) -> None:
        """Free the arena if this layer created it. Collective and idempotent."""
        if self._owns_arena:
            self.arena.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def extra_repr(self) -> str:
        cfg = self.cfg
        return (f"hidden={cfg.hidden}, intermediate={cfg.intermediate}, experts={cfg.num_experts} ({self.num_local_experts} local), "
                f"topk={cfg.num_topk}, precision={cfg.precision}, engine={self.engine.name} ({self._engine_reason}), "
                f"act_group={self.engine.act_group}, backend={self.arena.backend}, rank={self.arena.rank}/{self.arena.num_ranks}, "
                f"max_tokens_per_rank={cfg.max_tokens_per_rank}, arena={self.arena.num_bytes / 2**20:.1f} MiB")

    def _agree_on_engine(self, requested: str) -> tuple[Engine, str]:
        """A shared arena fixes the sizes; everything else about the layer must match between ranks too. Returns the engine and why."""
        engine, reason, name, error = None, "", "", None if self._owns_arena else self.arena.mismatch(self.cfg)
        try:
            name, reason = choose_engine(requested, self.arena.device, self.cfg.precision, self.arena.is_mapped)
        except EngineUnavailableError as caught:
            error = caught
        agree(self.arena.group, OP, {**self.cfg.as_dict(), "engine": requested, "chosen engine": name}, error)
        try:
            engine = create_engine(name, self.cfg, self.arena)
        except (ValueError, RuntimeError) as caught:
            error = caught
        # Kernels are compiled by now on every rank: no call waits for a compiler.
        agree(self.arena.group, OP, {}, error)
        return engine, reason

    def _route(self, x, input_ids):
        check(self.router is not None, OP, "topk_idx", "given, as the layer has no router", None, "pass topk_idx and topk_weights")
        return self.router(x) if input_ids is None else self.router(x, input_ids)

    def _run(self, x, x_sf, topk_idx, topk_weights, expert_load, num_calls) -> torch.Tensor:
        """The operator's body: host checks, the engine, error bookkeeping. A local failure is posted, so that peers raise and do not wait.

        `expert_load` and `num_calls` are written where the caller says: a compiler may pass copies and write them back.
        """
        num_calls += 1
        self.arena.begin_call()
        try:
            check(self.engine.is_loaded, OP, "experts", "loaded", "none", "call load_experts first")
            check_inputs(self.cfg, self.device, x, x_sf, topk_idx, topk_weights)
            y = self.engine.forward(x, x_sf, topk_idx, topk_weights, expert_load)
        except BaseException as error:
            self.arena.fail_call(error)
            raise
        if self.engine.is_synchronous:
            self._note_routing_errors(topk_idx)
        elif torch.cuda.is_current_stream_capturing():
            return y
        # After the call, so that a rank with an old error to raise stays in step with its peers.
        if env.check:
            self.check()
        else:
            self._raise_reported()
        return y

    def _raise_reported(self) -> None:
        """Raise what is known without waiting for the device: one error per call of this method, a lost call first."""
        calls = self.arena.device_calls
        if calls is not None:
            if (found := calls.routing_error()) is not None:
                self._routing_error = self._routing_error or self._describe_routing_error(*found)
            if (failure := self.arena.take_failure()) is not None:
                raise failure
        error, self._routing_error = self._routing_error, None
        if error is not None:
            raise ValueError(error)

    def _note_routing_errors(self, topk_idx: torch.Tensor) -> None:
        bad = torch.nonzero((topk_idx < -1) | (topk_idx >= self.cfg.num_experts))
        if bad.numel():
            token, slot = bad[0].tolist()
            self._routing_error = self._describe_routing_error(token, slot, int(topk_idx[token, slot]), bad.shape[0])

    def _describe_routing_error(self, token: int, slot: int, value: int, number: int) -> str:
        return (f"{OP}: topk_idx must be in [-1, {self.cfg.num_experts}), got {value} on rank {self.arena.rank}, token {token}, "
                f"slot {slot} ({number} such slots were skipped); correct the router")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (weights := self.engine.weights()) is not None:
            destination.update({prefix + name: tensor for name, tensor in expert_weights_to_state(weights).items()})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        weights, own_keys, missing = expert_weights_from_state(state_dict, prefix)
        missing_keys.extend(missing)
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own_keys]
        if weights is not None:
            self.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
