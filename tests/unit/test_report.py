"""megamoe.testing.report: records as JSONL and the part of a page that a program rewrites."""

import re
from dataclasses import dataclass

import pytest

from megamoe.testing.report import append_records, page_markers, read_records, update_page

BEGIN, END = page_markers("bench_x.py")


@dataclass(frozen=True)
class Timed:
    name: str
    us: float
    error: float | None


def test_records_come_back_in_order(tmp_path):
    first, second = tmp_path / "new" / "a.jsonl", tmp_path / "b.jsonl"
    a, b, c = Timed("a", 1.5, None), Timed("b", 2.0, 1e-3), Timed("c", 3.0, 0.0)
    append_records(first, [a])
    append_records(first, [b])
    append_records(second, [c])
    assert first.read_text() == '{"name": "a", "us": 1.5, "error": null}\n{"name": "b", "us": 2.0, "error": 0.001}\n'
    assert read_records([second, first], Timed) == [c, a, b]


def test_only_what_is_between_the_markers_changes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for text in ("one\n", "two\nlines\n"):
        update_page(page, "bench_x.py", text)
        assert page.read_text() == f"before\n{BEGIN}\n{text}{END}\nafter\n"


@pytest.mark.parametrize("text, found", (
    ("", "0 and 0"), (f"{BEGIN}", "1 and 0"), (f"{END}{BEGIN}", "1 and 1"), (f"{BEGIN}{END}{BEGIN}", "2 and 1")))
def test_a_page_without_one_pair_of_markers_is_left_alone(tmp_path, text, found):
    page = tmp_path / "page.md"
    page.write_text(text)
    message = f"bench_x.py: {page} must be a page with one pair of markers {BEGIN} and {END}, got {found}; restore them"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        update_page(page, "bench_x.py", "text")
    assert page.read_text() == text
