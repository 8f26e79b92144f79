"""The tables of docs/families.md are what the code says."""

from __future__ import annotations

import pytest
from scripts.update_families import PAGES, PARTS, ROOT, compressors, published, updated

from vzip.errors import ConfigError
from vzip.models.families import ADAPTERS


@pytest.mark.parametrize(("page", "part"), [(page, part) for page, parts in PAGES.items() for part in parts])
def test_a_table_is_what_the_code_says(page, part):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert updated(text, part) == text, "python scripts/update_families.py writes it anew"


def test_every_family_has_a_column():
    assert set(published()) == set(ADAPTERS) and len(PARTS) == 3


def test_a_refusal_is_told_in_its_words(monkeypatch):
    def refuse(*_: object) -> None:
        raise ConfigError("not for anyone")

    for adapter in ADAPTERS:
        monkeypatch.setattr(adapter, "check_settings", refuse)
    table = compressors()
    assert "| yes |" not in table and "no (1)" in table and table.endswith("\n\n1. not for anyone")
