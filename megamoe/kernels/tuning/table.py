"""Measured choices: sm90_table.json, written by launch/tune_gemm.py and read once. Knows nothing of cost models."""

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from megamoe.kernels.fp4_gemm_config import Fp4GemmConfig

PATH = Path(__file__).with_name("sm90_table.json")
# A measurement speaks for rows per group within this factor of its own: beyond, another list of token tiles may be the better one.
ROWS_FACTOR = 1.1


@dataclass(frozen=True)
class Entry:
    """The fastest config found for a shape, and its time."""

    n: int
    k: int
    num_groups: int
    rows: int
    num_sms: int
    us: float
    config: Fp4GemmConfig

    @property
    def shape(self) -> tuple:
        return self.n, self.k, self.num_groups, self.config.epilogue, self.num_sms


@dataclass(frozen=True)
class Table:
    """All entries, by shape."""

    by_shape: dict[tuple, tuple[Entry, ...]]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> "Table":
        by_shape: dict[tuple, dict[int, Entry]] = {}
        for entry in entries:  # a later entry replaces an earlier one of the same shape and rows
            by_shape.setdefault(entry.shape, {})[entry.rows] = entry
        return cls({shape: tuple(by_rows[rows] for rows in sorted(by_rows)) for shape, by_rows in by_shape.items()})

    def find(self, *, n: int, k: int, num_groups: int, rows: int, epilogue: str, num_sms: int) -> Fp4GemmConfig | None:
        """The config of the entry nearest to `rows`, if it is within ROWS_FACTOR."""
        near = [(max(entry.rows / rows, rows / entry.rows), entry.rows, entry.config)
                for entry in self.by_shape.get((n, k, num_groups, epilogue, num_sms), ())]
        best = min(near, key=lambda item: item[:2], default=None)
        return best[2] if best is not None and best[0] <= ROWS_FACTOR else None

    def entries(self) -> list[Entry]:
        return sorted((e for shape in self.by_shape.values() for e in shape), key=lambda e: (e.shape[3], e.num_groups, e.n, e.k, e.rows))


@functools.cache
def read_table(path: Path = PATH) -> Table:
    """The table at `path`. Raises ValueError for an entry that is not a legal config."""
    return Table.of(_entry(item) for item in json.loads(path.read_text()))


def write_table(table: Table, path: Path = PATH) -> None:
    """One entry per line, so that a change of one is a change of one line."""
    lines = ",\n".join(f"  {json.dumps(asdict(entry))}" for entry in table.entries())
    path.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")
    read_table.cache_clear()


def _entry(item: dict) -> Entry:
    config = dict(item["config"])
    config["token_tiles"] = tuple(config["token_tiles"])
    return Entry(**{**item, "config": Fp4GemmConfig(**config)})
