"""Every kernel once on small shapes, for compute-sanitizer: `compute-sanitizer --tool memcheck python -m tests.kernels.sanitize_cases`.

Checks no numbers. Includes groupings that are out of range, since those must not lead out of any tensor.
"""

import contextlib
import sys
from pathlib import Path

import torch

import megamoe
from megamoe.formats import layout_sm90, quantize_fp4, quantize_tokens
from megamoe.kernels.fp4_gemm import fp4_gemm
from megamoe.kernels.fp4_gemm_config import with_most_stages

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it

from mega_cases import CANDIDATES, EDGE_IN_BLOCKS, FEW, PAIR, SMALL_CLUSTERS, config_for, inputs_of  # noqa: E402
from mega_ranks import MegaRanks, Ring  # noqa: E402
from moe_ranks import DIMS, VirtualRanks, make_inputs  # noqa: E402

# Warpgroups, token tiles, epilogue; K = 1056 is two promotions and a tail of K, and few tiles, which are cut along K.
CONFIGS = ((2, (16, 64), "store"), (2, (176,), "store"), (3, (48,), "accumulate"), (4, (8, 48), "store"), (3, (24, 72), "swiglu"))
N, K, COUNTS = 320, 1056, (70, 0, 1, 9)


def run_configs() -> None:
    offsets = torch.tensor([0, *COUNTS], device="cuda").cumsum(0).int()
    num_rows = sum(COUNTS) + 2
    x = quantize_tokens(torch.randn(num_rows, K, device="cuda"), "token")
    w = quantize_fp4(torch.randn(len(COUNTS), N, K, device="cuda"))
    for num_math_warpgroups, token_tiles, epilogue in CONFIGS:
        config = with_most_stages(num_math_warpgroups=num_math_warpgroups, token_tiles=token_tiles, epilogue=epilogue, max_groups=4)
        packed = layout_sm90.pack(w, epilogue == "swiglu")
        if epilogue == "swiglu":
            outputs = {"a_codes": torch.empty(num_rows, N // 2, dtype=torch.float8_e4m3fn, device="cuda"),
                       "a_sf": torch.empty(num_rows, N // 64, dtype=torch.uint8, device="cuda")}
        else:
            outputs = {"out": torch.zeros(num_rows, N, dtype=torch.bfloat16, device="cuda")}
        for _ in range(2):
            fp4_gemm(x.codes, x.sf, packed, config, offsets=offsets, **outputs)
        torch.cuda.synchronize()
        print(f"fp4_gemm {config}")


def drop_reports() -> None:
    """The groupings are wrong on purpose; a check raises one report at a time."""
    for _ in range(4):
        with contextlib.suppress(ValueError):
            megamoe.check()


def run_ops() -> None:
    w = quantize_fp4(torch.randn(3, 128, 96, device="cuda"))
    plain, interleaved = layout_sm90.pack(w, False), layout_sm90.pack(w, True)
    x = torch.randn(40, 96, device="cuda")
    groupings = {"expert_idx": [0] * 20 + [-1, 2, 7] + [2] * 17, "offsets": [0, 20, 50, 30], "num_rows": [20, -1, 99]}
    for kind in (32, 128, "token"):
        tokens, masked = quantize_tokens(x, kind), quantize_tokens(x.new_zeros(3, 20, 96), kind)
        for name, values in groupings.items():
            grouping = {name: torch.tensor(values, device="cuda")}
            given = masked if name == "num_rows" else tokens
            megamoe.grouped_gemm(given, plain, **grouping)
            drop_reports()
            megamoe.grouped_gemm_swiglu(given, interleaved, **grouping)
            drop_reports()
            print(f"grouped_gemm, grouped_gemm_swiglu: group {kind}, {name}")


def run_elementwise() -> None:
    x = torch.randn(37, 2 * 96, device="cuda").bfloat16()
    x[3, 5], x[4, 7] = torch.nan, torch.inf
    index = torch.tensor([[0, 36], [-1, 5], [99, -7]], device="cuda")
    for group in (32, 128, "token"):
        megamoe.quantize_tokens(x, group)
        megamoe.swiglu_quantize(x, limit=1.0, group=group)
    rows = megamoe.permute_tokens(x, index.flatten())
    drop_reports()
    megamoe.unpermute_tokens(rows, index)
    drop_reports()
    print("elementwise")


def run_dispatch() -> None:
    """Three ranks on one GPU up to their rows; one rank, whose calls end too, through whole layers, also with several passes and a bias."""
    ranks = VirtualRanks(DIMS)
    for rank in range(DIMS.num_ranks):
        ranks.stage(rank, make_inputs(DIMS, 5 * rank, rank))
    given = make_inputs(DIMS, DIMS.max_tokens, 7)
    tokens, routing = megamoe.quantize_tokens(given.x.cuda(), 32), (given.topk_idx.cuda(), given.topk_weights.cuda())
    own = VirtualRanks(DIMS)
    for codes, sf in ((tokens.codes, tokens.sf), (own.view(0, "x"), own.view(0, "x_sf"))):
        own.ranks[0].stage(codes, sf, *routing)
    for rank in range(DIMS.num_ranks):
        ranks.run_experts(rank)
    cfg = megamoe.MoEConfig(hidden=96, intermediate=64, num_experts=5, num_topk=3, max_tokens_per_rank=40, swiglu_limit=2.0)
    for arena_bytes, bias in ((None, None), (55_000, torch.randn(5, 96, device="cuda"))):
        layer = megamoe.MegaMoE(cfg, device="cuda", engine="unfused", arena_bytes=arena_bytes)
        weights = (torch.randn(5, *shape, device="cuda").bfloat16() for shape in ((128, 96), (96, 64)))
        layer.load_experts(*weights, down_bias=bias)
        for num_tokens in (0, 1, 40):
            topk_idx = torch.randint(-2, 6, (num_tokens, 3), device="cuda")
            x, topk_weights = torch.randn(num_tokens, 96, device="cuda").bfloat16(), torch.rand(num_tokens, 3, device="cuda")
            with contextlib.suppress(ValueError):  # of an index: once the call is enqueued, or by the check
                layer(x, topk_idx, topk_weights)
                layer.check()
        print(repr(layer))
        layer.close()


def run_mega() -> None:
    """Few blocks, since instrumented ones are slow; rings that wrap, a bias, tokens that are few, none or skipped."""
    for model, candidate, tokens in ((FEW, CANDIDATES[2, 32], (9,)), (PAIR, CANDIDATES[2, 32], (40, 3)),
                                     (PAIR, CANDIDATES[3, 64], (128, 90)), (EDGE_IN_BLOCKS, CANDIDATES[4, 48], (70, 0, 1)),
                                     (EDGE_IN_BLOCKS, SMALL_CLUSTERS, (70, 0, 9))):
        ranks = MegaRanks(model, config_for(model, candidate), timeout_s=100.0, num_blocks=4)
        for seed, ring in enumerate((ranks.ring, Ring(1, 1, 0), Ring(5, 2, 2))):
            ranks.ring = ring
            ranks.call(inputs_of(model, tokens, seed))
            ranks.assert_clean()
        print(f"mega_moe {ranks.config}")


if __name__ == "__main__":
    run_configs()
    run_ops()
    run_elementwise()
    run_dispatch()
    run_mega()
