"""The layers that the tests of mega_moe run, and their kernels, which are compiled many at a time.

Legend: W ranks, K top-k slots, E experts, H hidden, I intermediate.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

from mega_ranks import MegaRanks, Model, make_inputs
from moe_ranks import Inputs

from megamoe.comm.protocol import ArenaDims
from megamoe.kernels import jit, mega_moe, moe_sources
from megamoe.kernels.mega_moe_config import MegaMoeConfig, table_capacity, with_most_stages
from megamoe.kernels.tuning import mega
from megamoe.kernels.tuning.mega import Candidate

CANDIDATES = {(candidate.num_math_warpgroups, candidate.token_tiles[-1]): candidate for candidate in mega.CANDIDATES}
SMALL = CANDIDATES[2, 32]
SMALL_CLUSTERS = Candidate(2, (16, 24, 32), cluster_blocks=2)


def dims(num_ranks: int, num_experts: int, num_topk: int, hidden: int, intermediate: int, max_tokens: int = 128,
         pool_rows: int = 4096) -> ArenaDims:
    return ArenaDims(num_ranks, max_tokens, num_topk, num_experts, hidden, intermediate, "fp8xfp4", pool_rows)


def config_for(model: Model, candidate: Candidate) -> MegaMoeConfig:
    return with_most_stages(**candidate._asdict(), max_groups=table_capacity(model.num_local_experts),
                            has_down_bias=model.has_bias, hidden=model.dims.hidden, intermediate=model.dims.intermediate)


# Layers whose H and I are multiples of 128 are computed in thread order, the others in natural order.
ONE = Model(dims=dims(1, 1, 1, 128, 64))
ONE_IN_BLOCKS = Model(dims=dims(1, 1, 1, 256, 128))
FEW = Model(dims=dims(1, 3, 2, 256, 96), has_bias=True)
PAIR = Model(dims=dims(2, 6, 3, 256, 160), limit=2.0)
# Partial row blocks and K tails for every number of warpgroups: 2I = H = 320 is five row blocks, H three blocks of K, I = 160 two.
# The limit keeps one channel of few from being the whole row: without it, a single code that rounds the other way is up to 9.4 % of a
# token.
TILED = Model(dims=dims(2, 32, 1, 320, 160, max_tokens=2048, pool_rows=8192), limit=1.0)
# The same in thread order: ten row blocks of linear 2, tails of one and three blocks of K.
TILED_IN_BLOCKS = Model(dims=dims(2, 32, 1, 640, 384, max_tokens=2048, pool_rows=8192), limit=1.0)
EDGE = Model(dims=dims(3, 12, 3, 96, 64, max_tokens=70), limit=10.0)
EDGE_IN_BLOCKS = Model(dims=dims(3, 12, 3, 128, 128, max_tokens=70), limit=10.0)
POOLS = tuple(Model(dims=dims(2, 6, 4, 160, 96, pool_rows=rows)) for rows in (64, 128, 256))
GPT_OSS = {"has_bias": True, "limit": 7.0, "alpha": 1.702, "up_bias": 1.0}
# Widths, K and gates of models with few experts: model, candidate, tokens of each rank.
WIDTHS = {
    "tiny": (Model(dims=dims(1, 4, 2, 64, 64)), SMALL, (50,)),
    "qwen3-30b": (Model(dims=dims(2, 16, 8, 2048, 768)), CANDIDATES[3, 64], (64, 17)),
    "v4-flash": (Model(dims=dims(2, 4, 6, 4096, 2048), limit=10.0), CANDIDATES[2, 176], (128, 90)),
    "gpt-oss-120b": (Model(dims=dims(3, 12, 4, 2880, 2880), **GPT_OSS), CANDIDATES[3, 104], (128, 100, 33)),
    "v3": (Model(dims=dims(4, 8, 8, 7168, 2048)), CANDIDATES[3, 88], (30, 31, 0, 64)),
    "v4-pro": (Model(dims=dims(2, 8, 6, 7168, 3072), limit=10.0), CANDIDATES[2, 160], (128, 33)),
    "v4-pro, few tokens": (Model(dims=dims(1, 8, 6, 7168, 3072), limit=10.0), CANDIDATES[4, 48], (7,)),
}
RANDOM = (
    (Model(dims=dims(1, 5, 3, 96, 64), has_bias=True), SMALL),
    (Model(dims=dims(2, 8, 5, 544, 224), limit=1.0), CANDIDATES[4, 48]),
    (Model(dims=dims(3, 12, 7, 2880, 96), **GPT_OSS), CANDIDATES[3, 64]),
    (Model(dims=dims(4, 64, 32, 64, 64)), CANDIDATES[2, 128]),
    (Model(dims=dims(2, 2, 6, 256, 1056)), CANDIDATES[3, 104]),
    (Model(dims=dims(1, 256, 8, 128, 32)), CANDIDATES[2, 160]),
    (Model(dims=dims(4, 8, 1, 192, 128), has_bias=True), CANDIDATES[2, 176]),
    (Model(dims=dims(2, 8, 3, 768, 640), has_bias=True, limit=1.0), CANDIDATES[2, 176]),
    (Model(dims=dims(3, 12, 5, 512, 128)), CANDIDATES[3, 88]),
    (Model(dims=dims(1, 32, 2, 128, 1152)), CANDIDATES[4, 48]),
)
BIG = Model(dims=dims(1, 96, 6, 7168, 3072, max_tokens=64, pool_rows=1024), limit=10.0)  # 3.4 GB of weights
CASES = ([(model, SMALL) for model in (FEW, PAIR, EDGE, EDGE_IN_BLOCKS, BIG, *POOLS)]
         + [(model, SMALL_CLUSTERS) for model in (EDGE, EDGE_IN_BLOCKS, *POOLS)]
         + [(model, candidate) for model in (TILED, TILED_IN_BLOCKS) for candidate in CANDIDATES.values()]
         + [case[:2] for case in WIDTHS.values()] + list(RANDOM))


def sources_of(model: Model, candidate: Candidate) -> list[tuple[str, str]]:
    """(op, text) of every kernel of a MegaRanks."""
    texts = [(op, moe_sources.source(op, model.dims, is_one_pass=True)) for op in moe_sources.ROUTING_OPS]
    return [*texts, (mega_moe.OP, mega_moe.source(config_for(model, candidate), model.dims, is_virtual=True))]


def compile_ahead(sources: set[tuple[str, str]]) -> None:
    """Many at a time."""
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda source: jit.fetch(*source, "sm_90a"), sources))


@functools.cache
def compile_all() -> None:
    """The kernels of every test behind the first one."""
    sources = {source for case in CASES for source in sources_of(*case)}
    compile_ahead(sources | {(mega_moe.OP, mega_moe.source(config_for(FEW, SMALL), FEW.dims))})


@functools.lru_cache(maxsize=4)
def ranks_of(model: Model, candidate: Candidate) -> MegaRanks:
    """Shared by tests that leave nothing behind."""
    compile_ahead(set(sources_of(model, candidate)))
    return MegaRanks(model, config_for(model, candidate))


def inputs_of(model: Model, tokens: tuple[int, ...], seed: int = 0, experts: tuple[int, ...] | None = None) -> list[Inputs]:
    return [make_inputs(model, num_tokens, 100 * seed + rank, experts) for rank, num_tokens in enumerate(tokens)]
