"""Reading and writing JSON so that no text in it can make a file unreadable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def to_json(value: object, indent: int | None = None) -> bytes:
    """A value as JSON in UTF-8, on one line unless it is indented.

    Line ends inside a text are escaped or, as U+2028 and U+0085, part of its line: ``read_json_lines`` parts lines by
    ``\\n`` alone. Half a surrogate pair, which UTF-8 cannot have, is written as JSON's escape.
    """
    return json.dumps(value, indent=indent, default=_plain, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _plain(value: object) -> object:
    """NumPy numbers as Python's; anything else that JSON does not know as text."""
    return value.item() if isinstance(value, np.generic) else str(value)


def from_json(content: bytes | str) -> Any:
    """What a JSON text says; a byte order mark before it is passed over.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(content.decode("utf-8-sig") if isinstance(content, bytes) else content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises ValueError as ``from_json``, and OSError."""
    return from_json(path.read_bytes())


def read_json_lines(path: Path) -> Iterator[Any]:
    """What each line of a JSON-lines file says; empty lines are passed over.

    Raises:
        ValueError: naming the line that is not JSON.
        OSError: the file cannot be read.
    """
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                yield from_json(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error


def whole_text(text: str) -> str:
    """The text with the replacement character for half a surrogate pair, which no tokenizer and no UTF-8 takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
