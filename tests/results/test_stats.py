"""Uncertainty against formulas and a plain-loop bootstrap."""

from __future__ import annotations

import math
import random
import zlib

import numpy as np
import pytest

from vzip.errors import ConfigError
from vzip.results.stats import (
    bootstrap_standard_error,
    clustered_standard_error,
    mean_interval,
    retention_interval,
    score_interval,
    standard_error,
)

RNG = np.random.default_rng(7)
VANILLA = (RNG.random(400) < 0.85).astype(float)
COMPRESSED = np.where(RNG.random(400) < 0.9, VANILLA, RNG.random(400) < 0.5).astype(float)


def rows_of(pairs):
    rows = np.empty(len(pairs), dtype=object)
    rows[:] = pairs
    return rows


def f1(rows):
    hits = sum(r["said"] == r["answer"] == "yes" for r in rows)
    total = sum(r["said"] == "yes" for r in rows) + sum(r["answer"] == "yes" for r in rows)
    return 2 * hits / total if total else 0.0


def test_standard_error_of_a_mean():
    assert standard_error(np.array([0, 1, 1, 1])) == pytest.approx(0.25)
    assert math.isnan(standard_error(np.array([1.0])))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.96, 1.0])
def test_the_interval_of_a_share_is_what_a_test_would_not_refuse(share):
    """Wilson's by its definition, found by trying shares: those from which ours is 1.96 standard errors or less."""
    count = 50
    error = math.sqrt(share * (1 - share) / count)
    tried = np.linspace(0, 1, 200_001)
    inside = tried[np.abs(share - tried) <= 1.959964 * np.sqrt(tried * (1 - tried) / count)]
    assert score_interval(share, error, count, "fraction") == pytest.approx((inside[0], inside[-1]), abs=1e-5)
    in_percent = score_interval(100 * share, 100 * error, count, "percent")
    assert in_percent == pytest.approx((100 * inside[0], 100 * inside[-1]), abs=1e-3)


def test_other_scores_have_two_standard_errors_and_nothing_below_zero():
    assert score_interval(1500.0, 10.0, 50, "points") == pytest.approx((1480.4, 1519.6), abs=0.01)
    assert score_interval(3.0, 10.0, 50, None) == pytest.approx((0.0, 22.6), abs=0.01)
    assert score_interval(0.7, None, 50, "fraction") is None and score_interval(0.7, math.nan, 1, "fraction") is None


def test_bootstrap_error_of_a_mean_is_the_formula():
    formula = VANILLA.std() / math.sqrt(len(VANILLA))
    assert bootstrap_standard_error(VANILLA, np.mean, num_resamples=4000) == pytest.approx(formula, rel=0.05)


