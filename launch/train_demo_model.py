"""Trains the demo model: a small byte-level Qwen3-MoE on the language-reference topics of the standard library.

    python launch/train_demo_model.py [--text FILE] [--steps N] [--out DIR]

Owns the demo's text, its split and the model's size; launch/demo.py imports them from here. One process, FP32, CPU.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 20240607
SEQUENCE_LENGTH = 256
HELD_OUT_FRACTION = 0.1
DEFAULT_OUT = Path(__file__).resolve().parent / "demo_model"


def load_text(path: Path | None = None) -> bytes:
    """The bytes of `path`, or of every language-reference topic of this Python, joined in sorted key order (about 0.45 MB)."""
    if path is not None:
        return path.read_bytes()
    from pydoc_data.topics import topics

    return "\n".join(topics[key] for key in sorted(topics)).encode()


def split_text(text: bytes) -> tuple[Tensor, Tensor]:
    """Split into training bytes and the last tenth, which training never sees. Both are [N] int64."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    num_train = len(tokens) - int(len(tokens) * HELD_OUT_FRACTION)
    return tokens[:num_train], tokens[num_train:]


def demo_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, tie_word_embeddings=True,
        max_position_embeddings=1024, router_aux_loss_coef=0.01, initializer_range=0.05, bos_token_id=None, eos_token_id=None,
    )


def sample_batch(tokens: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Random windows of the text: [B, SEQUENCE_LENGTH + 1] int64, the last byte of each being only a target."""
    starts = torch.randint(len(tokens) - SEQUENCE_LENGTH, (batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(SEQUENCE_LENGTH + 1)]


def learning_rate(step: int, num_steps: int, peak: float, num_warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a twentieth of it."""
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def held_out_loss(model: Qwen3MoeForCausalLM, tokens: Tensor, batch_size: int = 16) -> float:
    """Mean cross entropy in nats per byte over consecutive windows of SEQUENCE_LENGTH bytes, each scored without earlier context."""
    num_windows = (len(tokens) - 1) // SEQUENCE_LENGTH
    inputs = tokens[: num_windows * SEQUENCE_LENGTH].view(num_windows, SEQUENCE_LENGTH)
    targets = tokens[1 : num_windows * SEQUENCE_LENGTH + 1].view(num_windows, SEQUENCE_LENGTH)
    total = 0.0
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size)):
        logits = model(input_ids=x, use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    return total / targets.numel()


def make_optimizer(model: Qwen3MoeForCausalLM) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-9)


def train(model: Qwen3MoeForCausalLM, tokens: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    """Minimise next-byte cross entropy plus the model's own load-balancing loss; every `save_every` steps save and print both losses."""
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(SEED)
    start = time.perf_counter()
    progress = tqdm(range(args.steps), desc="train", unit="step", mininterval=2.0)
    for step in progress:
        batch = sample_batch(tokens, args.batch_size, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.peak_lr, args.warmup)
        # The labels are shifted inside the model; keeping the last byte in the input only costs one position.
        loss = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            num_tokens = (step + 1) * args.batch_size * SEQUENCE_LENGTH
            progress.set_postfix(loss=f"{loss.item():.3f}", tokens_per_s=f"{num_tokens / (time.perf_counter() - start):.0f}")
        if (step + 1) % args.save_every == 0:
            save(model, args.out)
            progress.write(f"step {step + 1}: training loss {loss.item():.4f}, held-out {held_out_loss(model, held_out):.4f} nats/byte")


def save(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Write config.json and a BF16 model.safetensors; the FP32 master weights of `model` stay as they are."""
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    shipped = Qwen3MoeForCausalLM(model.config).bfloat16()
    shipped.load_state_dict(state)
    shipped.save_pretrained(out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train the demo model", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, default=None, help="train on this file instead of the language-reference topics")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 bytes per step")
    parser.add_argument("--peak-lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    parser.add_argument("--save-every", type=int, default=300)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(SEED)
    train_tokens, held_out = split_text(load_text(args.text))
    model = Qwen3MoeForCausalLM(demo_config()).train()
    model.set_experts_implementation("eager")  # on a few CPU cores a tenth faster than grouped_mm at these sizes
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters / 1e6:.2f} M parameters; {len(train_tokens)} training bytes, {len(held_out)} held out; writing to {args.out}")
    train(model, train_tokens, held_out, args)
    save(model, args.out)
    shipped = Qwen3MoeForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    print(f"held-out loss {held_out_loss(shipped, held_out):.4f} nats/byte (BF16 weights, FP32 arithmetic)")


if __name__ == "__main__":
    main()
