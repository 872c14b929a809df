"""Timeline of one call of the fused engine: what every role of every SM did when, as a trace for Perfetto and a picture.

    torchrun --standalone --nproc-per-node 4 launch/trace_moe.py --model v4-pro --tokens 512 --out trace.json.gz --png trace.png
    python launch/trace_moe.py --from trace.json.gz --png trace.png

The call starts on all ranks together with cold caches, as in bench_moe.py, but runs kernels that record and are slower for it. Only
mega_moe records: staging and routing run before the first span. The second form needs no GPU.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from bench_moe import on_joined_ranks
from bench_moe_cases import BIASED_MODELS, MODELS, ROUTINGS, model_config
from bench_moe_run import CudaTimer, Draw, local_experts, make_draw

from megamoe import MegaMoE
from megamoe.errors import check
from megamoe.testing import timeline
from megamoe.testing.bench import provenance
from megamoe.testing.report import table


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trace_moe.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="v4-pro")
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="of each rank")
    parser.add_argument("--max-tokens", type=int, metavar="T", help="capacity per rank of the layer (default: --tokens)")
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--seed", type=int, default=0, help="number of the draw")
    parser.add_argument("--backend", default="auto", help="symmetric memory of the arena")
    parser.add_argument("--capacity", type=int, default=4096, metavar="N", help="spans kept per SM and role")
    parser.add_argument("--out", type=Path, default=Path("trace.json"), metavar="FILE", help="the trace; gzipped if it ends in .gz")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw one rank; needs matplotlib")
    parser.add_argument("--rank", type=int, default=0, help="the rank to draw")
    parser.add_argument("--from", dest="source", type=Path, metavar="TRACE", help="read a trace instead of making one")
    args = parser.parse_args(argv)
    args.max_tokens = args.tokens if args.max_tokens is None else args.max_tokens
    if not 1 <= args.tokens <= args.max_tokens:
        parser.error(f"trace_moe: --tokens must be in 1..{max(1, args.max_tokens)}, got {args.tokens}; raise --max-tokens or leave it out")
    if args.capacity < 1:
        parser.error(f"trace_moe: --capacity must be at least 1, got {args.capacity}; leave it out")
    if args.source is None and "RANK" not in os.environ:
        parser.error("trace_moe: ranks must be started by torchrun, got a plain process; see --help for the command")
    return args


def record_call(layer: MegaMoE, draw: Draw, timer: CudaTimer, capacity: int) -> tuple[torch.Tensor, float]:
    """One recorded call after one that compiles. Collective. Returns the timeline of this rank, on the CPU, and us of the call."""
    num_sms = torch.cuda.get_device_properties(layer.device).multi_processor_count
    layer.engine.timeline = timeline.allocate(num_sms, capacity, layer.device)

    def call() -> torch.Tensor:
        return layer(draw.x, draw.topk_idx, draw.topk_weights)

    call()
    layer.check()
    layer.engine.timeline.zero_()
    (call_us,), _ = timer(call, 1)
    layer.check()
    return layer.engine.timeline.cpu(), call_us


def trace(args: argparse.Namespace, device: torch.device) -> tuple[np.ndarray, dict[str, object]] | None:
    """Record a call. Collective. Returns, on rank 0, the aligned spans of all ranks and what the trace file says about them."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    cfg = model_config(args.model, args.max_tokens)
    with MegaMoE(cfg, device=device, engine="fused", backend=args.backend) as layer:
        weights = local_experts(cfg, args.model in BIASED_MODELS, device)
        layer.load_experts(weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias)
        draw = make_draw(cfg, args.routing, args.tokens, args.seed, device)
        buffer, call_us = record_call(layer, draw, CudaTimer(device), args.capacity)
    mine = *timeline.decode(buffer, rank), call_us
    all_ranks = [None] * num_ranks
    dist.gather_object(mine, all_ranks if rank == 0 else None)
    if rank != 0:
        return None
    spans, num_dropped, times_us = zip(*all_ranks, strict=True)
    aligned, shifts = timeline.align(np.concatenate(spans))
    made = provenance()
    made["command"] = made["command"].replace("python", f"torchrun --standalone --nproc-per-node {num_ranks}", 1)
    about = {"model": args.model, "tokens": args.tokens, "num_ranks": num_ranks, "routing": args.routing, "seed": args.seed,
             "call_us": max(times_us), "dropped_spans": sum(num_dropped), "clock_shifts_ns": [shifts.get(r, 0) for r in range(num_ranks)],
             **made}
    return aligned, about


