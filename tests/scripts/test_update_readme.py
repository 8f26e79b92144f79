"""README's short table is a part of the demo's, which docs/first-hour.md has."""

from __future__ import annotations

import pytest
from scripts.update_readme import PAGE, README, put, short, table_in

FULL = table_in(PAGE.read_text(encoding="utf-8"))


def test_readme_shows_a_part_of_the_demos_table() -> None:
    shown = README.read_text(encoding="utf-8")
    assert table_in(shown, "short demo table") == short(FULL)
    assert put(shown, short(FULL), "short demo table") == shown


def test_what_is_shown_stands_in_the_whole_table() -> None:
    """By another way: every cell of a row is found in the row of the whole table with these tokens and this method."""
    _, _, *rows = short(FULL).splitlines()
    assert len(rows) == 6
    for row in rows:
        tokens, method, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        (whole,) = [line for line in FULL.splitlines() if line.startswith(f"| {tokens} | {method} |")]
        assert all(f"| {cell} |" in whole for cell in cells)


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(SystemExit, match="0 places for the demo table"):
        put("no table here", FULL)
