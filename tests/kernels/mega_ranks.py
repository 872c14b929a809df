"""One GPU plays W ranks of a fused MoE call inside one cooperative launch; what each rank gets is judged against the FP64 oracle.

Legend: W ranks, T tokens of a rank, K top-k slots, E experts, H hidden, I intermediate.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from moe_ranks import Inputs, VirtualRanks

from megamoe.comm.protocol import ArenaDims
from megamoe.engines.packed_experts import ACT_GROUP, PackedExperts
from megamoe.formats import ExpertWeights, FP4Weight
from megamoe.kernels import mega_moe
from megamoe.kernels.launch import Params
from megamoe.kernels.mega_moe_config import MegaMoeConfig
from megamoe.reference.oracle import moe_oracle
from megamoe.testing.compare import MAX_RELATIVE, assert_accepted, error_report

FP4_RMS, EXPONENT_SPREAD = 2.93, 2  # of uniformly random E2M1 codes; group exponents around their mean
MEDIAN_TOKENS = 16  # of fewer, one code that rounds the other way moves the median further than it may be
POISONED = ("x", "x_sf", "topk_idx", "topk_weights", "pool_x", "pool_x_sf", "pool_a", "pool_a_sf", "partials")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A layer: its arena and its gate."""

    dims: ArenaDims
    has_bias: bool = False
    limit: float | None = None
    alpha: float | None = None
    up_bias: float = 0.0

    @property
    def num_local_experts(self) -> int:
        return self.dims.num_experts // self.dims.num_ranks

    def experts(self) -> ExpertWeights:
        """All E experts, on the GPU."""
        return random_experts(self.dims.num_experts, self.dims.hidden, self.dims.intermediate, self.has_bias)


