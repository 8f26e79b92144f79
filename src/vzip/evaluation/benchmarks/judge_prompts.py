"""What judge models are asked, and how their replies are read.

A benchmark's prompt is its measuring instrument: other words would be another benchmark. The words are their authors',
so they are not kept here but taken from the installed lmms-eval, and held against the digest of the published text in
``prompts/NAME.json``, which names the source and what our protocol does otherwise.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vzip.errors import JudgeError
from vzip.installed import missing_package

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
    """A published prompt, by the name of its file in ``prompts``.

    Raises:
        MissingPackageError: lmms-eval is not installed.
        JudgeError: the installed lmms-eval has another text.
    """
    about = json.loads(
        (resources.files("vzip.evaluation.benchmarks") / "prompts" / f"{name}.json").read_text(encoding="utf-8")
    )
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        raise missing_package("A judge, whose prompts are taken from it,", "lmms_eval")
    file = Path(spec.origin).parent / "tasks" / about["file"]
    try:
        messages = _TEXTS[name](file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, StopIteration, LookupError, ValueError) as error:
        raise JudgeError(_other_text(about, file)) from error
    digest = hashlib.sha256(json.dumps(messages).encode()).hexdigest()
    if digest != about["sha256"]:
        raise JudgeError(_other_text(about, file))
    return JudgePrompt(about["name"], about["version"], digest, messages)


Messages = tuple[tuple[str, str], ...]


def _video_chatgpt(source: str) -> Messages:
    """The list of messages that a function makes of the three texts."""
    function = next(node for node in ast.parse(source).body if getattr(node, "name", None) == "get_eval")
    places = {"question": "{question}", "answer": "{answer}", "pred": "{prediction}"}
    messages = eval(compile(ast.Expression(_assigned(function, "messages")), "lmms-eval", "eval"), places)
    return tuple((message["role"], message["content"]) for message in messages)


def _mm_vet(source: str) -> Messages:
    """A constant, the head of its table and the line before it as MM-Vet has them, and the row that is asked about."""
    examples = ast.literal_eval(_assigned(ast.parse(source), "MM_VET_PROMPT"))
    examples = examples.replace("gpt_query_prompt |", "\nQuestion |", 1).rstrip("\n")
    return (("user", f"{examples}\n\n{{question}} | {{answer}} | {{prediction}} |"),)


def _llava_bench(source: str) -> Messages:
    """The rule for conversations, which is that of all three categories, behind what is to be compared."""
    rule = json.loads(source)["llava_bench_conv"]
    role, rated = rule["role"], (("{answer}", 1), ("{prediction}", 2))
    answers = "".join(f"[{role} {n}]\n{text}\n\n[End of {role} {n}]\n\n" for text, n in rated)
    asked = f"[Context]\n{{context}}\n\n[Question]\n{{question}}\n\n{answers}[System]\n{rule['prompt']}\n\n"
    return (
        ("system", "You are a helpful and precise assistant for checking the quality of the answer."),
        ("user", asked),
    )


_TEXTS: dict[str, Callable[[str], Messages]] = {
    "video_chatgpt_v1": _video_chatgpt,
    "mm_vet_v1": _mm_vet,
    "llava_bench_v1": _llava_bench,
}


def _assigned(scope: ast.AST, name: str) -> ast.expr:
    """What the variable ``name`` is first set to."""
    return next(
        node.value
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name
    )


def _other_text(about: dict[str, Any], file: Path) -> str:
    return (
        f"{file}: not the text of {about['name']}, version {about['version']} (SHA-256 {about['sha256']}), as lmms-eval"
        " 0.7.3 has it. Install that version: scores by another text are no scores of this benchmark."
    )


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
