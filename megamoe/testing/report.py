"""What benchmarks write: plain-text tables and bar charts of 100 columns, records as JSONL, their part of a page. Measures nothing."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from megamoe.errors import check

WIDTH = 100

Record = TypeVar("Record")  # a dataclass whose fields JSON has


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right, with a rule under `header`."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    first, *others = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows))
    return "\n".join((first, "-" * len(first), *others))


def bar_chart(labels: Sequence[str], columns: Mapping[str, Sequence[int]]) -> str:
    """One row per label and one bar per column, every bar on the scale of the largest value, followed by its value.

    Args:
        labels: names of the rows.
        columns: title -> values, one per label, not negative.

    Returns:
        Lines of at most WIDTH characters.
    """
    largest = max(1, *(value for values in columns.values() for value in values))
    label_width, digits = max(map(len, labels)), len(str(largest))
    cell_width = (WIDTH - label_width) // len(columns) - 2
    bar_width = cell_width - digits - 1

    def cell(value: int) -> str:
        return f"  {'#' * round(bar_width * value / largest):<{bar_width}} {value:>{digits}}"

    lines = [" " * label_width + "".join("  " + title[:cell_width].ljust(cell_width) for title in columns)]
    lines += [label.ljust(label_width) + "".join(map(cell, row)) for label, *row in zip(labels, *columns.values(), strict=True)]
    return "\n".join(line.rstrip() for line in lines)


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Append one line of JSON per record; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)


def read_records(paths: Iterable[Path], kind: type[Record]) -> list[Record]:
    """The records of these files as `kind`, in their order."""
    return [kind(**json.loads(line)) for path in paths for line in path.read_text().splitlines() if line]


def page_markers(program: str) -> tuple[str, str]:
    """The lines of a page between which `program --markdown` writes."""
    return f"<!-- {program} --markdown: begin -->", f"<!-- {program} --markdown: end -->"


def update_page(page: Path, program: str, text: str) -> None:
    """Put `text` between the markers of `program`.

    Raises:
        ValueError: the page has not exactly one pair of them, in order.
    """
    (begin, end), whole = page_markers(program), page.read_text()
    before, _, rest = whole.partition(begin)
    _, found_end, after = rest.partition(end)
    counts = whole.count(begin), whole.count(end)
    check(counts == (1, 1) and bool(found_end), program, str(page), f"a page with one pair of markers {begin} and {end}",
          f"{counts[0]} and {counts[1]}", "restore them")
    page.write_text(f"{before}{begin}\n{text}{end}{after}")