def summary_table(spans: np.ndarray) -> str:
    """A row per kind of span: how much of its role's time it takes on all SMs, and when it first began and last ended."""
    roles = np.array([kind.role for kind in timeline.KINDS])[spans["kind"]]
    rows = []
    for label, (kind, linear) in timeline.LABELS.items():
        mine = spans[(spans["kind"] == kind) & (spans["linear"] == linear)]
        if len(mine) == 0:
            continue
        role = timeline.KINDS[kind].role
        share = _covered_ns(mine) / (_sm_time_ns(spans) * len(np.unique(spans["lane"][roles == role])))
        rows.append((label, role, f"{len(mine):,}", f"{100 * share:.1f} %", f"{np.median(mine['end_ns'] - mine['begin_ns']) / 1000:.2f}",
                     f"{mine['begin_ns'].min() / 1000:.1f}", f"{mine['end_ns'].max() / 1000:.1f}"))
    return table(("span", "role", "spans", "of SM time", "median us", "first us", "last us"), rows)


def _sm_time_ns(spans: np.ndarray) -> int:
    """Of all SMs of all ranks, each from its rank's first span to its last."""
    of_ranks = [spans[spans["rank"] == rank] for rank in np.unique(spans["rank"])]
    return sum(len(np.unique(found["block"])) * int(found["end_ns"].max() - found["begin_ns"].min()) for found in of_ranks)


def _covered_ns(spans: np.ndarray) -> int:
    """Time in which a lane has at least one of these spans, summed over lanes."""
    lane = (spans["rank"].astype(np.int64) * (1 + spans["block"].max()) + spans["block"]) * len(timeline.LANES) + spans["lane"]
    in_turn = lane * (1 + spans["end_ns"].max())  # moves each lane behind the ones before it
    order = np.argsort(spans["begin_ns"] + in_turn)
    begin, end = ((spans[name] + in_turn)[order] for name in ("begin_ns", "end_ns"))
    reached = np.maximum.accumulate(end)
    begin = np.maximum(begin, np.concatenate((begin[:1], reached[:-1])))
    return int((reached - begin).sum())


def show(args: argparse.Namespace, spans: np.ndarray, about: dict[str, object]) -> int:
    """Draw and print. Returns the exit code."""
    ranks = np.unique(spans["rank"]).tolist()
    check(args.rank in ranks, "trace_moe", "--rank", f"one of {ranks}", args.rank, "pick a rank of the trace")
    title = (f"mega_moe, {about['model']}, {about['tokens']} tokens x {about['num_ranks']} ranks, {about['routing']} routing, "
             f"{about['gpu']}, commit {about['commit']}")
    failed = False
    if args.png:
        try:
            timeline.draw(args.png, spans[spans["rank"] == args.rank], f"{title}: rank {args.rank}")
            print(f"{args.png} drawn")
        except ImportError as missing:
            print(missing, file=sys.stderr)
            failed = args.source is not None
    print(summary_table(spans), title, sep="\n")
    print(f"whole call {about['call_us']:.1f} us with staging and routing, on the slowest rank; clocks of the ranks moved by "
          f"{about['clock_shifts_ns']} ns, their steps are {np.gcd.reduce(spans['end_ns'] - spans['begin_ns'])} ns")
    if about["dropped_spans"]:
        print(f"{about['dropped_spans']:,} spans found no room: raise --capacity")
    return 1 if failed else 0


def trace_and_show(args: argparse.Namespace, device: torch.device) -> int:
    """Returns the exit code; the first rank writes and shows."""
    found = trace(args, device)
    if found is None:
        return 0
    timeline.write_trace(args.out, *found)
    print(f"{args.out} written; open it at https://ui.perfetto.dev")
    return show(args, *found)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if what was asked for cannot run."""
    args = parse_args(argv)
    if args.source:
        return show(args, *timeline.read_trace(args.source))
    return on_joined_ranks(lambda device: trace_and_show(args, device))


if __name__ == "__main__":
    sys.exit(main())
