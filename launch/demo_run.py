"""What launch/demo.py runs on each rank: score held-out text with the stock and with the replaced model, compare, print.

Each rank scores its own share of the text (data parallel) while the experts are spread over all ranks (expert parallel).
"""

import argparse
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from demo_report import Comparison, Score, comparison_table, verdict, verdict_lines
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm
from train_demo_model import DEFAULT_OUT, SEED, SEQUENCE_LENGTH, load_text, split_text

from megamoe import quantize_fp4
from megamoe.errors import check
from megamoe.integrations.transformers import canonical_experts, expert_layers, replace_experts, set_stock_weights, stock_experts
from megamoe.reference.oracle import moe_oracle
from megamoe.testing.compare import error_report
from megamoe.testing.report import bar_chart

WINDOWS_PER_BATCH = 8
PROMPT_BYTES, CONTINUATION_BYTES = 200, 240
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8xfp4": torch.bfloat16}  # precision of the layers -> dtype of the model


def shard_batches(text: Tensor, rank: int, num_ranks: int) -> list[Tensor]:
    """This rank's windows [B, SEQUENCE_LENGTH + 1], dealt out in turn: uneven shards, but the same number of batches on every rank."""
    least = num_ranks * SEQUENCE_LENGTH + 1
    check(len(text) >= least, "demo", "held-out text", f"at least {least} bytes", len(text), "pass a longer --text or more --tokens")
    windows = text.unfold(0, SEQUENCE_LENGTH + 1, SEQUENCE_LENGTH)
    num_batches = -(-len(windows) // (num_ranks * WINDOWS_PER_BATCH))
    return list(windows[rank::num_ranks].tensor_split(num_batches))


def load_model(precision: str, device: torch.device, experts: str = "eager") -> nn.Module:
    """The trained model with its stock experts; for "fp8xfp4" they carry FP4 values, so that only the arithmetic is left to compare."""
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(DEFAULT_OUT, dtype=DTYPES[precision], experts_implementation=experts)
    for stock in stock_experts(model) if precision == "fp8xfp4" else ():
        weights = canonical_experts(stock, 0, stock.num_experts)
        set_stock_weights(stock, quantize_fp4(weights.gate_up).dequantize(), quantize_fp4(weights.down).dequantize())
    return model.to(device).eval()


def oracle_weights(original: nn.Module, precision: str) -> list[tuple]:
    """Per MoE layer gate_up and down of all experts, as `moe_oracle` takes them: FP4 codes with scales, or the values themselves."""
    found = []
    for stock in stock_experts(original):
        weights = canonical_experts(stock, 0, stock.num_experts)
        pair = weights.gate_up, weights.down
        found.append(tuple((fp4.codes, fp4.scales) for fp4 in map(quantize_fp4, pair)) if precision == "fp8xfp4" else pair)
    return found


def sum_over_ranks(*values: float, device: torch.device) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def count_mismatches(a: Score, b: Score, device: torch.device) -> int:
    return int(sum_over_ranks((a.predictions != b.predictions).sum().item(), device=device)[0])


def score(model: nn.Module, batches: list[Tensor], title: str) -> Score:
    """Loss, speed and predictions of `model` on this rank's batches. Collective."""
    device, predictions, loss_sum = model.device, [], 0.0
    dist.barrier()
    start = time.perf_counter()
    for batch in tqdm(batches, desc=title, unit="batch", disable=dist.get_rank() != 0, leave=False):
        inputs, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        loss_sum += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        predictions.append(logits.argmax(-1).flatten().cpu())
    dist.barrier()
    seconds = time.perf_counter() - start
    predicted = torch.cat(predictions)
    loss, num_tokens = sum_over_ranks(loss_sum, len(predicted), device=device)
    return Score(loss / num_tokens, num_tokens / seconds, predicted)


def layer_errors(model: nn.Module, weights: list[tuple], batch: Tensor) -> list[tuple[float, float]]:
    """Median and largest error of each MegaMoE layer against the oracle, on the inputs and the routing it meets in the model.

    Collective; the worst over all ranks.
    """
    calls = []
    hooks = [layer.register_forward_hook(lambda layer, inputs, y: calls.append((layer, inputs, y))) for layer in expert_layers(model)]
    model(input_ids=batch[:, :-1].to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    errors = []
    for (layer, inputs, y), (gate_up, down) in zip(calls, weights, strict=True):
        oracle = moe_oracle(*inputs, gate_up, down, precision=layer.cfg.precision, act_group=layer.engine.act_group)
        report = error_report(y, oracle)
        errors.append((report.median, report.max))
    # A maximum over ranks may lose a NaN; it does not lose an infinite error.
    worst = torch.tensor(errors, dtype=torch.float64, device=model.device).nan_to_num(nan=torch.inf)  # [layers, 2]
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return [(median, largest) for median, largest in worst.tolist()]


def compare(precision: str, original: nn.Module, original_score: Score, batches: list[Tensor], engine: str,
            backend: str) -> tuple[Comparison, nn.Module]:
    """Replace the experts of a fresh copy of the model and hold it against the original. Collective; returns the replaced model too."""
    device = original.device
    model = load_model(precision, device)
    replace_experts(model, precision=precision, engine=engine, backend=backend, max_tokens_per_rank=WINDOWS_PER_BATCH * SEQUENCE_LENGTH)
    replaced_score = score(model, batches, f"{precision} replaced")
    layers = list(expert_layers(model))
    traffic = [layer.engine.traffic for layer in layers if layer.engine.traffic is not None]
    rows_moved, bytes_moved, num_tokens = map(int, sum_over_ranks(
        sum(t.rows_pulled for t in traffic), sum(t.bytes_pulled + t.bytes_pushed for t in traffic), len(replaced_score.predictions),
        device=device))
    if not traffic:
        rows_moved = bytes_moved = None
    comparison = Comparison(
        precision=precision, num_ranks=dist.get_world_size(), original=original_score, replaced=replaced_score, num_tokens=num_tokens,
        num_mismatches=count_mismatches(original_score, replaced_score, device),
        layer_errors=layer_errors(model, oracle_weights(original, precision), batches[0]),
        engine=layers[0].engine.name, backend=layers[0].arena.backend, rows_moved=rows_moved, bytes_moved=bytes_moved,
        arena_bytes=layers[0].arena.num_bytes)
    return comparison, model


def load_chart(model: nn.Module) -> str:
    """Rows that each expert of each layer has received so far. Collective."""
    columns = {}
    for i, layer in enumerate(expert_layers(model)):
        local = layer.expert_load()  # [e]
        load = torch.zeros(dist.get_world_size(), len(local), dtype=torch.int64, device=local.device)
        load[dist.get_rank()] = local
        dist.all_reduce(load)
        columns[f"layer {i}"] = load.flatten().tolist()
    num_ranks, num_local_experts = load.shape
    labels = [f"rank {i // num_local_experts} expert {i:2}" for i in range(num_ranks * num_local_experts)]
    return bar_chart(labels, columns)


def continuation(model: nn.Module, prompt: Tensor) -> Tensor:
    """Sampled bytes after `prompt` [n]. Collective: every rank generates the same text, so all of them take part in every step."""
    torch.manual_seed(SEED)
    inputs = prompt[None].to(model.device)
    tokens = model.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=CONTINUATION_BYTES, do_sample=True,
                            temperature=0.3, top_k=0)
    return tokens[0, len(prompt):]


def decode(tokens: Tensor) -> str:
    return bytes(tokens.tolist()).decode(errors="replace")


def indent(text: str) -> str:
    return textwrap.indent(text, "    | ", lambda line: True)


def close(model: nn.Module) -> None:
    for layer in expert_layers(model):
        layer.close()


def engine_for(precision: str, requested: str) -> str:
    """The engine asked for is meant for the FP4 layers; the other precisions run what there is."""
    return requested if precision == "fp8xfp4" else "auto"


@torch.no_grad()
def run(args: argparse.Namespace, device: torch.device) -> bool:
    """Score, compare, print on rank 0. Collective; every rank returns the same verdict."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_: None
    _, held_out = split_text(load_text(args.text))
    batches = shard_batches(held_out[: args.tokens + 1], rank, num_ranks)
    comparisons = {}
    for precision in DTYPES:
        original = load_model(precision, device)
        original_score = score(original, batches, f"{precision} original")
        if precision == "bf16":
            grouped_score = score(load_model(precision, device, experts="grouped_mm"), batches, "bf16 original, grouped_mm")
            num_stock_mismatches = count_mismatches(original_score, grouped_score, device)
        engine = engine_for(precision, args.engine)
        comparisons[precision], model = compare(precision, original, original_score, batches, engine, args.backend)
        if precision != "fp8xfp4":
            close(model)
    config = model.config
    say(f"\nQwen3-MoE, {original.num_parameters():,} parameters, {config.num_hidden_layers} MoE layers, {config.num_experts} experts, "
        f"top-{config.num_experts_per_tok}; {comparisons['fp32'].num_tokens:,} bytes of held-out text on {num_ranks} {device.type} ranks\n")
    say(comparison_table(comparisons))
    say("fp8xfp4: the original carries the dequantised FP4 weights. "
        f"bf16: stock eager and stock grouped_mm experts differ in {num_stock_mismatches} next tokens.")
    say(f"\nrows received per expert, fp8xfp4\n{load_chart(model)}")
    prompt = held_out[-PROMPT_BYTES:]
    say(f"\nprompt\n{indent(decode(prompt))}\ncontinuation, fp8xfp4 replaced\n{indent(decode(continuation(model, prompt)))}\n")
    close(model)
    checks = verdict(comparisons, num_stock_mismatches)
    say("\n".join(verdict_lines(checks)))
    return all(each.is_passed for each in checks)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo.py", description="a trained MoE transformer, its stock experts against MegaMoE layers",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--engine", default="auto", help="of the fp8xfp4 layers; the other precisions take auto")
    parser.add_argument("--backend", default="auto", help="symmetric memory of the arena")
    parser.add_argument("--text", type=Path, default=None, help="use the last tenth of this file instead of the language-reference topics")
    parser.add_argument("--tokens", type=int, default=65536, help="most bytes of held-out text to score, over all ranks")
    return parser.parse_args()


def join_ranks(device_type: str) -> torch.device:
    """Join the ranks that torchrun started. Returns this rank's device."""
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


def interrupt(*_) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes on the Ctrl-C that the terminal has sent to every process already
    raise KeyboardInterrupt


@record
def main() -> None:
    """Exit code: 0 PASS, 1 FAIL, 130 interrupted."""
    signal.signal(signal.SIGINT, interrupt)
    args = parse_args()
    transformers.utils.logging.disable_progress_bar()
    try:
        device = join_ranks(args.device)
        is_passed = run(args, device)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        # NOTE: at once. Closing is collective, and the peers are leaving too.
        os._exit(130)
    sys.exit(0 if is_passed else 1)
