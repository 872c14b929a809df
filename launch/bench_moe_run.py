"""One rank of the MoE benchmark: random experts and tokens, calls with and without a CUDA graph, aligned timing, comparison with FP64.

Legend: T tokens of this rank, K top-k slots, E experts, W ranks, H hidden, I intermediate.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from bench_moe_cases import draw_routing, expert_counts, generator

from megamoe import FP4Weight, MegaMoE, MoEConfig
from megamoe.errors import EngineUnavailableError
from megamoe.formats import ExpertWeights
from megamoe.reference.oracle import moe_oracle
from megamoe.testing.bench import FLUSH_BYTES
from megamoe.testing.compare import ErrorReport, assert_accepted

CHECKED_TOKENS = 8  # of each rank
FP4_RMS = 2.93  # of uniformly random E2M1 codes
EXPONENT_SPREAD = 2  # group exponents are at most this far from the mean
SLEEP_US, CYCLES_PER_US = 200, 2000
Launch = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Draw:
    """Inputs of one call on this rank, and where the rows of all ranks go."""

    x: torch.Tensor  # [T, H] BF16
    topk_idx: torch.Tensor  # [T, K] int64
    topk_weights: torch.Tensor  # [T, K] float32
    counts: torch.Tensor  # [W, E] int64 on the CPU


def make_draw(cfg: MoEConfig, routing: str, num_tokens: int, seed: int, device: torch.device) -> Draw:
    """Draw number `seed`: the same for every contender, different on every rank. Collective."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    topk_idx, topk_weights = draw_routing(cfg, routing, num_tokens, seed, rank, num_ranks)
    x = torch.randn(num_tokens, cfg.hidden, generator=generator(4, seed, rank, device=device), device=device).bfloat16()
    counts = torch.zeros(num_ranks, cfg.num_experts, dtype=torch.int64)
    counts[rank] = expert_counts(topk_idx, cfg.num_experts)
    counts = counts.to(device)
    dist.all_reduce(counts)
    return Draw(x, topk_idx.to(device), topk_weights.to(device), counts.cpu())


