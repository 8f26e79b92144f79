"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def _plain(value: object) -> object:
    """NumPy numbers as Python's; anything else that JSON does not know as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes through a neighbour and renames it."""
    _replace(path, json.dumps(value, indent=2, default=_plain, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """The same, one line a row."""
    _replace(path, "".join(json.dumps(row, default=_plain, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
