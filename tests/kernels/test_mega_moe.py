"""mega_moe on one GPU that plays W ranks, against the FP64 oracle. The smallest case comes first: a run with -x stops where a bug is easy
to see.

Legend: W ranks, T tokens of a rank, K top-k slots, E experts, e local experts, H hidden, I intermediate.
"""

import functools
import random

import pytest
import torch
from mega_cases import (
    BIG,
    CANDIDATES,
    EDGE,
    EDGE_IN_BLOCKS,
    FEW,
    ONE,
    ONE_IN_BLOCKS,
    PAIR,
    POOLS,
    RANDOM,
    SMALL,
    SMALL_CLUSTERS,
    TILED,
    TILED_IN_BLOCKS,
    WIDTHS,
    compile_all,
    config_for,
    inputs_of,
    ranks_of,
)
from mega_ranks import MegaRanks, Model, Ring, bits, inputs_with_counts, make_inputs, oracle
from moe_ranks import canonical

from megamoe.formats import QuantizedTokens, quantize_tokens
from megamoe.formats.thread_order import from_thread_order
from megamoe.kernels.mega_moe_config import has_thread_order
from megamoe.reference.fold_tokens import fold_tokens as fold_twin
from megamoe.reference.grouped_gemm_swiglu import grouped_gemm_swiglu as swiglu_twin
from megamoe.testing.compare import error_report, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")


@pytest.fixture(scope="module")
def compiled() -> None:
    compile_all()


def in_natural_order(codes: torch.Tensor, model: Model) -> torch.Tensor:
    """The bytes of rows in the arena of a call, [R, K] uint8."""
    if has_thread_order(model.dims.hidden, model.dims.intermediate):
        codes = from_thread_order(codes.view(torch.int32))
    return codes.view(torch.uint8)


@pytest.mark.parametrize("model", (ONE, ONE_IN_BLOCKS), ids=("natural order", "thread order"))
def test_one_tile_step_by_step(model):
    """One rank, one expert, five tokens: what each role leaves behind, in the order of the roles."""
    ranks, given = ranks_of(model, SMALL), make_inputs(model, 5, 0, experts=(0,))
    y, = ranks.call([given])
    ranks.assert_clean()
    mega, view = ranks.megas[0], functools.partial(ranks.arenas.view, 0)
    tokens = fold_twin(quantize_tokens(given.x.cpu(), 32))
    assert torch.equal(canonical(in_natural_order(view("pool_x")[:5], model).cpu()), canonical(tokens.codes.view(torch.uint8))), "pull: codes"
    assert view("pool_x_sf").flatten()[:5].tolist() == tokens.sf.flatten().tolist(), "pull: exponents"
    assert mega._row_weight[:5].tolist() == given.topk_weights.flatten().tolist(), "pull: weights"
    first, row_bytes = view("partials").data_ptr(), 2 * model.dims.hidden
    assert mega._row_dst[:5].tolist() == [first + row_bytes * token for token in range(5)], "pull: destinations"
    weights = model.experts()
    on_gpu = QuantizedTokens(tokens.codes.cuda(), tokens.sf.cuda(), "token")
    expert_idx = torch.zeros(5, dtype=torch.int32, device="cuda")
    twin = fold_twin(swiglu_twin(on_gpu, weights.gate_up, expert_idx=expert_idx, row_weight=given.topk_weights.flatten()))
    assert mega._act_row_sf[:5].tolist() == twin.sf.flatten().tolist(), "fold: exponents"
    act_codes = in_natural_order(view("pool_a")[:5], model).view(torch.float8_e4m3fn)
    act = QuantizedTokens(act_codes, mega._act_row_sf[:5, None], "token").dequantize()
    assert relative_error(act, twin.dequantize()) < 0.05, "linear 1 and fold"
    expected = oracle(model, given)
    assert error_report(view("partials")[:5, 0], expected).max < 0.05, "linear 2 and its way back"
    ranks.judge([given], [y], "combine")


@pytest.mark.parametrize("num_tokens", (1, 8, 9, 33, 128))
@pytest.mark.parametrize("model", (ONE, ONE_IN_BLOCKS), ids=("natural order", "thread order"))
def test_one_expert(model, num_tokens):
    ranks_of(model, SMALL).run(inputs_of(model, (num_tokens,), num_tokens))


@pytest.mark.parametrize("num_tokens", (1, 2, 20, 128))
def test_one_rank(compiled, num_tokens):
    ranks_of(FEW, SMALL).run(inputs_of(FEW, (num_tokens,), num_tokens))


