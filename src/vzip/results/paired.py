"""A compressed run beside its vanilla run, question by question: is the difference more than noise?

Questions are matched by their id, never by their place in the file. Retention gets a paired bootstrap interval, right
and wrong answers McNemar's exact test, and the answers themselves the share in which the two runs agree.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.errors import ManifestError

from .record import JUDGE_ACCURACY, JUDGE_SCORE, Score, same_judge, score_of
from .score_units import Units, units_of
from .stats import mcnemar_p, percentile_interval, resampled_retention

SIGNIFICANCE = 0.05
Rows = Sequence[Mapping[str, Any]]


# What a mark "~" at an interval says.
UNPAIRED = "~: not from the same questions but from two standard errors, which is too wide"


@dataclass(frozen=True)
class Paired:
    """One task and metric of two runs.

    Attributes:
        retention: compressed / vanilla score.
        low, high: 95 % interval of it; None where there is nothing to take one from.
        resampled: ``[num_resamples]`` bootstrap values, to be averaged over tasks; None where ``low`` is.
        is_paired: the interval is from the same questions of both runs; else from two standard errors, which is wider.
        p_value: McNemar's; None where answers are not right or wrong.
        num_lost, num_gained: questions only vanilla, or only the compressed run, answered rightly; None likewise.
        agreement: share of questions with the same answer; None without the answers.
    """

    retention: float
    low: float | None
    high: float | None
    resampled: NDArray[np.float64] | None
    is_paired: bool
    p_value: float | None = None
    num_lost: int | None = None
    num_gained: int | None = None
    agreement: float | None = None

    @property
    def outside_noise(self) -> bool:
        """Whether the runs differ by more than chance: the interval leaves 1 out, and McNemar's test agrees."""
        if self.low is None or self.high is None:
            return False
        return not self.low <= 1 <= self.high and (self.p_value is None or self.p_value < SIGNIFICANCE)


