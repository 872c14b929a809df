"""Benchmark of a whole MoE layer over all ranks: y = layer(x, topk_idx, topk_weights) with BF16 x.

    torchrun --standalone --nproc-per-node 4 launch/bench_moe.py --model v4-pro --tokens 1,8,32 --engine fused,unfused --graph --check

Per number of tokens: seeded routings, for each several calls that start together on all ranks with cold caches; the time of a routing is
the median over calls of the slowest rank. Reported are mean and p10-p90 over routings. Engines and peers take turns on every routing.
`--markdown` needs no torchrun.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from bench_moe_cases import BIASED_MODELS, MODELS, MOE_FLOOR_FORMULA, ROUTINGS, layer_work, model_config
from bench_moe_peers import TORCH_INCLUDES, TORCH_PEER, TorchPeer, why_not
from bench_moe_report import INCLUDES, About, Record, make_record, markdown_table, terminal_table
from bench_moe_run import CudaTimer, Draw, EagerCall, HostTimer, check_output, layer_call, local_experts, make_draw, max_over_ranks
from tqdm import tqdm

from megamoe import MegaMoE
from megamoe.engines import ENGINES
from megamoe.errors import ArenaBudgetError, EngineUnavailableError
from megamoe.testing.bench import provenance
from megamoe.testing.report import append_records, read_records, update_page

PAGE = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_moe.py", description=f"{__doc__}\n{MOE_FLOOR_FORMULA}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="v4-pro")
    parser.add_argument("--tokens", type=_token_list, default=[1, 8, 32, 128, 512, 2048, 8192], metavar="T,T,...", help="of each rank")
    parser.add_argument("--max-tokens", type=int, metavar="T", help="capacity per rank of the layer (default: the largest of --tokens)")
    parser.add_argument("--engine", type=_engine_list, default=["unfused"], metavar="NAME,NAME,...", help=f"of {', '.join(ENGINES)}")
    parser.add_argument("--backend", default="auto", help="symmetric memory of the arena")
    parser.add_argument("--graph", action="store_true", help="capture the call in a CUDA graph and replay it")
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--routings", type=int, default=20, help="draws per number of tokens")
    parser.add_argument("--calls", type=int, default=5, help="timed calls of each draw")
    parser.add_argument("--check", action="store_true", help="compare some tokens of the first draw with the FP64 oracle")
    parser.add_argument("--no-peers", action="store_true", help="ours only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a record per number of tokens and contender")
    parser.add_argument("--commit", help="recorded as the commit, where the files measured are not in a git checkout")
    parser.add_argument("--markdown", nargs="+", type=Path, metavar="JSONL", help="only rewrite the table in docs/PERFORMANCE.md")
    args = parser.parse_args(argv)
    args.max_tokens = args.max_tokens or max(1, *args.tokens)
    if max(args.tokens) > args.max_tokens:
        parser.error(f"bench_moe: --max-tokens must be at least {max(args.tokens)}, got {args.max_tokens}; raise it or leave it out")
    if min(args.routings, args.calls) < 1:
        parser.error(f"bench_moe: --routings and --calls must be positive, got {args.routings} and {args.calls}; pass at least 1")
    if not args.markdown and "RANK" not in os.environ:
        parser.error("bench_moe: ranks must be started by torchrun, got a plain process; see --help for the command")
    return args


def _token_list(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"bench_moe: --tokens must be numbers joined by commas, got {text!r}; e.g. 1,8,32")
    return [int(part) for part in parts]


def _engine_list(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if not set(names) <= set(ENGINES):
        expected = ", ".join(ENGINES)
        raise argparse.ArgumentTypeError(f"bench_moe: --engine must be of {expected}, joined by commas, got {text!r}; e.g. fused,unfused")
    return names


def join_ranks() -> torch.device:
    """Join the ranks that torchrun started: a GPU each where there are GPUs, else the CPU. Returns this rank's device."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def on_joined_ranks(work: Callable[[torch.device], int]) -> int:
    """Join the ranks, do `work` with this rank's device, and leave them.

    Returns:
        Its exit code; 1 if what it wants cannot run here, which every rank raises and the first prints.
    """
    device = join_ranks()
    try:
        return work(device)
    except (ArenaBudgetError, EngineUnavailableError) as problem:
        if dist.get_rank() == 0:
            print(problem, file=sys.stderr)
        return 1
    finally:
        dist.destroy_process_group()


