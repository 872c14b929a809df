"""Minutes of random calls on all ranks, each checked against another engine: sizes, routing and the rank that is late change all the time.

    torchrun --standalone --nproc-per-node 4 launch/soak_moe.py --minutes 3 --model v4-pro --engine fused --against unfused

Prints a line every ten seconds. Exit code 1 if a result is wrong; what was wrong, and in which round, is printed by the rank that saw it.
"""

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from bench_moe import on_joined_ranks
from bench_moe_cases import BIASED_MODELS, MODELS, ROUTINGS, draw_routing, generator, model_config
from bench_moe_run import local_experts
from tqdm import tqdm

from megamoe import MegaMoE
from megamoe.engines import ENGINES
from megamoe.testing.compare import MAX_RELATIVE, MEDIAN_RELATIVE, error_report

ROUNDS_PER_LOOK = 20  # between looks at the clock, in which ranks meet
# Tokens of a rank from which on the median of a call is judged by itself; that of all calls between two looks always is. A few tokens may
# well be those whose intermediate was rounded another way: one that was 1.3e-2 off ended a run of qwen3-30b (7ba397a).
MEDIAN_TOKENS = 64
SECONDS_PER_LINE = 10.0
MAX_DELAY_CYCLES, MAX_DELAY_S = 2_000_000, 1e-3


@dataclass(frozen=True)
class Round:
    """One call of every rank; the same on all ranks."""

    seed: int
    routing: str
    tokens: tuple[int, ...]  # of each rank
    late_rank: int
    with_pause: bool  # the ranks meet before the call

    @classmethod
    def draw(cls, seed: int, max_tokens: int, num_ranks: int) -> "Round":
        rng = random.Random(seed)
        tokens = tuple(rng.choice((0, 1, rng.randint(0, 32), rng.randint(0, max_tokens), max_tokens)) for _ in range(num_ranks))
        return cls(seed, rng.choice(ROUTINGS), tuple(min(t, max_tokens) for t in tokens), rng.randrange(num_ranks), rng.random() < 0.1)


@dataclass
class Progress:
    """So far, over all ranks."""

    num_rounds: int = 0
    num_tokens: int = 0
    worst: float = 0.0  # relative error of a token

    def line(self, seconds: float) -> str:
        return f"{seconds:6.0f} s  {self.num_rounds:,} rounds  {self.num_tokens:,} tokens  largest error of a token {self.worst:.1e}"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak_moe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--model", choices=MODELS, default="v4-pro")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="T", help="capacity of each rank")
    parser.add_argument("--engine", choices=ENGINES, default="fused")
    parser.add_argument("--against", choices=ENGINES, default="unfused", help="the engine that is right")
    parser.add_argument("--seed", type=int, default=0, help="of the first round, to repeat a wrong one")
    args = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("soak_moe: ranks must be started by torchrun, got a plain process; see --help for the command")
    return args


def build(args: argparse.Namespace, device: torch.device) -> tuple[MegaMoE, MegaMoE]:
    """The layer under test and the one it is held against, with the same experts. Collective."""
    cfg = model_config(args.model, args.max_tokens)
    weights = local_experts(cfg, args.model in BIASED_MODELS, device)
    layers = tuple(MegaMoE(cfg, device=device, engine=engine, timeout_s=20.0) for engine in (args.engine, args.against))
    for layer in layers:
        layer.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
    return layers


def run_round(each: Round, layers: tuple[MegaMoE, MegaMoE]) -> tuple[torch.Tensor, torch.Tensor]:
    """y of both layers on this rank, still under way. Collective."""
    layer, device, rank = layers[0], layers[0].device, dist.get_rank()
    num_tokens = each.tokens[rank]
    topk_idx, topk_weights = draw_routing(layer.cfg, each.routing, num_tokens, each.seed, rank, len(each.tokens))
    x = torch.randn(num_tokens, layer.cfg.hidden, generator=generator(4, each.seed, rank, device=device), device=device).bfloat16()
    inputs = x, topk_idx.to(device), topk_weights.to(device)
    if each.with_pause:
        dist.barrier()
    if rank == each.late_rank:
        rng = random.Random(each.seed)
        if device.type == "cuda":
            torch.cuda._sleep(rng.randrange(MAX_DELAY_CYCLES))
        time.sleep(rng.random() * MAX_DELAY_S)
    return layers[0](*inputs), layers[1](*inputs)