def test_interval_against_the_delta_method():
    point, low, high = retention_interval({"t": (COMPRESSED, VANILLA)}, num_resamples=20_000)
    ratio = COMPRESSED.mean() / VANILLA.mean()
    # Variance of a ratio of paired means: var(c - ratio * v) / (n * mean(v)^2).
    error = (COMPRESSED - ratio * VANILLA).std() / (VANILLA.mean() * math.sqrt(len(VANILLA)))
    assert point == pytest.approx(ratio)
    assert low == pytest.approx(ratio - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(ratio + 1.96 * error, abs=0.1 * error)


def test_interval_against_a_plain_loop():
    other = (COMPRESSED[::-1] * 2, VANILLA[::-1] + 1)
    _, low, high = retention_interval({"a": (COMPRESSED, VANILLA), "b": other}, num_resamples=4000)
    draw = random.Random(1)
    values = []
    for _ in range(4000):
        parts = []
        for compressed, vanilla in ((COMPRESSED, VANILLA), other):
            picks = [draw.randrange(len(vanilla)) for _ in vanilla]
            parts.append(sum(compressed[i] for i in picks) / sum(vanilla[i] for i in picks))
        values.append(sum(parts) / 2)
    values.sort()
    width = high - low
    assert low == pytest.approx(values[100], abs=0.06 * width)
    assert high == pytest.approx(values[3900], abs=0.06 * width)


def test_pairing_narrows_the_interval():
    _, low, high = retention_interval({"t": (COMPRESSED, VANILLA)})
    _, low_unpaired, high_unpaired = retention_interval({"t": (np.roll(COMPRESSED, 1), VANILLA)})
    assert high - low < 0.8 * (high_unpaired - low_unpaired)


def test_equal_answers_retain_exactly_everything():
    assert retention_interval({"t": (VANILLA, VANILLA)}) == (1.0, 1.0, 1.0)


def test_seeded_and_tasks_are_independent_of_each_other():
    one = retention_interval({"t": (COMPRESSED, VANILLA)}, seed=3)
    assert one == retention_interval({"t": (COMPRESSED, VANILLA)}, seed=3)
    assert one != retention_interval({"t": (COMPRESSED, VANILLA)}, seed=4)
    certain = (np.ones(5), np.ones(5))
    _, low, high = retention_interval({"t": (COMPRESSED, VANILLA), "sure": certain}, seed=3)
    assert (low, high) == pytest.approx(((one[1] + 1) / 2, (one[2] + 1) / 2))


def test_an_aggregate_gets_whole_rows():
    truth = ["yes", "no"] * 30
    said_c = ["yes" if i % 3 else "no" for i in range(60)]
    compressed = rows_of([{"said": s, "answer": a} for s, a in zip(said_c, truth, strict=True)])
    vanilla = rows_of([{"said": a, "answer": a} for a in truth])
    point, low, high = retention_interval({"t": (compressed, vanilla)}, {"t": f1}, num_resamples=500, seed=2)
    assert point == pytest.approx(f1(compressed))  # vanilla is all right, so F1 = 1
    rng = np.random.default_rng([2, zlib.crc32(b"t")])
    values = [f1(compressed[draw]) / f1(vanilla[draw]) for draw in rng.integers(0, 60, size=(500, 60))]
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_many_questions_are_drawn_in_blocks(monkeypatch):
    whole = retention_interval({"t": (COMPRESSED, VANILLA)}, num_resamples=300)
    monkeypatch.setattr("vzip.results.stats._MAX_INDICES", 1000)
    assert retention_interval({"t": (COMPRESSED, VANILLA)}, num_resamples=300) == whole


@pytest.mark.parametrize(
    ("per_task", "kwargs", "message"),
    [
        ({}, {}, "at least one task"),
        ({"t": (np.ones(3), np.ones(4))}, {}, "3 compressed and 4 vanilla"),
        ({"t": (np.ones(0), np.ones(0))}, {}, "0 compressed"),
        ({"t": (np.ones(3), np.zeros(3))}, {}, "vanilla score is 0"),
        ({"t": (np.ones(3), np.ones(3))}, {"confidence": 95}, "between 0 and 1"),
    ],
)
def test_what_has_no_retention(per_task, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        retention_interval(per_task, **kwargs)


def test_errors_of_clustered_scores():
    scores = np.random.default_rng(3).random(12)
    alone = clustered_standard_error(scores, range(12))
    assert alone == pytest.approx(standard_error(scores))
    # Every score four times over tells no more than the score once.
    assert clustered_standard_error(np.repeat(scores, 4), np.repeat(range(12), 4).tolist()) == pytest.approx(alone)
    assert np.isnan(clustered_standard_error(scores, ["one"] * 12))
    # Against the spread of the mean over resampled clusters of unequal sizes.
    labels = [0] * 5 + [1] * 3 + [2] * 2 + [3, 4]
    clusters = [scores[np.array(labels) == label] for label in range(5)] * 40
    draws = np.random.default_rng(1).integers(0, len(clusters), size=(400, len(clusters)))
    resampled = np.std([np.concatenate([clusters[i] for i in draw]).mean() for draw in draws], ddof=1)
    values, names = np.concatenate(clusters), np.repeat(range(200), [len(cluster) for cluster in clusters]).tolist()
    assert clustered_standard_error(values, names) == pytest.approx(resampled, rel=0.12)


def test_an_interval_of_a_mean() -> None:
    values = np.array([0.0, 1.0] * 50)
    low, high = mean_interval(values)
    assert 0.39 < low < 0.42 and 0.58 < high < 0.61, "0.5 +- 1.96 x 0.05"
    values = np.arange(10.0) ** 3.3
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)
    with pytest.raises(ConfigError, match="two or more"):
        mean_interval(values[:1])
