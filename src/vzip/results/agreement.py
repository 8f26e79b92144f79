"""How far a run's answers are vanilla's, and how it does on questions that a control gets wrong, and on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .averages import Share
from .paired import match, same_answers
from .score_units import Units, units_of
from .stats import percentile_interval, resampled_retention

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Group:
    """Some questions of a task and the share of them that a run answers rightly; None where the group is empty."""

    num_questions: int
    right: Share | None


def agreement(rows: Rows, vanilla_rows: Rows, task: str) -> Share:
    """The share of questions with vanilla's answer, with its interval over questions (over images, where several are
    about one).

    Raises:
        ManifestError: the runs answered different questions.
    """
    rows, vanilla_rows = match(rows, vanilla_rows, task)
    same = np.array(same_answers(rows, vanilla_rows), dtype=np.float64)
    return _share(same, [row.get("cluster") for row in rows], task)


def by_difficulty(rows: Rows, control_rows: Rows, task: str, metric: str) -> tuple[Group, Group] | None:
    """A run on the hard questions, those that the control answers wrongly, and on the easy ones, the rest.

    Returns:
        None where the metric's answers are not right or wrong.

    Raises:
        ManifestError: the runs answered different questions.
    """
    rows, control_rows = match(rows, control_rows, task)
    units, control = units_of(metric, rows), units_of(metric, control_rows)
    if units is None or control is None or units.correct is None or control.correct is None:
        return None
    if len(units.correct) != len(units.clusters) or units.keys != control.keys:  # units that hold several questions
        return None
    groups = []
    for chosen in (~control.correct, control.correct):
        labels = [label for label, belongs in zip(units.clusters, chosen, strict=True) if belongs]
        right = units.correct[chosen].astype(np.float64)
        groups.append(Group(len(right), _share(right, labels, task) if len(right) else None))
    return groups[0], groups[1]


def _share(flags: np.ndarray, labels: Sequence[object], task: str) -> Share:
    """The mean of zeros and ones, with an interval over labels (a label of None stands for itself)."""
    own = tuple(number if label is None else (label,) for number, label in enumerate(labels))
    values, aggregate = Units(flags, None, None, tuple(range(len(flags))), own).by_cluster()
    if len(values) < 2:
        return Share(float(flags.mean()))
    whole = np.ones_like(values) if values.ndim == 1 else values[:, [1, 1]]
    point, resampled = resampled_retention(task, values, whole, aggregate)
    return Share(point, *percentile_interval(resampled))
