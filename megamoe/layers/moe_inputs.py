"""What a call of MegaMoE takes: views into the arena for producers, and the checks of one call's tensors.

Legend: T tokens on this rank, K top-k slots, H hidden.
"""

from dataclasses import dataclass

import torch

from megamoe.config import X_GROUP, MoEConfig
from megamoe.errors import check

OP = "MegaMoE"


@dataclass(frozen=True)
class InputViews:
    """Where producers write a call's inputs directly: pass slices of these to `forward`."""

    x: torch.Tensor  # [max_tokens_per_rank, H] E4M3 codes, BF16 or FP32 by precision
    x_sf: torch.Tensor | None  # [max_tokens_per_rank, H/32] uint8 UE8M0, fp8 precisions only
    topk_idx: torch.Tensor  # [max_tokens_per_rank, K] int64
    topk_weights: torch.Tensor  # [max_tokens_per_rank, K] float32


def check_inputs(cfg: MoEConfig, device: torch.device, x: torch.Tensor, x_sf: torch.Tensor | None, topk_idx: torch.Tensor,
                 topk_weights: torch.Tensor) -> None:
    """Raise ValueError unless the tensors of a call are what the layer takes; x_sf is given with quantised tokens. Sync: none."""
    check(x.dim() == 2 and x.shape[1] == cfg.hidden, OP, "shape of x", f"[T, {cfg.hidden}]", list(x.shape),
          "flatten batch and sequence")
    num_tokens = x.shape[0]
    check(num_tokens <= cfg.max_tokens_per_rank, OP, "number of tokens", f"<= max_tokens_per_rank = {cfg.max_tokens_per_rank}",
          num_tokens, "split the batch or construct the layer with a larger max_tokens_per_rank")
    x_dtype = torch.float8_e4m3fn if x_sf is not None else torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    fixes = "cast it" if x_sf is None else "quantize_tokens(x, group=32) gives the right form"
    expected = {"x": (x, x_dtype, [num_tokens, cfg.hidden]), "topk_idx": (topk_idx, torch.int64, [num_tokens, cfg.num_topk]),
                "topk_weights": (topk_weights, torch.float32, [num_tokens, cfg.num_topk])}
    if x_sf is not None:
        check(cfg.is_fp8, OP, "x", f"a BF16 tensor for precision {cfg.precision}", "QuantizedTokens", "pass the tensor itself")
        expected["x_sf"] = (x_sf, torch.uint8, [num_tokens, cfg.hidden // X_GROUP])
    for name, (tensor, dtype, shape) in expected.items():
        check(tensor.dtype == dtype, OP, f"dtype of {name}", dtype, tensor.dtype, fixes if name.startswith("x") else "cast it")
        check(list(tensor.shape) == shape, OP, f"shape of {name}", shape, list(tensor.shape), "pass one row per token")
        check(tensor.device == device, OP, f"device of {name}", device, tensor.device,
              f"move it with .to({str(device)!r})")
        check(tensor.is_contiguous(), OP, f"layout of {name}", "contiguous", f"strides {tensor.stride()}", "call .contiguous()")
        check(not (torch.is_grad_enabled() and tensor.requires_grad), OP, f"requires_grad of {name}", False, True,
              "training is not implemented yet: call under torch.no_grad() or detach")
