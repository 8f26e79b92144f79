"""Standard errors of a record's metrics, against formulas written out."""

from __future__ import annotations

import pytest

from vzip.evaluation.benchmarks.standard_errors import complete


def completed(primary: str, scores: list[dict], clusters: list | None = None, **given: tuple) -> dict:
    """The metrics after ``complete``; ``given``: value and lmms-eval's standard error by metric."""
    metrics = {
        name: {"value": value, "standard_error": error, "standard_error_source": None if error is None else "lmms-eval"}
        for name, (value, error) in given.items()
    }
    rows = [{"doc_id": i, "scores": entry} for i, entry in enumerate(scores)]
    for row, label in zip(rows, clusters or [], strict=False):
        row["cluster"] = label
    complete(metrics, primary, rows)
    return {name: (entry["standard_error"], entry["standard_error_source"]) for name, entry in metrics.items()}


def letters(*right: int) -> list[dict]:
    return [{"seed_all": {"pred": "a" if hit else "b", "answer": "A"}} for hit in right]


def test_right_or_wrong():
    assert completed("seed_all", letters(1, 1, 1, 0), seed_all=(0.75, None)) == {
        "seed_all": (pytest.approx((0.75 * 0.25 / 4) ** 0.5), "binomial")
    }


def test_questions_about_one_image_count_less():
    # Residuals by image: a 3 * 1/4, b -3/4.
    found = completed("seed_all", letters(1, 1, 1, 0), clusters=list("aaab"), seed_all=(0.75, None))
    assert found["seed_all"] == (pytest.approx((2 * (0.75**2 + 0.75**2)) ** 0.5 / 4), "clustered")


def test_replaces_lmms_evals_where_it_takes_questions_for_independent():
    scores = [{"exact_match": value} for value in (1.0, 1.0, 0.0, 0.6)]
    alone = completed("exact_match", scores, exact_match=(0.65, 0.2))
    assert alone["exact_match"] == (0.2, "lmms-eval")
    clustered = completed("exact_match", scores, clusters=["a", "a", "b", "b"], exact_match=(0.65, 0.2))
    assert clustered["exact_match"] == (pytest.approx((2 * (0.7**2 + 0.7**2)) ** 0.5 / 4), "clustered")


def test_one_image_has_no_spread():
    found = completed("seed_all", letters(1, 0), clusters=["a", "a"], seed_all=(0.5, None))
    assert found["seed_all"] == (None, None)


def test_every_metric_gets_one():
    scores = [entry | {"seed_image": entry["seed_all"]} for entry in letters(1, 1, 1, 0)]
    found = completed("seed_all", scores, seed_all=(0.75, None), seed_image=(0.75, None))
    assert found["seed_image"] == found["seed_all"]


def test_a_score_that_is_not_understood_gets_none():
    assert completed("seed_all", letters(1, 0), seed_all=(0.9, None)) == {"seed_all": (None, None)}


def test_a_sum_has_the_errors_of_its_parts():
    scores = [{"a": 1.0}, {"a": 0.0}, {"b": 0.5}, {"b": 0.7}]
    found = completed("a+b", scores, a=(0.5, 0.3), b=(0.6, 0.4))
    assert found["a+b"] == (pytest.approx(0.5), "lmms-eval")
