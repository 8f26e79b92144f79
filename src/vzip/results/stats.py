"""Uncertainty of scores and of retention: bootstrap over questions, and McNemar's test.

Compressed and vanilla answered the same questions, so both are resampled together: what makes a question hard for both
cancels out of their ratio.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vzip.errors import ConfigError

Z_95 = 1.959964  # of the normal distribution: 95 % lie within so many standard errors
Aggregate = Callable[[np.ndarray], float]
# Index matrices are made in pieces of at most this many numbers (32 MB).
_MAX_INDICES = 4_000_000


def standard_error(scores: np.ndarray) -> float:
    """Standard error of the mean of per-question scores ``[n]``; NaN for fewer than two."""
    scores = np.asarray(scores, dtype=np.float64)
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan")


def clustered_standard_error(scores: np.ndarray, labels: Sequence[object]) -> float:
    """Standard error of the mean of scores ``[n]`` of which those with one label are not independent.

    The usual sandwich estimate: residuals are summed within each cluster. Where each score has a label of its own, it
    is ``standard_error``. NaN for fewer than two clusters.
    """
    scores = np.asarray(scores, dtype=np.float64)
    sums: dict[object, float] = {}
    for label, residual in zip(labels, scores - scores.mean(), strict=True):
        sums[label] = sums.get(label, 0.0) + float(residual)
    if len(sums) < 2:
        return float("nan")
    return math.sqrt(len(sums) / (len(sums) - 1) * sum(value**2 for value in sums.values())) / len(scores)


def score_interval(
    value: float, error: float | None, num_questions: int, unit: str | None
) -> tuple[float, float] | None:
    """The 95 % interval of a score by its standard error, never beyond what the score can be.

    Of fractions and percentages it is Wilson's (1927), with the number of independent questions that the standard error
    tells of: near 0 and 1 it is not symmetric, and where all answers are right it still has a width. Of other scores it
    is 1.96 standard errors to each side, not below 0.

    Args:
        value, error: in ``unit``.
        num_questions: behind it; asked where all or none are right, which has no standard error.
        unit: ``fraction``, ``percent``, ``points``, or None where it is not known.

    Returns:
        (low, high), in ``unit``; None without a standard error.
    """
    if error is None or math.isnan(error):
        return None
    most = {"fraction": 1.0, "percent": 100.0}.get(unit or "")
    if most is None or not 0 <= value <= most:
        low, high = value - Z_95 * error, value + Z_95 * error
        return (max(0.0, low) if value >= 0 else low), high
    share, squared = value / most, (error / most) ** 2
    if squared == 0 and 0 < share < 1:  # as right each time
        return value, value
    number = share * (1 - share) / squared if squared else float(num_questions)
    weight = Z_95**2 / number if number else math.inf
    if math.isinf(weight):
        return 0.0, most
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return most * max(0.0, middle - half), most * min(1.0, middle + half)


def bootstrap_standard_error(
    rows: np.ndarray,
    aggregate: Aggregate,
    *,
    num_resamples: int = 200,
    seed: int = 0,
) -> float:
    """Standard error of ``aggregate(rows)``, from its spread over resampled questions.

    Args:
        rows: one entry a question, any type (object arrays of dicts are fine).
        aggregate: rows -> score.
        num_resamples: how often to draw.
        seed: of the draws.
    """
    blocks = _draws(len(rows), num_resamples, np.random.default_rng(seed))
    values = [aggregate(rows[draw]) for block in blocks for draw in block]
    return float(np.std(values, ddof=1))


def retention_interval(
    per_task: Mapping[str, tuple[np.ndarray, np.ndarray]],
    aggregate: Mapping[str, Aggregate] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Retention (compressed score / vanilla score, averaged over tasks) with a percentile bootstrap interval.

    Args:
        per_task: for each task the per-question scores of the compressed and of the vanilla run, in the same order of
            questions. Numbers, or anything the task's aggregate takes.
        aggregate: for each task that is not a plain mean, rows -> score (F1, MME's score, ...).
        num_resamples: how often to draw.
        seed: of the draws; a task's draws do not depend on which other tasks there are.
        confidence: of the interval, between 0 and 1.

    Returns:
        (point, low, high); 1.0 is "as good as vanilla".

    Raises:
        ConfigError: no task, unequal numbers of questions, or a vanilla score of 0 (no ratio to it).
    """
    if not per_task:
        raise ConfigError("retention needs at least one task that both runs have.")
    points, resampled = [], []
    for task, (compressed, vanilla) in per_task.items():
        point, ratios = resampled_retention(task, compressed, vanilla, (aggregate or {}).get(task), num_resamples, seed)
        points.append(point)
        resampled.append(ratios)
    low, high = percentile_interval(np.mean(resampled, axis=0), confidence)
    return float(np.mean(points)), low, high


