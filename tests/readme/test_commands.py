"""Every command that README.md, CONTRIBUTING.md and docs show is tried, each as commands.yaml says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.readme.shown import PAGES, TAGS, Entry, entries, shown_commands

ENTRIES = entries()


def test_every_command_shown_has_an_entry_and_every_entry_is_shown() -> None:
    shown = {command: page.name for page in PAGES for command in shown_commands(page.read_text(encoding="utf-8"))}
    listed = [entry.command for entry in ENTRIES]
    assert len(listed) == len(set(listed))
    assert not (untagged := [f"{page}: {command}" for command, page in shown.items() if command not in listed]), (
        untagged
    )
    assert not (gone := [command for command in listed if command not in shown]), gone


def test_every_entry_says_what_must_come() -> None:
    for entry in ENTRIES:
        assert entry.tag in TAGS, entry
        assert entry.says, entry
        assert (entry.exit != 0) == (entry.tag == "refuse"), entry


def test_commands_are_found_in_blocks_and_in_prose() -> None:
    page = "`make x` `vzip.ops` `python -m vzip\nruns`\n```bash\nmake y  # why\n\npython a.py \\\n  b=1\n```\n"
    assert shown_commands(page) == ["make y", "python a.py b=1", "make x", "python -m vzip runs"]


def test_placeholders_are_whole_words() -> None:
    entry = Entry("vzip judge RUN --run DIR/x", "run", where={"RUN": "runs/a", "DIR": "d"}, add="--yes")
    assert entry.line == "vzip judge runs/a --run d/x --yes"


@pytest.mark.whole
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.part == "evaluating"], ids=lambda entry: entry.command[:80])
def test_the_command_does_what_the_page_says(entry: Entry, tried: Callable[[Entry], None]) -> None:
    """One after the other, in one process (--dist loadfile): they share a copy of the checkout."""
    tried(entry)
