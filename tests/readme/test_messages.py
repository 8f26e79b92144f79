"""Every message that docs/troubleshooting.md explains is one that the code still gives."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

import pytest
from tests.readme.shown import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
GAP = "\0"  # what is filled in


def text_of(node: ast.AST) -> str | None:
    """A string as it stands in the source, with ``GAP`` for what is filled in; None for anything else."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sdg]", GAP, node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(GAP if isinstance(part, ast.FormattedValue) else str(text_of(part)) for part in node.values)
    return None


@lru_cache(maxsize=1)
def messages() -> list[str]:
    """All strings of the package but docstrings."""
    found = []
    for path in sorted((ROOT / "src" / "vzip").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        found += [text for node in ast.walk(tree) if id(node) not in said and (text := text_of(node)) is not None]
    return found


def gives(message: str, quoted: str) -> bool:
    """Whether a message reads as quoted: these words in their order, whatever is between where ``...`` stands."""
    pieces = [re.escape(piece.strip()) for piece in quoted.split("...")]
    return re.search(".*?".join(pieces), message, re.DOTALL) is not None


def test_the_page_has_messages_of_every_kind() -> None:
    assert len(QUOTED) == len(set(QUOTED)) > 30


@pytest.mark.parametrize("quoted", QUOTED)
def test_the_code_gives_the_message(quoted: str) -> None:
    own_words = [piece for piece in quoted.split("...") if piece.strip()]
    assert max(len(piece) for piece in own_words) >= 12, "too little of the message to find it by"
    # No quoted word may be one that is filled in: the fixed text of the source has to have it all.
    assert any(gives(message, quoted) for message in messages()), f"{PAGE.name} explains what no code says: {quoted}"


def test_a_message_that_is_gone_is_noticed() -> None:
    assert gives(f"{GAP}: too many pixels ({GAP})", "...: too many pixels (...)")
    assert not gives(f"{GAP}: too many dots ({GAP})", "...: too many pixels (...)")
    assert not gives(f"budget={GAP}", "budget=64tok")
