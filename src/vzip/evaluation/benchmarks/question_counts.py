"""How many questions a benchmark has: from committed counts before anything is loaded, held against the data after it.

The counts and their public sources are in ``question_counts.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

logger = logging.getLogger(__name__)


@cache
def known_counts() -> dict[str, dict[str, Any]]:
    """By task: ``num_questions`` (None: not known), ``exact`` (whether the source says just so much), ``source``."""
    text = (resources.files("vzip.evaluation.benchmarks") / "question_counts.json").read_text(encoding="utf-8")
    return dict(json.loads(text)["tasks"])


def num_questions(task: str, limit: int | None = None) -> int | None:
    """How many questions of a task are asked, or None where no count is committed.

    Args:
        task: its name.
        limit: ``eval.limit``.
    """
    count = known_counts().get(task, {}).get("num_questions")
    return count if count is None or limit is None else min(count, limit)


def compare_counts(loaded: Iterable[tuple[str, int]]) -> None:
    """Warns of tasks whose data has another number of questions than was committed.

    Args:
        loaded: tasks, each with the number of rows of its data.
    """
    for task, count in loaded:
        known = known_counts().get(task, {})
        if known.get("num_questions") not in (None, count):
            logger.warning(
                "task %s: its data has %d questions, the committed count is %d (%s). All %d count, and the record says"
                " so; evaluation/benchmarks/question_counts.json is to be corrected if the data is the benchmark's.",
                *(task, count, known["num_questions"], known["source"], count),
            )