def build(args: argparse.Namespace, device: torch.device) -> dict[About, Callable]:
    """Every contender by what its records say: a layer with its experts per engine, then the peers. Collective."""
    cfg, num_ranks = model_config(args.model, args.max_tokens), dist.get_world_size()
    weights = local_experts(cfg, args.model in BIASED_MODELS, device)
    made = provenance(commit=args.commit)
    made["command"] = made["command"].replace("python", f"torchrun --standalone --nproc-per-node {num_ranks}", 1)
    contenders: dict[About, Callable] = {}
    for engine in args.engine:
        layer = MegaMoE(cfg, device=device, engine=engine, backend=args.backend)
        layer.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
        about = About(model=args.model, num_ranks=num_ranks, engine=engine, backend=layer.arena.backend, routing=args.routing,
                      graph=args.graph, act_group=layer.engine.act_group, max_tokens=args.max_tokens, arena_bytes=layer.arena.num_bytes,
                      num_calls=args.calls, includes=INCLUDES, **made)
        contenders[about] = layer
    reason = "--no-peers" if args.no_peers else why_not(cfg, device)
    if reason is None:
        peer = replace(about, engine=TORCH_PEER, backend=dist.get_backend(), graph=False, act_group=None, arena_bytes=0,
                       includes=TORCH_INCLUDES)
        contenders[peer] = TorchPeer(cfg, weights)
    elif dist.get_rank() == 0:
        print(f"{TORCH_PEER} left out: {reason}")
    return contenders


def layers_of(contenders: Mapping[About, Callable]) -> dict[About, MegaMoE]:
    """Those that are layers of ours; at least one."""
    return {about: fn for about, fn in contenders.items() if isinstance(fn, MegaMoE)}


def check_layers(args: argparse.Namespace, layers: Mapping[About, MegaMoE], draw: Draw,
                 outputs: Mapping[About, torch.Tensor]) -> dict[About, tuple[float, float]]:
    """Median and largest error of every layer. Collective. Raises AssertionError for the first wrong result."""
    errors = {}
    for about, layer in layers.items():
        try:
            report = check_output(layer.cfg, args.model in BIASED_MODELS, layer.engine.act_group, draw, outputs[about])
        except AssertionError as wrong:
            raise AssertionError(f"{about.engine}: {wrong}") from None
        errors[about] = report.median, report.max
    return errors


def measure(args: argparse.Namespace, num_tokens: int, contenders: Mapping[About, Callable],
            timer: CudaTimer | HostTimer) -> list[Record]:
    """Time the contenders in turns on the draws of one number of tokens. Collective; every rank returns the same times.

    Raises:
        AssertionError: --check found a wrong result of a layer.
    """
    layers = layers_of(contenders)
    first = next(iter(layers.values()))
    device, cfg = first.device, first.cfg
    draw = make_draw(cfg, args.routing, num_tokens, 0, device)
    calls = {about: layer_call(fn, draw, args.graph) if about in layers else EagerCall(fn) for about, fn in contenders.items()}
    outputs = {about: call.prepare(draw)() for about, call in calls.items()}  # and compiles and allocates
    errors = check_layers(args, layers, draw, outputs) if args.check else {}
    times, host_times, works = {about: [] for about in calls}, {about: [] for about in calls}, []
    for seed in tqdm(range(args.routings), desc=f"T={num_tokens}", unit="routing", disable=dist.get_rank() != 0, leave=False):
        draw = make_draw(cfg, args.routing, num_tokens, seed, device)
        works.append(layer_work(cfg, draw.counts, num_tokens))
        for about, call in calls.items():
            call_us, host_us = timer(call.prepare(draw), args.calls)
            times[about].append(call_us)
            host_times[about] += host_us
    for layer in layers.values():
        layer.check()
    slowest = {about: max_over_ranks(found, device).quantile(0.5, dim=1).tolist() for about, found in times.items()}
    return [make_record(about, num_tokens, slowest[about], statistics.median(host_times[about]), works, errors.get(about))
            for about in calls]


def run(args: argparse.Namespace, device: torch.device) -> bool:
    """Measure everything; rank 0 prints and writes. Collective. Returns whether every result was right."""
    is_first = dist.get_rank() == 0
    contenders = build(args, device)
    layers = layers_of(contenders)
    timer, records, num_wrong = CudaTimer(device) if device.type == "cuda" else HostTimer(), [], 0
    for num_tokens in args.tokens:
        try:
            found = measure(args, num_tokens, contenders, timer)
        except AssertionError as wrong:
            num_wrong += 1
            if is_first:
                print(f"WRONG {args.model}: {wrong}", file=sys.stderr)
            continue
        records += found
        if args.json and is_first:
            append_records(args.json, found)
    if is_first:
        about = next(iter(layers))
        print(*layers.values(), terminal_table(records), MOE_FLOOR_FORMULA, sep="\n")
        print(f"{about.model}, {about.num_ranks} x {about.gpu}, routing {about.routing}, arena {about.arena_bytes:,} bytes per rank, torch "
              f"{about.torch}, commit {about.commit}")
    for layer in layers.values():
        layer.close()
    return num_wrong == 0


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if a result is wrong or what was asked for cannot run."""
    args = parse_args(argv)
    if args.markdown:
        update_page(PAGE, "bench_moe.py", markdown_table(read_records(args.markdown, Record)))
        print(f"{PAGE} updated")
        return 0
    return on_joined_ranks(lambda device: 0 if run(args, device) else 1)


if __name__ == "__main__":
    sys.exit(main())