def judge(each: Round, y: torch.Tensor, due: torch.Tensor) -> tuple[float, str]:
    """The largest error of a token, and what is wrong, if anything."""
    report = error_report(y, due.double())
    is_finite = bool(y.isfinite().all())
    if is_finite and report.max <= MAX_RELATIVE and (report.median <= MEDIAN_RELATIVE or len(y) < MEDIAN_TOKENS):
        return report.max, ""
    what = f"error median {report.median:.2e}, largest {report.max:.2e} in token {report.worst_token}"
    return report.max, f"rank {dist.get_rank()}: {what}, {'all finite' if is_finite else 'NaN or Inf'}; {each}"


def judge_median(rounds: list[Round], outputs: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """What is wrong with the median over the tokens of all these rounds, if anything."""
    y, due = (torch.cat(parts) for parts in zip(*outputs))
    median = error_report(y, due.double()).median
    seeds = f"seeds {rounds[0].seed} to {rounds[-1].seed}"
    return "" if median <= MEDIAN_RELATIVE else f"rank {dist.get_rank()}: median error {median:.2e} over the tokens of {seeds}"


def look(seconds: float, limit: float, found: list[float], wrong: str, device: torch.device) -> tuple[bool, bool, float]:
    """Whether time is up by the clock of rank 0, whether a rank saw a wrong result, and the worst error of all ranks. Collective."""
    is_over = dist.get_rank() == 0 and seconds >= limit
    state = torch.tensor([float(is_over), float(bool(wrong)), max(found, default=0.0)], dtype=torch.float64, device=device)
    dist.all_reduce(state.nan_to_num_(nan=torch.inf), op=dist.ReduceOp.MAX)
    over, failed, worst = state.tolist()
    return bool(over), bool(failed), worst


def soak(args: argparse.Namespace, layers: tuple[MegaMoE, MegaMoE], device: torch.device) -> bool:
    """Rounds until the time is up or a result is wrong. Collective; every rank returns the same."""
    progress, begin, last_line, is_first = Progress(), time.monotonic(), 0.0, dist.get_rank() == 0
    with tqdm(unit="round", disable=not is_first or not sys.stderr.isatty(), leave=False) as bar:
        while True:
            first, found, wrong = args.seed + progress.num_rounds, [], ""
            rounds = [Round.draw(seed, args.max_tokens, dist.get_world_size()) for seed in range(first, first + ROUNDS_PER_LOOK)]
            outputs = [run_round(each, layers) for each in rounds]
            for layer in layers:
                layer.check()
            for each, (y, due) in zip(rounds, outputs):
                error, problem = judge(each, y, due)
                found.append(error)
                wrong = wrong or problem
            wrong = wrong or judge_median(rounds, outputs)
            seconds = time.monotonic() - begin
            is_over, has_failed, worst = look(seconds, 60 * args.minutes, found, wrong, device)
            progress.num_rounds += len(rounds)
            progress.num_tokens += sum(sum(each.tokens) for each in rounds)
            progress.worst = max(progress.worst, worst)
            bar.update(len(rounds))
            if wrong:
                print(f"WRONG {args.model}: {wrong}", file=sys.stderr, flush=True)
            if is_first and (is_over or has_failed or seconds - last_line >= SECONDS_PER_LINE):
                last_line = seconds
                print(progress.line(seconds), flush=True)
            if is_over or has_failed:
                return not has_failed


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit code: 1 if a result is wrong."""
    layers = build(args, device)
    is_right = soak(args, layers, device)
    for layer in layers:
        layer.close()
    if dist.get_rank() == 0:
        print(f"{'PASS' if is_right else 'FAIL'}: {args.model}, {args.engine} against {args.against}, {dist.get_world_size()} ranks")
    return 0 if is_right else 1


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a result is wrong."""
    args = parse_args(argv)
    return on_joined_ranks(lambda device: run(args, device))


if __name__ == "__main__":
    sys.exit(main())