@functools.lru_cache(maxsize=2)
def random_experts(num_experts: int, hidden: int, intermediate: int, has_bias: bool) -> ExpertWeights:
    """Every code byte is random; values are of order one after each linear."""
    g = torch.Generator("cuda").manual_seed(hidden + intermediate)

    def weight(n: int, k: int) -> FP4Weight:
        exponent = 127 - round(math.log2(FP4_RMS * k**0.5))
        codes = torch.randint(0, 256, (num_experts, n, k // 2), dtype=torch.uint8, device="cuda", generator=g)
        scales = torch.randint(exponent - EXPONENT_SPREAD, exponent + EXPONENT_SPREAD + 1, (num_experts, n, k // 32), dtype=torch.uint8,
                               device="cuda", generator=g)
        return FP4Weight(codes, scales, check_nan=False)

    def bias(n: int) -> torch.Tensor | None:
        return torch.randn(num_experts, n, device="cuda", generator=g) * 0.5 if has_bias else None

    return ExpertWeights(weight(2 * intermediate, hidden), weight(hidden, intermediate), bias(2 * intermediate), bias(hidden))


def make_inputs(model: Model, num_tokens: int, seed: int, experts: Sequence[int] | None = None) -> Inputs:
    """Tokens on the GPU, whose slots name some of `experts` (default all of them and, in places, none), now and then one twice."""
    dims, g = model.dims, torch.Generator("cuda").manual_seed(seed)
    spread = torch.exp2(torch.randint(-4, 2, (num_tokens, dims.hidden // 32), device="cuda", generator=g).float()).repeat_interleave(32, 1)
    x = (torch.randn(num_tokens, dims.hidden, device="cuda", generator=g) * spread).bfloat16()
    candidates = torch.tensor([*range(-1, dims.num_experts)] if experts is None else experts, device="cuda")
    picked = torch.randint(0, len(candidates), (num_tokens, dims.num_topk), device="cuda", generator=g)
    weights = torch.rand(num_tokens, dims.num_topk, device="cuda", generator=g) + 0.1
    return Inputs(x, candidates[picked], weights / weights.sum(1, keepdim=True))


def inputs_with_counts(model: Model, counts: Sequence[int], seed: int) -> list[Inputs]:
    """One slot per token: expert i gets counts[i] rows, whose tokens are dealt to the ranks in turn."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expert = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(seed))]
    parts = [expert[rank::model.dims.num_ranks] for rank in range(model.dims.num_ranks)]
    found = [make_inputs(model, len(part), seed + rank) for rank, part in enumerate(parts)]
    for given, part in zip(found, parts):
        given.topk_idx.fill_(-1)
        given.topk_idx[:, 0] = part.cuda()
    return found


@dataclass(frozen=True)
class Ring:
    """How a call uses the pool; num_slots must be at least lag_tiles + 2 * band_tiles - 1."""

    num_slots: int
    band_tiles: int
    lag_tiles: int


class MegaRanks:
    """W ranks with their experts, each on a range of blocks. Every call finds NaN wherever it must not read.

    Args:
        model: of all ranks.
        config: of the kernel of all ranks.
        timeout_s: deadline of every device wait.
        num_blocks: of each rank; None: as many as there are SMs for.
    """

    def __init__(self, model: Model, config: MegaMoeConfig, timeout_s: float = 20.0, num_blocks: int | None = None):
        self.model, self.dims, self.config = model, model.dims, config
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.arenas = VirtualRanks(model.dims, timeout_s, is_one_pass=True)
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.num_blocks = num_blocks or num_sms // self.dims.num_ranks // config.cluster_blocks * config.cluster_blocks
        ptrs = [arena.data_ptr() for arena in self.arenas.arenas]
        self.megas = [mega_moe.MegaMoe(self.arenas.layout, rank, ptrs, self.arenas.arenas[rank], self.device, self.arenas.calls[rank],
                                       self.num_blocks) for rank in range(self.dims.num_ranks)]
        self.experts = [self._pack(rank) for rank in range(self.dims.num_ranks)]
        shape = mega_moe.stream_shape(config, self.dims, self.num_blocks)
        self._few: list[tuple[torch.Tensor, torch.Tensor, object]] = []  # calls of few tokens: y, what is due, context
        self.ring = Ring(shape.ring.num_slots, shape.band_tiles, shape.lag_tiles)  # the host's choice; any other may take its place

    def _pack(self, rank: int) -> mega_moe.MegaExperts:
        weights, model = self.model.experts(), self.model
        mine = slice(rank * model.num_local_experts, (rank + 1) * model.num_local_experts)
        biases = (None if bias is None else bias[mine] for bias in (weights.gate_up_bias, weights.down_bias))
        mine = ExpertWeights(weights.gate_up[mine], weights.down[mine], *biases)
        packed = PackedExperts.pack(mine, self.device, self.config.thread_order)
        return packed.for_mega_moe({"limit": math.inf if model.limit is None else model.limit,
                                    "alpha": 1.0 if model.alpha is None else model.alpha, "up_bias": model.up_bias})

    def poison(self) -> None:
        """NaN in all that a call has to write before it reads it."""
        for rank in range(self.dims.num_ranks):
            for name in POISONED:
                self.arenas.view(rank, name).view(torch.uint8).fill_(0xFF)
            self.megas[rank]._row_weight.fill_(torch.nan)
            self.megas[rank]._act_row_sf.fill_(0xFF)
            self.megas[rank]._row_dst.zero_()  # a row that is stored before it has a destination is dropped, and missing in y

    def prepare(self, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
        """Stage and route on every rank; the outputs to be, full of NaN."""
        for rank, given in enumerate(inputs):
            self.arenas.stage(rank, given)
        for rank in range(self.dims.num_ranks):
            self.arenas.ranks[rank].route(self.arenas.loads[rank], self.experts[rank].gate_up.blocks[:1])
        return [torch.full((len(given.x), self.dims.hidden), torch.nan, dtype=torch.bfloat16, device=self.device) for given in inputs]

    def params(self, rank: int, y: torch.Tensor) -> Params:
        """MegaMoeParams of the call that is staged, with `self.ring`."""
        params = self.megas[rank].params(self.config, self.experts[rank], self.arenas.ranks[rank].rows(), y)
        params.stream.ring.num_slots = params.flow.ring.num_slots = self.ring.num_slots
        params.stream.band_tiles, params.stream.lag_tiles = self.ring.band_tiles, self.ring.lag_tiles
        return params

    def launch(self, ranks: Iterable[int], outputs: Sequence[torch.Tensor]) -> None:
        """mega_moe of these ranks, in one launch; waits for its end."""
        blocks = [self.params(rank, outputs[rank]) for rank in ranks]
        mega_moe.launch_virtual(self.config, self.dims, blocks, self.num_blocks, self.device)
        torch.cuda.synchronize()

    def call(self, inputs: Sequence[Inputs]) -> list[torch.Tensor]:
        """A whole call of every rank: y [T, H] of each."""
        self.poison()
        outputs = self.prepare(inputs)
        self.launch(range(self.dims.num_ranks), outputs)
        return outputs

    def run(self, inputs: Sequence[Inputs], context: object = "") -> list[torch.Tensor]:
        """Two calls: no failure, counters back at zero, the expected loads, equal bits, and the acceptance. Returns y of each rank."""
        self.arenas.loads.zero_()
        outputs = self.call(inputs)
        self.assert_clean(context)
        for rank in range(self.dims.num_ranks):
            assert torch.equal(self.arenas.loads[rank].cpu(), received(self.model, inputs, rank)), f"expert loads of rank {rank}; {context}"
        self.judge(inputs, outputs, context)
        for rank, (again, y) in enumerate(zip(self.call(inputs), outputs)):
            differing = (again.view(torch.int16) != y.view(torch.int16)).any(1).nonzero().flatten().tolist()
            assert not differing, f"rank {rank}: tokens {differing[:8]} differ between two runs; {context}"
        self.assert_clean(context)
        return outputs

    def assert_clean(self, context: object = "") -> None:
        """Nothing failed and nothing is left in a counter."""
        for rank, (calls, mega) in enumerate(zip(self.arenas.calls, self.megas)):
            failure = calls.failure()
            assert failure is None, f"{failure.describe(rank, calls.timeout_s)}; {context}"
            left = mega.counters.nonzero().flatten().tolist()
            assert not left, f"rank {rank}: counters {left[:8]} are not zero after a call; {context}"

    def judge(self, inputs: Sequence[Inputs], outputs: Sequence[torch.Tensor], context: object = "") -> None:
        """The acceptance of the numerics contract, over all ranks; a failure names a rank, its worst tokens, and the slots that are wrong.

        Calls of few tokens are judged for their largest error at once, and together for their median.
        """
        expected = [oracle(self.model, given) for given in inputs]
        y, due = torch.cat(list(outputs)), torch.cat(expected)
        try:
            if len(y) >= MEDIAN_TOKENS:
                assert_accepted(y, due, context=str(context))
            else:
                self._judge_few(y, due, context)
        except AssertionError as wrong:
            lines = (self._explain(rank, *found) for rank, found in enumerate(zip(inputs, outputs, expected)))
            raise AssertionError("\n".join([str(wrong), *lines])) from None

    def _judge_few(self, y: torch.Tensor, due: torch.Tensor, context: object) -> None:
        error = error_report(y, due)
        assert error.max <= MAX_RELATIVE, f"relative error per token at most {MAX_RELATIVE}, got {error}; {context}"
        assert torch.equal(y.isnan(), due.isnan()) and not y.isinf().any(), f"NaN elsewhere than in the oracle, or Inf; {context}"
        self._few.append((y, due, context))
        if sum(len(found) for found, _, _ in self._few) >= MEDIAN_TOKENS:
            ys, dues, contexts = zip(*self._few)
            self._few.clear()
            assert_accepted(torch.cat(ys), torch.cat(dues), context=str(contexts))

    def _explain(self, rank: int, given: Inputs, y: torch.Tensor, expected: torch.Tensor) -> str:
        """The wrong tokens of a rank, and what the partials of the first one say."""
        norms = expected.norm(dim=1, keepdim=True).clamp(min=1e-9)
        is_wrong = ~(((y.double() - expected) / norms).norm(dim=1) <= MAX_RELATIVE) & expected.isfinite().all(1)
        wrong = (is_wrong | (y.isfinite().all(1) != expected.isfinite().all(1))).nonzero().flatten().tolist()
        if not wrong:
            return f"rank {rank}: no token alone is wrong"
        token = wrong[0]
        lines = [f"rank {rank}: {len(wrong)} of {len(y)} tokens are wrong: {wrong[:16]}; slots of token {token}:"]
        for slot, expert in enumerate(given.topk_idx[token].tolist()):
            if 0 <= expert < self.dims.num_experts:
                one = Inputs(given.x[token:token + 1], given.topk_idx[token:token + 1, slot:slot + 1],
                             given.topk_weights[token:token + 1, slot:slot + 1])
                due, got = oracle(self.model, one)[0], self.arenas.view(rank, "partials")[token, slot].double()
                blocks = [f"{error_report(g[None], d[None]).max:.1e}" for g, d in zip(got.split(64), due.split(64))]
                lines.append(f"  slot {slot}, expert {expert}: error per 64 channels {' '.join(blocks[:48])}, NaN {int(got.isnan().sum())}")
        return "\n".join(lines)

    def start_over(self) -> None:
        """What Arena.reset does when no kernel runs."""
        self.arenas.zero_signals()
        for calls in self.arenas.calls:
            calls.start_over()


def oracle(model: Model, given: Inputs) -> torch.Tensor:
    """[T, H] float64 on the GPU."""
    weights = model.experts()
    return moe_oracle(given.x, given.topk_idx, given.topk_weights, *((w.codes, w.scales) for w in (weights.gate_up, weights.down)),
                      gate_up_bias=weights.gate_up_bias, down_bias=weights.down_bias, precision="fp8xfp4", act_group=ACT_GROUP,
                      swiglu_limit=model.limit, swiglu_alpha=model.alpha, swiglu_up_bias=model.up_bias)


def received(model: Model, inputs: Sequence[Inputs], rank: int) -> torch.Tensor:
    """Rows that each local expert of `rank` should get, [e] on the CPU."""
    idx = torch.cat([given.topk_idx.flatten() for given in inputs])
    idx = idx[(idx >= 0) & (idx < model.dims.num_experts)]
    counts = torch.bincount(idx, minlength=model.dims.num_experts)
    return counts[rank * model.num_local_experts: (rank + 1) * model.num_local_experts].cpu()


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int16)