def compare_task(
    record: Mapping[str, Any],
    vanilla: Mapping[str, Any],
    task: str,
    metric: str,
    rows: Rows | None = None,
    vanilla_rows: Rows | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Paired | None:
    """Compares one metric of two records.

    Args:
        record, vanilla: the two runs.
        task, metric: lmms-eval's names.
        rows, vanilla_rows: the task's rows of both runs' ``samples.jsonl``; None where they were not kept.
        num_resamples, seed: of the bootstrap.

    Returns:
        None if either run lacks the metric, or vanilla scored 0.

    Raises:
        ManifestError: the two runs answered different questions, or were judged by different judges.
    """
    ours, base = score_of(record, task, metric), score_of(vanilla, task, metric)
    if ours is None or base is None or base.value == 0:
        return None
    if metric in (JUDGE_ACCURACY, JUDGE_SCORE) and not same_judge(record, vanilla, task):
        raise ManifestError(
            f"{task}: the two runs were judged by different judges, so their scores are not comparable. Judge both with"
            " the same model: python -m vzip judge RUN --model NAME --overwrite."
        )
    if rows is None or vanilla_rows is None:
        return _from_errors(ours, base, task, num_resamples, seed)
    rows, vanilla_rows = match(rows, vanilla_rows, task)
    agreement = sum(same_answers(rows, vanilla_rows)) / len(rows)
    units, base_units = units_of(metric, rows), units_of(metric, vanilla_rows)
    if units is None or base_units is None or not (units.gives(ours.value) and base_units.gives(base.value)):
        return _from_errors(ours, base, task, num_resamples, seed, agreement)
    if (units.keys, units.clusters) != (base_units.keys, base_units.clusters):
        if metric in (JUDGE_ACCURACY, JUDGE_SCORE):  # in one of the runs an answer got no usable verdict
            return _from_errors(ours, base, task, num_resamples, seed, agreement)
        raise ManifestError(f"{task} {metric}: the two runs scored different questions; evaluate both again.")
    return compare_units(units, base_units, task, agreement, num_resamples, seed)


def compare_units(
    units: Units,
    base: Units,
    task: str,
    agreement: float | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Paired:
    """The same of the units of both runs, of a whole task or of some of its questions; ``base``'s score is not 0.

    Raises:
        ValueError: units of different questions.
    """
    if (units.keys, units.clusters) != (base.keys, base.clusters):
        raise ValueError(f"{task}: units of different questions")
    (values, aggregate), (base_values, _) = units.by_cluster(), base.by_cluster()
    retention, resampled = resampled_retention(task, values, base_values, aggregate, num_resamples, seed)
    low, high = percentile_interval(resampled)
    lost = gained = p_value = None
    if units.correct is not None and base.correct is not None:
        lost, gained, p_value = lost_and_gained(units.correct, base.correct)
    return Paired(retention, low, high, resampled, True, p_value, lost, gained, agreement)


def lost_and_gained(right: NDArray[np.bool_], base: NDArray[np.bool_]) -> tuple[int, int, float]:
    """How many questions only ``base``, and only the other run, answered rightly, and McNemar's p; both ``[n]``."""
    lost, gained = int(np.sum(base & ~right)), int(np.sum(right & ~base))
    return lost, gained, mcnemar_p(lost, gained)


def match(rows: Rows, others: Rows, task: str) -> tuple[Rows, Rows]:
    """The rows of two runs in one order, that of their ids, matched by question id.

    So the bootstrap draws the same questions for every pair of runs, in whatever order their files are.

    Raises:
        ManifestError: an id stands twice in one run or in one run only, or its question or target differs.
    """
    by_id, others_by_id = _by_id(rows, task), _by_id(others, task)
    apart = by_id.keys() ^ others_by_id.keys()
    if apart or not by_id:
        raise ManifestError(
            f"{task}: {len(apart)} questions stand in one run only ({len(by_id)} and {len(others_by_id)} in all); a"
            " paired comparison needs both runs on the same questions. Evaluate both with the same eval.limit."
        )
    for key, row in by_id.items():
        for field in ("question", "target"):
            if row.get(field) != others_by_id[key].get(field):
                raise ManifestError(
                    f"{task}, question {key[0]}: its {field} is {row.get(field)!r} in one run and"
                    f" {others_by_id[key].get(field)!r} in the other. Evaluate both on the same data."
                )
    keys = sorted(by_id, key=lambda key: (isinstance(key[0], str), *key))  # ids are numbers or words
    return [by_id[key] for key in keys], [others_by_id[key] for key in keys]


def _by_id(rows: Rows, task: str) -> dict[tuple[Any, Any], Mapping[str, Any]]:
    found = {(row["doc_id"], row.get("filter_index", 0)): row for row in rows}
    if len(found) != len(rows):
        raise ManifestError(f"{task}: a question id stands more than once in the answers of one run.")
    return found


def same_answers(rows: Rows, others: Rows) -> list[bool]:
    """For each pair of matched rows whether the answers are the same, but for case and blanks around them."""
    return [_plain(a["answer"]) == _plain(b["answer"]) for a, b in zip(rows, others, strict=True)]


def _plain(answer: Any) -> Any:
    return answer.strip().lower() if isinstance(answer, str) else answer


def _from_errors(
    ours: Score, base: Score, task: str, num_resamples: int, seed: int, agreement: float | None = None
) -> Paired:
    """From two standard errors as if the runs were independent: too wide, since both answered the same questions."""
    retention = ours.value / base.value
    if ours.standard_error is None or base.standard_error is None:
        return Paired(retention, None, None, None, False, agreement=agreement)
    draws = np.random.default_rng([seed, zlib.crc32(task.encode())]).standard_normal((2, num_resamples))
    # No score is below 0: with few questions the normal's tail is, and a share kept below 0 % is none.
    tops, bottoms = (
        np.maximum(0.0, score.value + score.standard_error * drawn)
        for score, drawn in zip((ours, base), draws, strict=True)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = tops / bottoms
    low, high = percentile_interval(resampled)
    return Paired(retention, low, high, resampled, False, agreement=agreement)
