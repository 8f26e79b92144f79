"""docs/methods.md has a section of every method."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vzip.installed import checkout

ROOT = checkout()
HEADINGS = re.findall(r"^### (.+)$", (ROOT / "docs/methods.md").read_text(encoding="utf-8"), re.MULTILINE)
NAMES = [name for heading in HEADINGS for name in re.findall(r"`(\w+)`", heading)]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("compressor/*.yaml")) + sorted((ROOT / "configs").glob("pruner/*.yaml"))
)
def test_every_option_has_a_section(path: Path) -> None:
    assert NAMES.count(path.stem) == 1, f"docs/methods.md: one section with `{path.stem}` in its heading"


def test_recipes_and_options_that_it_names_are_there() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    recipes = re.findall(r"\+exp=(\w+)", page)
    assert len(recipes) > 5 and all((ROOT / f"configs/exp/{name}.yaml").is_file() for name in recipes)
    for group, name in re.findall(r"(compressor|pruner)=(\w+)", page):
        assert (ROOT / f"configs/{group}/{name}.yaml").is_file(), f"{group}={name}"
