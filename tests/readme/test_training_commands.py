"""The second part of commands.yaml, in a file of its own so that both parts run at the same time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.readme.shown import Entry, entries

ENTRIES = entries()


@pytest.mark.whole
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.part == "training"], ids=lambda entry: entry.command[:80])
def test_the_command_does_what_the_page_says(entry: Entry, tried: Callable[[Entry], None]) -> None:
    """One after the other, in one process (--dist loadfile): they share a copy of the checkout."""
    tried(entry)