@pytest.mark.parametrize("tokens", ((1, 0), (1, 1), (0, 9), (40, 40), (128, 77)), ids=str)
def test_two_ranks(compiled, tokens):
    ranks_of(PAIR, SMALL).run(inputs_of(PAIR, tokens))


@pytest.mark.parametrize("candidate, num_blocks", ((SMALL, 1), (SMALL, 2), (SMALL, 7), (SMALL_CLUSTERS, 2), (SMALL_CLUSTERS, 6)), ids=str)
def test_few_blocks(compiled, candidate, num_blocks):
    """No block may wait for one that is not there."""
    ranks = MegaRanks(EDGE, config_for(EDGE, candidate), num_blocks=num_blocks)
    ranks.run(inputs_of(EDGE, (70, 33, 5)), num_blocks)
    ranks.ring = Ring(1, 1, 0)
    ranks.run(inputs_of(EDGE, (70, 33, 5), 1), (num_blocks, ranks.ring))


def tile_of(tiles: tuple[int, ...], count: int) -> int:
    """The token tile that `count` rows of an expert are cut into."""
    per_tile = -(-count // -(-count // tiles[-1]))
    return min(size for size in tiles if size >= per_tile)


def counts_for(tiles: tuple[int, ...]) -> list[int]:
    """Rows of each expert, so that every size occurs alone, full and not, and repeated."""
    return [*(size - delta for size in tiles for delta in (0, 3)), tiles[-1] + 1, 2 * tiles[-1], 3 * tiles[-1] - 5, 0, 1]


@pytest.mark.parametrize("candidate", CANDIDATES.values(), ids=str)
@pytest.mark.parametrize("model", (TILED, TILED_IN_BLOCKS), ids=("natural order", "thread order"))
def test_every_token_tile_size(compiled, model, candidate):
    tiles = candidate.token_tiles
    counts = counts_for(tiles)
    assert {tile_of(tiles, count) for count in counts if count} == set(tiles), "every size"
    ranks = MegaRanks(model, config_for(model, candidate))
    for seed in range(2):
        shuffled = counts + [0] * (model.dims.num_experts - len(counts))
        random.Random(seed).shuffle(shuffled)
        ranks.run(inputs_with_counts(model, shuffled, seed), (candidate, shuffled))


@pytest.mark.parametrize("candidate", (SMALL, SMALL_CLUSTERS), ids=str)
@pytest.mark.parametrize("model", POOLS, ids=lambda model: f"{model.dims.pool_rows} rows")
def test_a_small_pool_is_used_many_times(compiled, model, candidate):
    """With the ring that the host chooses for it: 2, 4 and 8 slots for about 40 tiles, and for hundreds of rows of one expert."""
    ranks = MegaRanks(model, config_for(model, candidate))
    assert ranks.ring.num_slots == model.dims.pool_rows // 32
    for seed, experts in enumerate((None, (0,), (1, 4), (5, -1))):
        ranks.run(inputs_of(model, (128, 100), seed, experts), (ranks.ring, experts))


@pytest.mark.parametrize("model, candidate", ((EDGE, SMALL), (EDGE_IN_BLOCKS, SMALL_CLUSTERS)), ids=str)
def test_the_order_of_the_work_does_not_change_a_bit(compiled, model, candidate):
    ranks = ranks_of(model, candidate)
    inputs = inputs_of(model, (70, 33, 70))
    expected = ranks.run(inputs)
    chosen = ranks.ring
    try:
        for band in (1, 2, 3, 8):
            for lag in (0, 1, 2, 5, 40):
                for spare in (0, 1, 7):
                    ranks.ring = Ring(lag + 2 * band - 1 + spare, band, lag)
                    for rank, (y, due) in enumerate(zip(ranks.call(inputs), expected)):
                        wrong = (bits(y) != bits(due)).any(1).nonzero().flatten().tolist()
                        assert not wrong, f"rank {rank}, tokens {wrong[:8]} with {ranks.ring}"
                    ranks.assert_clean(ranks.ring)
    finally:
        ranks.ring = chosen


@pytest.mark.parametrize("experts", (None, (7,), (-1,), (0, 1, 2, 3), (0, 5, 11), (8, -1, 9)), ids=str)
@pytest.mark.parametrize("tokens", ((0, 0, 0), (70, 0, 0), (0, 0, 1), (1, 1, 1), (70, 70, 70), (13, 70, 5)), ids=str)
@pytest.mark.parametrize("model, candidate", ((EDGE, SMALL), (EDGE, SMALL_CLUSTERS), (EDGE_IN_BLOCKS, SMALL_CLUSTERS)), ids=str)
def test_edges(compiled, model, candidate, tokens, experts):
    ranks_of(model, candidate).run(inputs_of(model, tokens, 1, experts))


@pytest.mark.parametrize("model", (EDGE, EDGE_IN_BLOCKS), ids=("natural order", "thread order"))
def test_clusters_change_no_bit(compiled, model):
    """They share copies, not sums."""
    inputs = inputs_of(model, (70, 33, 70))
    alone = MegaRanks(model, config_for(model, SMALL_CLUSTERS._replace(cluster_blocks=1)))
    for y, due in zip(ranks_of(model, SMALL_CLUSTERS).run(inputs), alone.run(inputs)):
        assert torch.equal(bits(y), bits(due))


@pytest.mark.parametrize("name", WIDTHS)
def test_model_widths(compiled, name):
    model, candidate, tokens = WIDTHS[name]
    ranks = MegaRanks(model, config_for(model, candidate))
    ranks.run(inputs_of(model, tokens), name)
    ranks.run(inputs_of(model, tokens[::-1], 1, (0, 2)), name)


def test_a_token_that_is_not_a_number_stays_alone(compiled):
    ranks, inputs = ranks_of(EDGE, SMALL), inputs_of(EDGE, (20, 20, 20))
    for given in inputs[:2]:
        given.topk_idx[[4, 9]] = torch.tensor([[0, -1, 11], [7, 7, 3]], device="cuda")
    expected = ranks.run(inputs)
    inputs[1].x[4, 50], inputs[0].x[9, 0] = torch.nan, -torch.inf
    outputs = ranks.run(inputs, "NaN in rank 1, token 4; Inf in rank 0, token 9")
    assert outputs[1][4].isnan().all() and outputs[0][9].isnan().all()
    outputs[1][4], outputs[0][9] = expected[1][4], expected[0][9]
    assert all(torch.equal(bits(y), bits(due)) for y, due in zip(outputs, expected))


def test_indices_out_of_range_are_skipped_and_told(compiled):
    ranks, inputs = ranks_of(EDGE, SMALL), inputs_of(EDGE, (20, 20, 20), 3)
    inputs[1].topk_idx[7, 2], inputs[1].topk_idx[7, 1], inputs[1].topk_idx[12, 0] = EDGE.dims.num_experts, -(2**40), -2
    ranks.run(inputs)
    assert [calls.routing_error() for calls in ranks.arenas.calls] == [None, (7, 1, -(2**40), 3), None]
    ranks.run(inputs_of(EDGE, (20, 20, 20), 3))
    assert ranks.arenas.calls[1].routing_error() is None


@pytest.mark.parametrize("model, candidate", RANDOM)
def test_random_calls(compiled, model, candidate):
    """Tokens, routing and ring change with every call: 300 in all."""
    ranks, rng = MegaRanks(model, config_for(model, candidate)), random.Random(model.dims.hidden)
    for trial in range(30):
        most = rng.choice((1, 4, 40, model.dims.max_tokens))
        tokens = tuple(rng.choice((0, 1, rng.randint(0, most), most)) for _ in range(model.dims.num_ranks))
        num_experts = model.dims.num_experts
        experts = rng.choice((None, None, tuple(rng.sample(range(-1, num_experts), rng.randint(1, min(8, num_experts))))))
        band, lag = rng.randint(1, 4), rng.randint(0, 5)
        ranks.ring = Ring(lag + 2 * band - 1 + rng.randint(0, 3), band, lag)
        ranks.run(inputs_of(model, tokens, trial, experts), f"trial {trial}: tokens {tokens}, experts {experts}, {ranks.ring}")


def test_many_calls_in_a_row_leave_nothing_behind(compiled):
    """Sizes change from call to call; each result is that of the same call alone."""
    ranks = ranks_of(EDGE, SMALL)
    calls = [inputs_of(EDGE, tokens, seed) for seed, tokens in enumerate(((70, 70, 70), (0, 3, 0), (1, 0, 70), (0, 0, 0), (69, 70, 2)))]
    alone = [ranks.run(inputs) for inputs in calls]
    for repeat in range(20):
        index = repeat * 2 % len(calls)
        for rank, (y, due) in enumerate(zip(ranks.call(calls[index]), alone[index])):
            assert torch.equal(bits(y), bits(due)), f"rank {rank} of call {repeat}"
    ranks.assert_clean()


def test_weights_beyond_two_gigabytes(compiled):
    ranks = MegaRanks(BIG, config_for(BIG, SMALL))
    assert min(ranks.experts[0].gate_up.num_bytes, 2 * ranks.experts[0].down.num_bytes) > 2**31
    ranks.run(inputs_of(BIG, (40,)))
    ranks.run(inputs_of(BIG, (64,), 1, (95, 94, 0)))
