"""What is said of a benchmark's protocol; the benchmarks themselves: ``protocol.PROTOCOLS``."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# fraction: 0..1 as lmms-eval prints it; percent: 0..100; points: a benchmark's own scale.
Unit = Literal["fraction", "percent", "points"]
# Entries of one metric, one a question -> what to add to each.
Verdicts = Callable[[Sequence[Mapping[str, Any]]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Protocol:
    """How one task is asked and scored.

    Attributes:
        primary: the metric that tables and retention use, ``a+b`` for a sum.
        unit: of the primary metric as lmms-eval gives it.
        paper: what the paper's column is, or None where the paper has none.
        difference: how the task differs from that; empty where it does not.
        split: of the data, ``configuration/split`` where the data set has several configurations.
        prompt: what the task adds to the question, flags included.
        judge: the model that scores the answers, or None where rules do.
        chance: of the primary metric, in its unit, for a guesser who follows the answer format; None where it depends
            on the answers' distribution.
        cluster: the field of a question that names what it is drawn together with by the bootstrap, since questions
            about one image are not independent; None where each question has an image of its own or none is named.
        together: the rows of a split -> one label a row; rows of one label are scored together or not at all.
        limit_step: a limited run must ask a multiple of this many questions.
        groups: the field of a question by which its score is told once more, as a video's length; None: none.
        video: whether the questions are about videos.
        packages: optional packages that its scoring imports.
        verdicts: says which questions are right where lmms-eval's samples do not; None where they do.
    """

    primary: str
    unit: Unit
    paper: str | None
    difference: str = ""
    split: str = ""
    prompt: str = ""
    judge: str | None = None
    chance: float | None = None
    cluster: str | None = None
    together: Callable[[Any], Sequence[Hashable]] | None = None
    limit_step: int = 1
    groups: str | None = None
    video: bool = False
    packages: tuple[str, ...] = ()
    verdicts: Verdicts | None = None