def random_experts(cfg: MoEConfig, experts: Sequence[int], has_bias: bool, device: torch.device | str) -> ExpertWeights:
    """The global experts named, each from a seed of its own, so that a rank can make those of any other.

    Every code byte is random; values are of order one after each linear.
    """
    sizes = {"gate_up": (2 * cfg.intermediate, cfg.hidden), "down": (cfg.hidden, cfg.intermediate)}
    codes, scales = ({name: torch.empty(len(experts), n, k // width, dtype=torch.uint8, device=device) for name, (n, k) in sizes.items()}
                     for width in (2, 32))
    biases = {name: torch.empty(len(experts), n, device=device) for name, (n, _) in sizes.items()} if has_bias else {}
    for i, expert in enumerate(experts):
        g = generator(1, expert, device=device)
        for name, (_, k) in sizes.items():
            exponent = 127 - round(math.log2(FP4_RMS * k**0.5))
            codes[name][i].random_(0, 256, generator=g)
            scales[name][i].random_(exponent - EXPONENT_SPREAD, exponent + EXPONENT_SPREAD + 1, generator=g)
            if has_bias:
                biases[name][i].normal_(0, 0.5, generator=g)
    gate_up, down = (FP4Weight(codes[name], scales[name], check_nan=False) for name in sizes)
    return ExpertWeights(gate_up, down, biases.get("gate_up"), biases.get("down"))


def local_experts(cfg: MoEConfig, has_bias: bool, device: torch.device | str) -> ExpertWeights:
    """The experts of this rank."""
    num_local_experts = cfg.num_local_experts(dist.get_world_size())
    first = dist.get_rank() * num_local_experts
    return random_experts(cfg, range(first, first + num_local_experts), has_bias, device)


class EagerCall:
    """Calls `fn(x, topk_idx, topk_weights)` on the tensors of the draw."""

    def __init__(self, fn: Callable[..., torch.Tensor]):
        self._fn = fn

    def prepare(self, draw: Draw) -> Launch:
        return lambda: self._fn(draw.x, draw.topk_idx, draw.topk_weights)


class GraphCall:
    """The layer call captured once; every draw is copied into its inputs. Collective."""

    def __init__(self, layer: MegaMoE, draw: Draw):
        self._inputs = [tensor.clone() for tensor in (draw.x, draw.topk_idx, draw.topk_weights)]
        layer(*self._inputs)  # compiles and allocates outside the capture
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # The watchdog thread of NCCL looks at events meanwhile, which a capture of all threads would not allow.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._y = layer(*self._inputs)

    def prepare(self, draw: Draw) -> Launch:
        for static, tensor in zip(self._inputs, (draw.x, draw.topk_idx, draw.topk_weights), strict=True):
            static.copy_(tensor)
        self._y.fill_(torch.nan)
        return self._replay

    def _replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._y


def layer_call(layer: MegaMoE, draw: Draw, with_graph: bool) -> EagerCall | GraphCall:
    """How the layer is called. Raises EngineUnavailableError if it has to be captured and cannot be."""
    if not with_graph:
        return EagerCall(layer)
    if layer.engine.is_synchronous or layer.device.type != "cuda":
        got = f"{layer.engine.name} on {layer.device.type}"
        raise EngineUnavailableError(f"bench_moe: engine of --graph must be stream-ordered on cuda, got {got}; leave out --graph")
    return GraphCall(layer, draw)


class CudaTimer:
    """us of each of several calls between two events on this rank, and of the host inside them.

    Before each: a read of 256 MB, so that L2 holds none of the weights, a sleep, in which the host enqueues the call, and an all-reduce
    of one number, after which all ranks start together.
    """

    def __init__(self, device: torch.device):
        self._flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device=device)
        self._one = torch.zeros(1, device=device)

    def __call__(self, launch: Launch, num_calls: int) -> tuple[list[float], list[float]]:
        events, host_us = [], []
        for _ in range(num_calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.max()
            torch.cuda._sleep(SLEEP_US * CYCLES_PER_US)
            dist.all_reduce(self._one)
            begin.record()
            start = time.perf_counter()
            launch()
            host_us.append((time.perf_counter() - start) * 1e6)
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in events], host_us


class HostTimer:
    """The same by the clock of the host, for CPU ranks; caches are as the calls leave them."""

    def __call__(self, launch: Launch, num_calls: int) -> tuple[list[float], list[float]]:
        times_us = []
        for _ in range(num_calls):
            dist.barrier()
            start = time.perf_counter()
            launch()
            times_us.append((time.perf_counter() - start) * 1e6)
        return times_us, times_us


def max_over_ranks(times_us: list[list[float]], device: torch.device) -> torch.Tensor:
    """[routings, calls] of this rank -> the slowest rank of each call, on the CPU. Collective."""
    slowest = torch.tensor(times_us, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.cpu()


def check_output(cfg: MoEConfig, has_bias: bool, act_group: int | str, draw: Draw, y: torch.Tensor) -> ErrorReport:
    """Compare y [T, H] with the FP64 oracle on a few tokens of every rank. Collective.

    Raises:
        AssertionError: not accepted; on every rank.
    """
    num_tokens = y.shape[0]
    token = torch.linspace(0, max(0, num_tokens - 1), min(CHECKED_TOKENS, num_tokens)).long().to(y.device)
    topk_idx = draw.topk_idx[token]
    used = topk_idx[topk_idx >= 0].unique()
    weights = random_experts(cfg, used.tolist(), has_bias, y.device)
    local_idx = torch.where(topk_idx >= 0, torch.searchsorted(used, topk_idx), -1)
    oracle = moe_oracle(draw.x[token], local_idx, draw.topk_weights[token],
                        *((w.codes, w.scales) for w in (weights.gate_up, weights.down)),
                        gate_up_bias=weights.gate_up_bias, down_bias=weights.down_bias, precision=cfg.precision, act_group=act_group,
                        swiglu_limit=cfg.swiglu_limit, swiglu_alpha=cfg.swiglu_alpha, swiglu_up_bias=cfg.swiglu_up_bias)
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (y[token].cpu(), oracle.cpu()))
    ys, oracles = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return assert_accepted(ys, oracles, context=f"T={num_tokens}, {len(ys)} tokens of {len(parts)} ranks")
