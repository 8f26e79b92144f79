"""What judge models are asked (``prompts/NAME.json``), and how their replies are read."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

MAX_SCORE = 5
VIDEO_PROMPT = "video_chatgpt_v1"
# A dictionary as it was asked for, bare or within other text; longer ones are nonsense.
_DICTIONARY = re.compile(r"\{[^{}]{1,500}\}")


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt with places such as ``{question}``, ``{answer}`` and ``{prediction}``.

    Attributes:
        name, version: a change of a single letter needs a new version.
        sha256: of the messages.
        messages: ``role`` and ``content`` of each turn.
    """

    name: str
    version: int
    sha256: str
    messages: tuple[tuple[str, str], ...]

    def fill(self, **values: str) -> list[dict[str, str]]:
        """The chat about one question; ``values`` by the names of the places."""
        # Not str.format: the prompt shows a dictionary, and what is filled in may hold braces.
        places = re.compile(r"\{(" + "|".join(values) + r")\}")
        return [
            {"role": role, "content": places.sub(lambda place: values[place[1]], content)}
            for role, content in self.messages
        ]


@dataclass(frozen=True)
class Verdict:
    """What a judge says of an answer: whether it is right, and how well it matches, 0 to 5."""

    correct: bool
    score: int


@cache
def read_prompt(name: str) -> JudgePrompt:
    """A prompt of this package, by the name of its file."""
    content = json.loads((resources.files("vzip.evaluation") / "prompts" / f"{name}.json").read_text(encoding="utf-8"))
    messages = tuple((message["role"], message["content"]) for message in content["messages"])
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    return JudgePrompt(content["name"], content["version"], digest, messages)


def read_verdict(reply: str) -> Verdict | None:
    """The verdict in a reply such as ``{'pred': 'yes', 'score': 4.8}``, or None if there is not exactly one.

    A broken score is cut to its whole part, as the published script does.
    """
    found = [verdict for text in _DICTIONARY.findall(reply) if (verdict := _verdict(text)) is not None]
    return found[0] if len(found) == 1 else None


def _verdict(text: str) -> Verdict | None:
    try:
        content: Any = ast.literal_eval(text)
        said, score = str(content["pred"]).strip().strip(".").lower(), float(content["score"])
    except (ValueError, SyntaxError, LookupError, TypeError, RecursionError, MemoryError):
        return None
    if isinstance(content["score"], bool) or said not in ("yes", "no") or not 0 <= score <= MAX_SCORE:
        return None
    return Verdict(said == "yes", int(score))
