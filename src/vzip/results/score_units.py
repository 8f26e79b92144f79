"""Per-question scores of a run's answers in the form the bootstrap draws from, per benchmark.

lmms-eval's aggregations take what its tasks wrote for each question; here each is a few sums over units that are drawn
whole: a question, or all questions about one image, which are not independent. That this gives lmms-eval's own number
is checked wherever it is used (``paired.compare_task``) and, against its code, in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
        correct: ``[questions]`` of bool where a question counts as right or wrong, else None.
        keys: what tells the units apart; equal for two runs on the same questions.
        clusters: one label a unit; units of one label are about one image and are not independent.
    """

    values: np.ndarray
    aggregate: Aggregate | None
    correct: np.ndarray | None
    keys: tuple[object, ...]
    clusters: tuple[object, ...] = ()

    @property
    def score(self) -> float:
        return float(self.values.mean(dtype=np.float64)) if self.aggregate is None else self.aggregate(self.values)

    @property
    def is_clustered(self) -> bool:
        """Whether some units are not independent."""
        return len(set(self.clusters)) < len(self.keys)

    def gives(self, value: float) -> bool:
        """Whether they make up a record's number; if not, their form is not understood and they are not to be used."""
        return math.isclose(self.score, value, rel_tol=1e-4, abs_tol=1e-6)

    def by_cluster(self) -> tuple[np.ndarray, Aggregate | None]:
        """Values ``[clusters]`` or ``[clusters, k]`` and their aggregate: the same score, drawn cluster by cluster."""
        if not self.is_clustered:
            return self.values, self.aggregate
        order = {label: place for place, label in enumerate(dict.fromkeys(self.clusters))}
        values, aggregate = self.values, self.aggregate
        if aggregate is None:  # clusters are of unequal sizes: their mean is a ratio of sums
            values, aggregate = np.stack([values, np.ones(len(values))], axis=1), _ratio_of_sums
        sums = np.zeros((len(order), values.shape[1]))
        np.add.at(sums, [order[label] for label in self.clusters], values)
        return sums, aggregate


def units_of(metric: str, rows: Rows) -> Units | None:
    """Units of a metric.

    Args:
        metric: lmms-eval's name, ``a+b`` for a sum.
        rows: of ``samples.jsonl``, one task's; questions that the metric leaves out are skipped.

    Returns:
        None where the scores are in a form that is not known here.
    """
    scored = [(row, part) for part in metric.split("+") for row in rows if part in row["scores"]]
    if not scored:
        return None
    units = _units(metric, tuple(row["doc_id"] for row, _ in scored), [row["scores"][part] for row, part in scored])
    if units is None:
        return None
    labels = tuple(row.get("cluster") for row, _ in scored)
    # A form that has put questions together already has taken an image's, or all rotations of a question.
    one_each = len(units.values) == len(scored) and None not in labels
    return replace(units, clusters=labels if one_each else units.keys)


def _units(metric: str, ids: tuple[object, ...], scores: Sequence[Any]) -> Units | None:
    if all(isinstance(score, int | float) for score in scores):
        if "+" in metric:
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


