"""Uncertainty of scores and of retention, by bootstrap over questions.

Compressed and vanilla answered the same questions, so both are resampled together: what makes a question hard for both
cancels out of their ratio.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from vzip.errors import ConfigError

Aggregate = Callable[[np.ndarray], float]
# Index matrices are made in pieces of at most this many numbers (32 MB).
_MAX_INDICES = 4_000_000


def standard_error(scores: np.ndarray) -> float:
    """Standard error of the mean of per-question scores ``[n]``; NaN for fewer than two."""
    scores = np.asarray(scores, dtype=np.float64)
    return float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else float("nan")


def bootstrap_standard_error(
    rows: np.ndarray,
    aggregate: Aggregate,
    *,
    cluster_key: str | None = None,
    num_resamples: int = 200,
    seed: int = 0,
) -> float:
    """Standard error of ``aggregate(rows)``, from its spread over resampled questions.

    Args:
        rows: one entry a question, any type (object arrays of dicts are fine).
        aggregate: rows -> score.
        cluster_key: see ``retention_interval``.
        num_resamples: how often to draw.
        seed: of the draws.
    """
    units = _units(rows, cluster_key)
    values = [
        aggregate(_take(rows, draw, units, cluster_key))
        for block in _draws(len(units), num_resamples, np.random.default_rng(seed))
        for draw in block
    ]
    return float(np.std(values, ddof=1))


def retention_interval(
    per_task: Mapping[str, tuple[np.ndarray, np.ndarray]],
    aggregate: Mapping[str, Aggregate] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    cluster_keys: Mapping[str, str] | None = None,
) -> tuple[float, float, float]:
    """Retention (compressed score / vanilla score, averaged over tasks) with a percentile bootstrap interval.

    Args:
        per_task: for each task the per-question scores of the compressed and of the vanilla run, in the same order of
            questions. Numbers, or anything the task's aggregate takes.
        aggregate: for each task that is not a plain mean, rows -> score (F1, MME's score, ...).
        num_resamples: how often to draw.
        seed: of the draws; a task's draws do not depend on which other tasks there are.
        confidence: of the interval, between 0 and 1.
        cluster_keys: for each task whose questions are scored in groups (MME: two a picture), the key of its rows that
            names the group. A group is drawn whole; drawn twice it counts as two groups, under new names.

    Returns:
        (point, low, high); 1.0 is "as good as vanilla".

    Raises:
        ConfigError: no task, unequal numbers of questions, or a vanilla score of 0 (no ratio to it).
    """
    if not per_task:
        raise ConfigError("retention needs at least one task that both runs have.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence}: must be between 0 and 1.")
    points, resampled = [], []
    for task, (compressed, vanilla) in per_task.items():
        compressed, vanilla = np.asarray(compressed), np.asarray(vanilla)
        if len(compressed) != len(vanilla) or len(vanilla) == 0:
            raise ConfigError(
                f"task {task}: {len(compressed)} compressed and {len(vanilla)} vanilla scores; retention needs both"
                " runs on the same questions."
            )
        score = (aggregate or {}).get(task, _mean)
        base = score(vanilla)
        if base == 0:
            raise ConfigError(f"task {task}: the vanilla score is 0, so retention is not defined. Leave the task out.")
        points.append(score(compressed) / base)
        rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
        key = (cluster_keys or {}).get(task)
        resampled.append(_resampled_ratios(compressed, vanilla, score, key, num_resamples, rng))
    averages = np.mean(resampled, axis=0)
    # A resample in which vanilla scored 0 has no ratio; with few questions and a low score that can happen.
    averages = averages[np.isfinite(averages)]
    if len(averages) == 0:
        raise ConfigError("vanilla scored 0 in every resample: too few questions for an interval.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(averages, [tail, 1 - tail])
    return float(np.mean(points)), float(low), float(high)


def _mean(rows: np.ndarray) -> float:
    return float(rows.mean(dtype=np.float64))


def _resampled_ratios(
    compressed: np.ndarray,
    vanilla: np.ndarray,
    score: Aggregate,
    cluster_key: str | None,
    num_resamples: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """``[num_resamples]`` ratios; not finite where vanilla scored 0."""
    units = _units(vanilla, cluster_key)
    tops: list[np.ndarray] = []
    bottoms: list[np.ndarray] = []
    for block in _draws(len(units), num_resamples, rng):
        for rows, scores in ((compressed, tops), (vanilla, bottoms)):
            if score is _mean:  # the common case, a whole block at once
                scores.append(rows[block].mean(axis=1, dtype=np.float64))
            else:
                scores.append(np.array([score(_take(rows, draw, units, cluster_key)) for draw in block], dtype=float))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.concatenate(tops) / np.concatenate(bottoms)


def _draws(num_units: int, num_resamples: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Blocks ``[b, num_units]`` of unit indices drawn with replacement, ``num_resamples`` rows in all."""
    step = max(1, _MAX_INDICES // num_units)
    for start in range(0, num_resamples, step):
        yield rng.integers(0, num_units, size=(min(step, num_resamples - start), num_units))


def _units(rows: np.ndarray, cluster_key: str | None) -> list[list[int]]:
    """The rows that are drawn together: each alone, or all of one label."""
    if cluster_key is None:
        return [[row] for row in range(len(rows))]
    by_label: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        by_label.setdefault(row[cluster_key], []).append(index)
    return list(by_label.values())


def _take(rows: np.ndarray, draw: NDArray[np.int64], units: list[list[int]], cluster_key: str | None) -> np.ndarray:
    """The rows of the drawn units; groups under new names, since an aggregate tells groups apart by their name."""
    if cluster_key is None:
        return rows[draw]
    renamed: list[dict[str, object]] = []
    for order, unit in enumerate(draw):
        renamed += [{**dict(rows[index]), cluster_key: order} for index in units[unit]]
    taken = np.empty(len(renamed), dtype=object)
    taken[:] = renamed
    return taken
