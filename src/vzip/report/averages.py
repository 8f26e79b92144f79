"""Paired statistics over several tasks: their average retention, and how much of a loss was won back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .paired import Paired
from .stats import percentile_interval


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; 1 is all."""

    point: float
    low: float
    high: float


def average_retention(tasks: Sequence[Paired]) -> Share | None:
    """The mean over tasks of ours / other; None unless every task was compared on the same questions."""
    if not _on_the_same_questions(tasks):
        return None
    return Share(_point(tasks), *percentile_interval(_resampled(tasks)))


def recovered_share(tasks: Sequence[Paired], before: Sequence[Paired]) -> Share | None:
    """How much of the loss of one run (``before``) another one (``tasks``) has won back.

    The loss is 1 - retention against vanilla, averaged over tasks: with 80 % before and 90 % after, half is won back.

    Args:
        tasks: what is to be judged, compared with vanilla, task by task.
        before: the run with the loss, compared with the same vanilla run on the same tasks. One seed draws the same
            questions for both, so the interval is of the three runs' paired differences.

    Returns:
        None where there is no loss outside the noise, or not every task was compared on the same questions.
    """
    if len(tasks) != len(before) or not (_on_the_same_questions(tasks) and _on_the_same_questions(before)):
        return None
    after_draws, before_draws = _resampled(tasks), _resampled(before)
    if percentile_interval(before_draws)[1] >= 1:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = (after_draws - before_draws) / (1 - before_draws)
    point = (_point(tasks) - _point(before)) / (1 - _point(before))
    return Share(point, *percentile_interval(draws))


def _on_the_same_questions(tasks: Sequence[Paired]) -> bool:
    return bool(tasks) and all(task.is_paired and task.resampled is not None for task in tasks)


def _point(tasks: Sequence[Paired]) -> float:
    return float(np.mean([task.retention for task in tasks]))


def _resampled(tasks: Sequence[Paired]) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = np.mean([task.resampled for task in tasks if task.resampled is not None], axis=0)
    return drawn
