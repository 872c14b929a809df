"""Plain-text tables and bar charts for terminals of 100 columns. Formatting only: nothing here measures or prints."""

from collections.abc import Mapping, Sequence

WIDTH = 100


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