def _hits(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
    """MMMU: lmms-eval's verdict on each question (``evaluation.verdicts``)."""
    correct = np.array([bool(s["hit"]) for s in scores])
    return Units(correct.astype(np.float64), None, correct, ids)


def _circular(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
    """MMBench, in percent: a question with all its rotations is one unit, if its first form was asked at all."""
    hits = {s["group"]: bool(s["hit"]) for s in scores if s["index"] == s["group"]}
    correct = np.array(list(hits.values()))
    return Units(100.0 * correct, None, correct, tuple(hits))


def _answered(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
    """MVBench, in percent: empty answers are left out."""
    values = np.array([(100.0 * s["score"] * bool(s["pred_answer"]), bool(s["pred_answer"])) for s in scores])
    return Units(values, _ratio_of_sums, None, ids)


def _same(said: str, true: str, factor: float = 1.0) -> Callable[[str, tuple[object, ...], Rows], Units]:
    """Choices about videos: what was read of the answer is what is right; ``factor`` 100 for percent."""

    def make(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
        correct = np.array([str(s[said]) == str(s[true]) for s in scores])
        return Units(factor * correct, None, correct, ids)

    return make


def _objects(metric: str, ids: tuple[object, ...], scores: Rows) -> Units | None:
    """CHAIR, in percent: objects that a caption names and the image has, over those named."""
    if metric != "chair_objects_there":
        return None
    values = [(100.0 * sum(word in s["answer"] for word in s["pred"]), len(s["pred"])) for s in scores]
    return Units(np.array(values), _ratio_of_sums, None, ids)


def _category_means(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
    """MMStar: the mean of the means of its categories."""
    values = _in_columns([s["l2_category"] for s in scores], [(s["score"], 1) for s in scores])
    return Units(values, _mean_of_ratios, np.array([s["score"] == 1 for s in scores]), ids)


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
    if "mean" in metric:  # of the F1 of each split
        return Units(_in_columns([s["split"] for s in scores], pairs), _mean_of_ratios, correct, ids)
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
    """MME: 100 (accuracy + accuracy+) averaged over the images of a category, summed over categories."""
    twins = _groups([(s["category"], s["question_id"]) for s in scores], [s["score"] for s in scores])
    if any(len(hits) != 2 for hits in twins.values()):
        return None
    pairs = [(50.0 * sum(hits) + 100.0 * (sum(hits) == 2), 1) for hits in twins.values()]
    values = _in_columns([category for category, _ in twins], pairs)
    return Units(values, _sum_of_ratios, None, tuple(twins))


def _relative(metric: str, ids: tuple[object, ...], scores: Rows) -> Units:
    """LLaVA-Bench: the judge's scores of our answers over those of the reference answers, in percent."""
    values = np.array([(100.0 * s["judged"], s["reference"]) for s in scores])
    return Units(values, _ratio_of_sums, None, ids)


def _groups(labels: Sequence[Any], scores: Sequence[Any] | np.ndarray) -> dict[Any, list[Any]]:
    grouped: dict[Any, list[Any]] = {}
    for label, score in zip(labels, scores, strict=True):
        grouped.setdefault(label, []).append(score)
    return grouped


def _in_columns(labels: Sequence[str], pairs: Sequence[tuple[float, float]]) -> np.ndarray:
    """``[n, 2 * k]``: the numerators in the first k columns, the denominators in the others, one column a label."""
    names = sorted(set(labels))
    values = np.zeros((len(pairs), 2 * len(names)))
    for row, (label, pair) in enumerate(zip(labels, pairs, strict=True)):
        column = names.index(label)
        values[row, [column, len(names) + column]] = pair
    return values


def _ratio_of_sums(values: np.ndarray) -> float:
    top, bottom = values.sum(axis=0)
    return float(top / bottom) if bottom else 0.0


def _ratios(values: np.ndarray) -> np.ndarray:
    """Of each label its numerator over its denominator; labels of which nothing was drawn are left out."""
    top, bottom = np.split(values.sum(axis=0), 2)
    return np.asarray(top[bottom > 0] / bottom[bottom > 0])


def _sum_of_ratios(values: np.ndarray) -> float:
    return float(_ratios(values).sum())


def _mean_of_ratios(values: np.ndarray) -> float:
    ratios = _ratios(values)
    return float(ratios.mean()) if len(ratios) else 0.0


_FORMS: tuple[tuple[frozenset[str], Callable[[str, tuple[object, ...], Rows], Units | None]], ...] = (
    (frozenset({"hit", "group", "index"}), _circular),
    (frozenset({"hit"}), _hits),
    (frozenset({"score", "l2_category"}), _category_means),
    (frozenset({"score", "prediction", "ground_truth"}), _yes_no),
    (frozenset({"pred_answer", "answer", "duration"}), _same("pred_answer", "answer", 100.0)),
    (frozenset({"score", "category", "question_id"}), _mme),
    (frozenset({"said", "answer", "pair"}), _scenes),
    (frozenset({"pred_answer", "gt_answer", "score"}), _answered),
    (frozenset({"parsed_pred", "answer", "duration_group"}), _same("parsed_pred", "answer")),
    (frozenset({"pred", "ground_truth"}), _same("pred", "ground_truth")),
    (frozenset({"pred", "answer", "image_id"}), _objects),
    (frozenset({"pred", "answer"}), _letters),
    (frozenset({"judged", "reference"}), _relative),
)
