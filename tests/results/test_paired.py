"""Paired statistics against exact arithmetic, scipy and a plain-loop bootstrap."""

from __future__ import annotations

import random
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from tests.records import compared, samples, scored

from vzip.errors import ConfigError, ManifestError
from vzip.results.paired import compare_task, match
from vzip.results.record import same_judge
from vzip.results.stats import mcnemar_p, percentile_interval

DRAW = random.Random(11)
VANILLA = [float(DRAW.random() < 0.8) for _ in range(150)]
COMPRESSED = [v if DRAW.random() < 0.85 else float(DRAW.random() < 0.4) for v in VANILLA]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 5), (1, 9), (12, 3), (0, 6), (40, 61)])
def test_mcnemar_is_the_exact_binomial(lost: int, gained: int) -> None:
    total = lost + gained
    tail = sum(Fraction(comb(total, k), 2**total) for k in range(min(lost, gained) + 1))
    assert mcnemar_p(lost, gained) == pytest.approx(float(min(Fraction(1), 2 * tail)))
    assert mcnemar_p(lost, gained) == mcnemar_p(gained, lost)
    scipy = pytest.importorskip("scipy.stats")
    if total:
        assert mcnemar_p(lost, gained) == pytest.approx(scipy.binomtest(lost, total).pvalue)


def test_mcnemar_of_many_disagreements() -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert mcnemar_p(10_300, 10_000) == pytest.approx(scipy.binomtest(10_300, 20_300).pvalue, rel=1e-6)
    with pytest.raises(ConfigError, match="0 or more"):
        mcnemar_p(-1, 2)


def test_interval_and_counts_against_a_plain_loop() -> None:
    found = compared(COMPRESSED, VANILLA, samples(COMPRESSED), samples(VANILLA), num_resamples=4000)
    pairs = list(zip(COMPRESSED, VANILLA, strict=True))
    assert (found.num_lost, found.num_gained) == (pairs.count((0, 1)), pairs.count((1, 0)))
    assert found.p_value == mcnemar_p(pairs.count((0, 1)), pairs.count((1, 0)))
    assert found.agreement == pytest.approx(sum(c == v for c, v in pairs) / 150)
    assert found.retention == pytest.approx(sum(COMPRESSED) / sum(VANILLA)) and found.is_paired
    values = []
    for _ in range(4000):
        drawn = [pairs[DRAW.randrange(150)] for _ in range(150)]
        values.append(sum(c for c, _ in drawn) / sum(v for _, v in drawn))
    values.sort()
    assert found.low is not None and found.high is not None
    width = found.high - found.low
    assert found.low == pytest.approx(values[100], abs=0.08 * width)
    assert found.high == pytest.approx(values[3900], abs=0.08 * width)


def test_interval_is_scipys_paired_bootstrap() -> None:
    scipy = pytest.importorskip("scipy.stats")
    found = compared(COMPRESSED, VANILLA, samples(COMPRESSED), samples(VANILLA), num_resamples=6000)

    def retention(ours: np.ndarray, base: np.ndarray, axis: int) -> np.ndarray:
        return ours.mean(axis=axis) / base.mean(axis=axis)

    theirs = scipy.bootstrap(
        (COMPRESSED, VANILLA), retention, n_resamples=6000, paired=True, vectorized=True, method="percentile", rng=5
    )
    low, high = theirs.confidence_interval
    assert found.low == pytest.approx(low, abs=0.06 * (high - low))
    assert found.high == pytest.approx(high, abs=0.06 * (high - low))
    assert found.resampled is not None
    assert np.std(found.resampled, ddof=1) == pytest.approx(theirs.standard_error, rel=0.05)


def test_questions_are_matched_by_id_and_not_by_place() -> None:
    shuffled = samples(VANILLA)
    DRAW.shuffle(shuffled)
    straight = compared(COMPRESSED, VANILLA, samples(COMPRESSED), samples(VANILLA))
    assert compared(COMPRESSED, VANILLA, samples(COMPRESSED), shuffled).low == straight.low
    same = compared(VANILLA, VANILLA, samples(VANILLA), shuffled)
    assert (same.low, same.high, same.p_value, same.agreement) == (1, 1, 1, 1)
    assert not same.outside_noise


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "1 questions stand in one run only"),
        (lambda rows: [*rows[:-1], rows[-1] | {"doc_id": 999}], "2 questions stand in one run only"),
        (lambda rows: [*rows, rows[0]], "more than once"),
        (lambda rows: [rows[0] | {"question": "other"}, *rows[1:]], "question 0: its question is"),
        (lambda rows: [rows[0] | {"target": "no"}, *rows[1:]], "question 0: its target is"),
    ],
)
def test_different_questions_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        match(samples(VANILLA), change(samples(VANILLA)), "gqa")


