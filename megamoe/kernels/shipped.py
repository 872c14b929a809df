"""The kernels that models use, as (op, config, text, entry): what prewarm compiles ahead and what the kernel check looks at."""

from collections.abc import Callable, Hashable

from megamoe.comm.budget import plan_dims
from megamoe.comm.protocol import EVERY, pack
from megamoe.config import MoEConfig
from megamoe.kernels.layout_probe import probe_source

ShippedKernel = tuple[str, Hashable, Callable[[], str], str]

# hidden, intermediate, num_experts, num_topk
MODELS = {
    "v4-pro": (7168, 3072, 384, 6),
    "v4-flash": (4096, 2048, 256, 6),
    "v3": (7168, 2048, 256, 8),
    "qwen3-30b": (2048, 768, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "gpt-oss-120b": (2880, 2880, 128, 4),
}
PROBE_ENTRY = "_ZN7megamoe12layout_probeI5ProbeEEvNS_4SymmEj"


def shipped_kernels(models: tuple[str, ...] = tuple(MODELS)) -> list[ShippedKernel]:
    """(op, config, make_source, entry) of every kernel that these models use, each once."""
    return [_layout_probe(precision) for precision in EVERY]


def _layout_probe(precision: str) -> ShippedKernel:
    hidden, intermediate, num_experts, num_topk = MODELS["v4-pro"]
    dims = plan_dims(MoEConfig(hidden=hidden, intermediate=intermediate, num_experts=num_experts, num_topk=num_topk, max_tokens_per_rank=8192,
                               precision=precision), num_ranks=4)
    return "layout_probe", dims, lambda: probe_source(pack(dims)), PROBE_ENTRY
