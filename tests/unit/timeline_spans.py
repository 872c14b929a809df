"""Spans as the timeline tests write and expect them, and a trace of two ranks."""

import numpy as np
import torch

from megamoe.testing.timeline import KIND_INDEX, SPAN

ABOUT = {"model": "v4-pro", "tokens": 512, "num_ranks": 2, "routing": "uniform", "gpu": "NVIDIA H200", "commit": "abc1234",
         "call_us": 1012.5, "dropped_spans": 0, "clock_shifts_ns": [0, -40]}
WEIGHTS, TOKENS, PULL, FOLD, MATH = range(5)


def put(buffer: torch.Tensor, block: int, lane: int, *spans: tuple) -> None:
    """As Timeline::write does: the count, and (name, linear, tile, part, begin, end) as 32-bit pairs in 64-bit words."""
    buffer[block, lane, 0, 0] = len(spans)
    for i, (name, linear, tile, part, begin, end) in enumerate(spans[:buffer.shape[2] - 1]):
        record = np.array([KIND_INDEX[name], tile, linear, part], "<u4").view("<i8")
        buffer[block, lane, 1 + i] = torch.tensor([begin, end, *record.tolist()])


def span(name: str, linear: int = 0, tile: int = 0, part: int = 0, *, begin: int, end: int, rank: int = 0, block: int = 0,
         lane: int = MATH) -> tuple:
    return (rank, block, lane, KIND_INDEX[name], linear, tile, part, begin, end)


def two_ranks() -> np.ndarray:
    """Rank 1's clock is 40 ns ahead. Two rows are on their way at once in rank 0."""
    return np.array([
        span("pull", tile=1, part=0, begin=1000, end=3000, lane=PULL), span("pull", tile=1, part=4, begin=2000, end=4000, lane=PULL),
        span("main loop", 1, 7, 3, begin=4000, end=9000), span("meet peers", begin=9000, end=9500),
        span("main loop", 0, 5, 2, begin=1500, end=2500, block=1, lane=MATH + 1),
        span("meet peers", begin=2500, end=9600, block=1, lane=MATH + 1),
        span("main loop", 0, 2, 1, begin=1240, end=4540, rank=1), span("meet peers", begin=4540, end=9540, rank=1),
    ], SPAN)
