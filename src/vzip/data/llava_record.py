"""One record of a LLaVA-format file: its rules, checked once, and the identity by which it is sampled.

A record is an object with ``conversations`` (a list of ``{"from": "human" | "gpt", "value": text}``), and optionally
``id``, ``image`` and ``video`` (a path or a list of paths). One ``<image>`` placeholder in the text stands for one
image, one ``<video>`` for one video; in a record without videos the latter is a word like any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vzip.errors import nearest

Role = Literal["user", "assistant"]
IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
ROLES: Mapping[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NUM_KEY_BYTES = 16


class RecordError(ValueError):
    """What is wrong with one record; the reader gathers these and names file and line."""


@dataclass(frozen=True)
class Turn:
    """One message; ``text`` is as the file has it, placeholders included."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One conversation. ``images`` and ``videos`` are files, in the order of their placeholders."""

    id: str
    images: list[Path]
    turns: list[Turn]
    videos: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """A checked record; ``id`` is None where the file gives none, paths are the file's own words."""

    id: str | None
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    videos: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """Images, then videos."""
        return (*self.images, *self.videos)

    @property
    def key(self) -> bytes:
        """16 bytes that depend on the record alone: on its id, images and words, not on its place in the file.

        The id alone would not do: LLaVA's mixture uses a COCO image's number as the id of every conversation about
        it. Records that agree in all three are the same sample and share the key.
        """
        content = [self.id, self.images, [[turn.role, turn.text] for turn in self.turns]]
        content += [self.videos] if self.videos else []  # so that records without videos keep the keys they had
        return hashlib.blake2b(json.dumps(content).encode("ascii"), digest_size=NUM_KEY_BYTES).digest()

    def label(self, i: int) -> str:
        """The id, or ``#i`` for the sample at place ``i`` that has none."""
        return self.id if self.id is not None else f"#{i}"

    @property
    def num_words(self) -> int:
        """Words of all turns, divided at white space: LLaVA's measure for grouping by length."""
        return sum(len(turn.text.split()) for turn in self.turns)

    @property
    def source(self) -> str:
        """The first folder of the first image's or video's path (``coco``, ``gqa``, ...), or ``text-only``."""
        if not self.files:
            return "text-only"
        parts = [part for part in Path(self.files[0]).parts if part not in ("/", ".")]
        return parts[0] if len(parts) > 1 else "."


def parse_record(raw: Any) -> Record:
    """Checks a decoded record.

    An assistant turn that opens the conversation is left out, as LLaVA's training does; after that, user and assistant
    take turns.

    Raises:
        RecordError: what breaks the format, with its value.
    """
    if not isinstance(raw, dict):
        raise RecordError(f"is a {type(raw).__name__}, not an object")
    record = Record(_identity(raw.get("id")), _paths(raw, "image"), _turns(raw), _paths(raw, "video"))
    _check_placeholders(record, IMAGE_PLACEHOLDER, record.images, "image")
    if record.videos:
        _check_placeholders(record, VIDEO_PLACEHOLDER, record.videos, "video")
    return record


def _identity(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RecordError(f"'id' is {_shown(value)}: must be a string or a whole number")
    return _unicode("'id'", str(value))


def _paths(raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key)
    if value is None:
        return ()
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            raise RecordError(f"'{key}' is {_shown(value)}: must be a path or a list of paths")
        _unicode(f"'{key}'", path)
    return tuple(paths)


def _turns(raw: Mapping[str, Any]) -> tuple[Turn, ...]:
    conversation = raw.get("conversations")
    if not isinstance(conversation, list):
        keys = ", ".join(map(str, raw)) or "none"
        raise RecordError(f"'conversations' is {_shown(conversation)}: must be a list of turns (the keys are: {keys})")
    turns = [_turn(number, turn) for number, turn in enumerate(conversation)]
    if turns and turns[0].role == "assistant":
        del turns[0]
    if not any(turn.role == "assistant" for turn in turns):
        raise RecordError("no 'gpt' turn follows a 'human' turn: there is nothing to learn from")
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise RecordError(f"two {turn.role} turns follow one another: 'human' and 'gpt' must alternate")
    return tuple(turns)


def _turn(number: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise RecordError(f"conversations[{number}] is {_shown(turn)}: must have 'from' and 'value'")
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise RecordError(
            f"conversations[{number}] is from {_shown(speaker)}{nearest(str(speaker), ROLES)}: must be 'human' or 'gpt'"
        )
    if not isinstance(text, str):
        raise RecordError(f"conversations[{number}] has the value {_shown(text)}: must be a string")
    return Turn(ROLES[speaker], _unicode(f"conversations[{number}]", text))


def _unicode(where: str, text: str) -> str:
    """Refuses what JSON can write and neither a tokenizer nor a file system takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{where} holds half a surrogate pair at character {error.start}") from error
    return text


def _check_placeholders(record: Record, placeholder: str, files: tuple[str, ...], thing: str) -> None:
    num_placeholders = sum(turn.text.count(placeholder) for turn in record.turns)
    if num_placeholders != len(files):
        raise RecordError(
            f"has {num_placeholders} {placeholder} placeholder(s) and {len(files)} {thing}(s): there must be as many of"
            " one as of the other"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