def test_noise() -> None:
    # 40 of 100 lost and none gained is no chance; 3 lost and 2 gained is.
    worse, base = [0.0] * 40 + [1.0] * 60, [1.0] * 100
    assert compared(worse, base, samples(worse), samples(base)).outside_noise
    a, b = [0.0] * 3 + [1.0] * 97, [1.0] * 3 + [0.0] * 2 + [1.0] * 95
    assert not compared(a, b, samples(a), samples(b)).outside_noise
    # McNemar's test has a say: 4 lost and none gained leave 1 out of the interval's body, but p is 0.125.
    few, full = [0.0] * 4 + [1.0] * 96, [1.0] * 100
    found = compared(few, full, samples(few), samples(full))
    assert found.p_value == pytest.approx(0.125) and found.high is not None and found.high < 1
    assert not found.outside_noise


def test_without_answers_the_two_errors_give_a_wider_interval() -> None:
    paired = compared(COMPRESSED, VANILLA, samples(COMPRESSED), samples(VANILLA))
    loose = compared(COMPRESSED, VANILLA)
    assert not loose.is_paired and loose.p_value is None and loose.agreement is None
    assert loose.low is not None and paired.low is not None and loose.low < paired.low
    # Delta method: relative errors add in squares; the ratio is a little skewed, which it leaves out.
    mean_c, mean_v = np.mean(COMPRESSED), np.mean(VANILLA)
    error = mean_c / mean_v * np.hypot(0.03 / mean_c, 0.03 / mean_v)
    assert loose.low == pytest.approx(mean_c / mean_v - 1.96 * error, abs=0.3 * error)
    none = compare_task(scored(COMPRESSED, None), scored(VANILLA), "gqa", "exact_match")
    assert none is not None and none.low is None and not none.outside_noise


def test_no_share_kept_is_below_zero() -> None:
    few = compare_task(scored([1.0, *[0.0] * 9], 0.1), scored([1.0, 1.0, *[0.0] * 8], 0.13), "gqa", "exact_match")
    assert few is not None and few.low == 0 and few.high is not None and few.high > few.retention


def test_answers_that_do_not_give_the_records_number_are_not_used() -> None:
    changed = samples([1.0] * 150)
    found = compared(COMPRESSED, VANILLA, changed, samples(VANILLA))
    assert not found.is_paired and found.agreement is not None


def test_nothing_to_compare() -> None:
    assert compare_task(scored(VANILLA), scored([0.0, 0.0]), "gqa", "exact_match") is None
    assert compare_task(scored(VANILLA), scored(VANILLA), "pope", "exact_match") is None
    with pytest.raises(ConfigError, match="confidence=1"):
        percentile_interval(np.ones(3), 1)


def judged(scores: list[float | None], **judge: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A record and answers of which those with None got no usable verdict."""
    rows = samples([0.0] * len(scores))
    for row, score in zip(rows, scores, strict=True):
        row["scores"] = {} if score is None else {"judge_accuracy": score}
    value = float(np.mean([score for score in scores if score is not None]))
    by = {"model": "m", "base_url": "u", "temperature": 0.0, "max_tokens": 64, "prompt_sha256": "p"}
    metrics = {"judge_accuracy": {"value": value, "standard_error": 0.1}}
    tasks = {"msvd": {"metrics": metrics, "num_samples": len(scores)}}
    return {"tasks": tasks, "judge": {"msvd": {**by, "served_models": {"m-1": 9}, **judge}}}, rows


def test_judged_runs() -> None:
    (ours, rows), (base, base_rows) = judged([1.0, 0.0, 1.0, 1.0] * 5), judged([1.0, 1.0, 1.0, 0.0] * 5)
    paired = compare_task(ours, base, "msvd", "judge_accuracy", rows, base_rows)
    assert paired is not None and paired.is_paired and (paired.num_lost, paired.num_gained) == (5, 5)
    # One answer without a verdict: its question is no pair, and the interval is taken from the two errors.
    partly, partly_rows = judged([None, 0.0, 1.0, 1.0, *[1.0, 0.0, 1.0, 1.0] * 4])
    unpaired = compare_task(partly, base, "msvd", "judge_accuracy", partly_rows, base_rows)
    assert unpaired is not None and not unpaired.is_paired and unpaired.low is not None
    assert unpaired.retention == pytest.approx((14 / 19) / (15 / 20))


@pytest.mark.parametrize("other", [{"model": "n"}, {"temperature": 1.0}, {"served_models": {"m-2": 9}}])
def test_different_judges_are_not_compared(other: dict[str, Any]) -> None:
    (ours, rows), (base, base_rows) = judged([1.0, 0.0, 1.0]), judged([1.0, 1.0, 1.0], **other)
    with pytest.raises(ManifestError, match=r"msvd: .* different judges, .*python -m vzip judge RUN --model"):
        compare_task(ours, base, "msvd", "judge_accuracy", rows, base_rows)
    assert same_judge(ours, ours, "msvd") and same_judge(ours, {}, "msvd") and not same_judge(ours, base, "msvd")
