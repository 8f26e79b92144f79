"""Per-question scores of a run's answers in the form the bootstrap draws from, per benchmark.

lmms-eval's aggregations take what its tasks wrote for each question; here each is a few sums over units that are drawn
whole (a question, or for MME a picture with its two questions). That this gives lmms-eval's own number is checked
wherever it is used (``paired.compare_task``) and, against its code, in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .stats import Aggregate

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Units:
    """What is drawn.

    Attributes:
        values: ``[n]`` or ``[n, k]``, one entry a unit.
        aggregate: values -> score in lmms-eval's unit; None for the mean.
        correct: ``[questions]`` of bool where a question counts as right or wrong and questions are independent, else
            None.
        keys: what tells the units apart; equal for two runs on the same questions.
    """

    values: np.ndarray
    aggregate: Aggregate | None
    correct: np.ndarray | None
    keys: tuple[object, ...]

    @property
    def score(self) -> float:
        return float(self.values.mean(dtype=np.float64)) if self.aggregate is None else self.aggregate(self.values)


def units_of(metric: str, rows: Rows) -> Units | None:
    """Units of a metric.

    Args:
        metric: lmms-eval's name, ``a+b`` for a sum.
        rows: of ``samples.jsonl``, one task's; questions that the metric leaves out are skipped.

    Returns:
        None where the scores are in a form that is not known here.
    """
    parts = metric.split("+")
    scored = [(row["doc_id"], row["scores"][part]) for part in parts for row in rows if part in row["scores"]]
    if not scored:
        return None
    ids, scores = zip(*scored, strict=True)
    if all(isinstance(score, int | float) for score in scores):
        if len(parts) > 1:
            return None  # a sum of means is no mean over questions
        values = np.array(scores, dtype=np.float64)
        return Units(values, None, values == 1 if np.isin(values, (0, 1)).all() else None, ids)
    for fields, make in _FORMS:
        if all(isinstance(score, Mapping) and fields <= score.keys() for score in scores):
            return make(metric, ids, scores)
    return None


def _letters(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
    """SEED: the letter said and the right one."""
    correct = np.array([s["pred"].lower().strip() == s["answer"].lower().strip() for s in scores])
    return Units(correct.astype(np.float64), None, correct, ids)


def _yes_no(metric: str, ids: tuple[object, ...], scores: Rows) -> Units | None:
    """POPE. An answer other than yes or no is neither a hit nor a miss for lmms-eval's F1."""
    correct = np.array([bool(s["score"]) for s in scores])
    if "accuracy" in metric:
        return Units(correct.astype(np.float64), None, correct, ids)
    if "f1" not in metric:
        return None
    said, true = ([s[name] for s in scores] for name in ("prediction", "ground_truth"))
    pairs = [
        (2.0 * (s == t == "yes"), (s == "yes") + (t == "yes" and s in ("yes", "no")))
        for s, t in zip(said, true, strict=True)
    ]
    return Units(np.array(pairs, dtype=np.float64), _ratio_of_sums, correct, ids)


def _scenes(metric: str, ids: tuple[object, ...], scores: Rows) -> Units | None:
    """The built-in benchmark, in percent."""
    correct = np.array([s["said"] == s["answer"] for s in scores])
    if metric == "accuracy":
        return Units(100.0 * correct, None, correct, ids)
    if metric == "f1":
        pairs = [
            (200.0 * (s["said"] == s["answer"] == "yes"), (s["said"] == "yes") + (s["answer"] == "yes")) for s in scores
        ]
        return Units(np.array(pairs, dtype=np.float64), _ratio_of_sums, correct, ids)
    if metric != "mme":
        return None
    twins = _groups([s["pair"] for s in scores], correct)
    values = np.array([50.0 * (np.mean(hits) + all(hits)) for hits in twins.values()])
    # Accuracy is over questions and accuracy+ over pairs: one mean does for both only where all pairs are whole.
    return Units(values, None, None, tuple(twins)) if len({len(hits) for hits in twins.values()}) == 1 else None


def _mme(metric: str, ids: tuple[object, ...], scores: Rows) -> Units | None:
    """MME: 100 (accuracy + accuracy+) averaged over the pictures of a category, summed over categories."""
    names = sorted({s["category"] for s in scores})
    twins = _groups([(s["category"], s["question_id"]) for s in scores], [s["score"] for s in scores])
    if any(len(hits) != 2 for hits in twins.values()):
        return None
    values = np.zeros((len(twins), 2 * len(names)))
    for unit, ((category, _), hits) in enumerate(twins.items()):
        column = names.index(category)
        values[unit, column] = 50.0 * sum(hits) + 100.0 * (sum(hits) == 2)
        values[unit, len(names) + column] = 1
    return Units(values, _sum_of_category_means, None, tuple(twins))


def _groups(labels: Sequence[Any], scores: Sequence[Any] | np.ndarray) -> dict[Any, list[Any]]:
    grouped: dict[Any, list[Any]] = {}
    for label, score in zip(labels, scores, strict=True):
        grouped.setdefault(label, []).append(score)
    return grouped


def _ratio_of_sums(values: np.ndarray) -> float:
    top, bottom = values.sum(axis=0)
    return float(top / bottom) if bottom else 0.0


def _sum_of_category_means(values: np.ndarray) -> float:
    sums, counts = np.split(values.sum(axis=0), 2)
    return float(np.sum(sums[counts > 0] / counts[counts > 0]))


_FORMS: tuple[tuple[frozenset[str], Callable[[str, tuple[object, ...], Rows], Units | None]], ...] = (
    (frozenset({"score", "prediction", "ground_truth"}), _yes_no),
    (frozenset({"score", "category", "question_id"}), _mme),
    (frozenset({"said", "answer", "pair"}), _scenes),
    (frozenset({"pred", "answer"}), _letters),
)
