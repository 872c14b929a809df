"""Rank pools for the distributed tests: one per world size, alive for the whole session."""

import pytest

from megamoe.testing.ranks import RankPool


@pytest.fixture(scope="session")
def rank_pool():
    """`rank_pool(num_ranks)` is the session's RankPool of that size."""
    pools: dict[int, RankPool] = {}

    def get(num_ranks: int) -> RankPool:
        return pools.setdefault(num_ranks, RankPool(num_ranks))

    yield get
    for pool in pools.values():
        pool.close()
