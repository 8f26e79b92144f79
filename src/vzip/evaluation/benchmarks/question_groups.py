"""Questions that are scored together: where one cannot be asked, the others are worth nothing either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vzip.errors import ConfigError
from vzip.evaluation.answering.questions import Key, Question

from .protocols import protocol_of


def partners_of(
    problems: Mapping[Key, str], questions: Sequence[Question], data: Mapping[str, Mapping[str, Any]]
) -> dict[Key, str]:
    """Questions without a problem of their own that are scored together with one that has, and why they are left out.

    Args:
        problems: why questions cannot be asked.
        questions: all that were to be asked.
        data: by task and split, the questions' rows.
    """
    found: dict[Key, str] = {}
    for task in {key[0] for key in problems}:
        protocol = protocol_of(task)
        if protocol is None or protocol.together is None:
            continue
        of_task = [question for question in questions if question.key[0] == task]
        labels = protocol.together(data[task][of_task[0].request.args[-1]])
        at_fault = {labels[key[1]]: key[1] for key in problems if key[0] == task}
        for question in of_task:
            partner = at_fault.get(labels[question.key[1]])
            if partner is not None and question.key not in problems:
                found[question.key] = f"is scored together with question {partner}, which cannot be asked"
    return found


def check_limit(tasks: Sequence[str], limit: int | None) -> None:
    """Refuses a limit that would cut through questions that are scored together.

    Raises:
        ConfigError: an odd number of MME's questions.
    """
    for task in tasks:
        protocol = protocol_of(task)
        if limit is not None and protocol is not None and limit % protocol.limit_step:
            raise ConfigError(
                f"limit={limit}: {task} scores {protocol.limit_step} questions about an image together, so the limit"
                f" must be a multiple of {protocol.limit_step}. Change eval.limit."
            )