def resampled_retention(
    task: str,
    compressed: np.ndarray,
    vanilla: np.ndarray,
    aggregate: Aggregate | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, NDArray[np.float64]]:
    """Retention on one task, and ``[num_resamples]`` bootstrap values of it, not finite where vanilla scored 0.

    Values of several tasks may be averaged element by element: each task is drawn independently of the others.

    Args, Raises: as ``retention_interval``, for one task; ``aggregate`` None is the mean.
    """
    compressed, vanilla = np.asarray(compressed), np.asarray(vanilla)
    if len(compressed) != len(vanilla) or len(vanilla) == 0:
        raise ConfigError(
            f"task {task}: {len(compressed)} compressed and {len(vanilla)} vanilla scores; retention needs both runs on"
            " the same questions."
        )
    score = aggregate or _mean
    base = score(vanilla)
    if base == 0:
        raise ConfigError(f"task {task}: the vanilla score is 0, so retention is not defined. Leave the task out.")
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    return score(compressed) / base, _resampled_ratios(compressed, vanilla, score, num_resamples, rng)


def mean_interval(
    values: np.ndarray, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of independent values ``[n]``: a percentile bootstrap over them.

    The draws depend on seed and ``n`` alone, so that means of several methods on the same units are drawn together.

    Raises:
        ConfigError: fewer than two values, which say nothing of their spread.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        raise ConfigError(f"{len(values)} values: an interval needs two or more.")
    blocks = _draws(len(values), num_resamples, np.random.default_rng(seed))
    return percentile_interval(np.concatenate([values[block].mean(axis=1) for block in blocks]), confidence)


def percentile_interval(resampled: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """(low, high) of bootstrap values ``[num_resamples]``; those that are not finite are left out.

    Raises:
        ConfigError: a confidence that is not between 0 and 1, or no finite value.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence}: must be between 0 and 1.")
    # A resample in which vanilla scored 0 has no ratio; with few questions and a low score that can happen.
    finite = resampled[np.isfinite(resampled)]
    if len(finite) == 0:
        raise ConfigError("vanilla scored 0 in every resample: too few questions for an interval.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar_p(num_lost: int, num_gained: int) -> float:
    """Two-sided exact McNemar test: could two runs that are equally good differ this much?

    Args:
        num_lost: questions that only the first run answered rightly.
        num_gained: questions that only the second run answered rightly.

    Returns:
        The probability, under "each question they disagree on is a fair coin", of a split at least this uneven; 1.0
        where they disagree on none.
    """
    if num_lost < 0 or num_gained < 0:
        raise ConfigError(f"num_lost={num_lost}, num_gained={num_gained}: must be 0 or more.")
    total = num_lost + num_gained
    # Logarithms, since the coefficients of some ten thousand disagreements overflow.
    log_all = math.lgamma(total + 1) - total * math.log(2)
    tail = sum(
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(total - k + 1))
        for k in range(min(num_lost, num_gained) + 1)
    )
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, corrected by Holm's step-down rule: each may be held against the level as it is.

    The k-th smallest of m counts m - k + 1 times, and none less than one before it.
    """
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    corrected, highest = [1.0] * len(p_values), 0.0
    for place, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[number]))
        corrected[number] = highest
    return corrected


def difference_p(point: float, resampled: np.ndarray, num_apart: int) -> float:
    """Two-sided p-value of a paired difference being 0, from its bootstrap: normal, with the spread of the draws.

    (Counting draws beyond 0 cannot give less than one in their number, which no correction for many tests survives.)

    Args:
        point: the difference.
        resampled: its bootstrap values.
        num_apart: questions on which the two differ. None of the fair coins that they are without a difference falls
            all one way less often than 2 in 2^num_apart, so p is never below: few questions have no spread to tell of.
    """
    finite = resampled[np.isfinite(resampled)]
    spread = float(np.std(finite, ddof=1)) if len(finite) > 1 else 0.0
    if point == 0 or num_apart < 2:
        return 1.0
    normal = math.erfc(abs(point) / spread / math.sqrt(2)) if spread else 0.0
    return max(normal, 2.0 ** (1 - num_apart))


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))


def _resampled_ratios(
    compressed: np.ndarray,
    vanilla: np.ndarray,
    score: Aggregate,
    num_resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """``[num_resamples]`` ratios; not finite where vanilla scored 0."""
    tops: list[np.ndarray] = []
    bottoms: list[np.ndarray] = []
    for block in _draws(len(vanilla), num_resamples, rng):
        for rows, scores in ((compressed, tops), (vanilla, bottoms)):
            if score is _mean:  # the common case, a whole block at once
                scores.append(rows[block].mean(axis=1, dtype=np.float64))
            else:
                scores.append(np.array([score(rows[draw]) for draw in block], dtype=float))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate(tops) / np.concatenate(bottoms)


def _draws(num_questions: int, num_resamples: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Blocks ``[b, num_questions]`` of indices drawn with replacement, ``num_resamples`` rows in all."""
    step = max(1, _MAX_INDICES // num_questions)
    for start in range(0, num_resamples, step):
        yield rng.integers(0, num_questions, size=(min(step, num_resamples - start), num_questions))
