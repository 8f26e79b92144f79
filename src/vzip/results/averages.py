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
    """A share, 1 is all, with its 95 % interval; None where a task gives nothing to take one from."""

    point: float
    low: float | None = None
    high: float | None = None


def average_retention(tasks: Sequence[Paired]) -> Share:
    """The mean over one or more tasks of ours / other, with the interval of that mean."""
    if any(task.resampled is None for task in tasks):
        return Share(_point(tasks))
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
    if not tasks or len(tasks) != len(before) or not all(task.is_paired for task in (*tasks, *before)):
        return None
    after_draws, before_draws = _resampled(tasks), _resampled(before)
    if percentile_interval(before_draws)[1] >= 1:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = (after_draws - before_draws) / (1 - before_draws)
    point = (_point(tasks) - _point(before)) / (1 - _point(before))
    return Share(point, *percentile_interval(draws))


def _point(tasks: Sequence[Paired]) -> float:
    return float(np.mean([task.retention for task in tasks]))


def _resampled(tasks: Sequence[Paired]) -> NDArray[np.float64]:
    drawn: NDArray[np.float64] = np.mean([task.resampled for task in tasks if task.resampled is not None], axis=0)
    return drawn
