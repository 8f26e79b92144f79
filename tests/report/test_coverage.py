"""What intervals and test promise, by simulation: how often the truth is inside, how often chance is believed."""

from __future__ import annotations

import numpy as np

from vzip.results.score_units import units_of
from vzip.results.stats import mcnemar_p, percentile_interval, resampled_retention

SEED = 23
REPEATS, RESAMPLES = 300, 200


def covered(low_high: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in low_high]))


def test_a_95_percent_interval_holds_the_true_retention_95_times_in_100() -> None:
    rng = np.random.default_rng(SEED)
    # Vanilla is right with 0.8; a compressed run loses 15 % of those and gains 20 % of the others: 0.72.
    intervals = []
    for repeat in range(REPEATS):
        vanilla = (rng.random(200) < 0.8).astype(float)
        compressed = np.where(rng.random(200) < 0.85, vanilla, 0) + (1 - vanilla) * (rng.random(200) < 0.2)
        intervals.append(percentile_interval(resampled_retention("t", compressed, vanilla, None, RESAMPLES, repeat)[1]))
    assert 0.91 < covered(intervals, 0.72 / 0.8) < 0.98  # 95 +- 2.5 standard errors of 300 repeats


def test_questions_about_one_image_need_its_interval_and_get_it() -> None:
    """40 images of 6 questions each, which an image makes easy or hard together."""
    rng = np.random.default_rng(SEED)
    clustered, single = [], []
    labels = np.repeat(np.arange(40), 6)
    for repeat in range(100):
        # Compressed is as good as vanilla on average: an image is one that it gets right, or one that it does not.
        vanilla = np.repeat(rng.random(40) < 0.7, 6) ^ (rng.random(240) < 0.1)
        compressed = np.repeat(rng.random(40) < 0.7, 6) ^ (rng.random(240) < 0.1)
        both = []
        for scores in (compressed, vanilla):
            rows = [
                {"doc_id": i, "cluster": int(label), "scores": {"m": float(score)}}
                for i, (label, score) in enumerate(zip(labels, scores, strict=True))
            ]
            units = units_of("m", rows)
            assert units is not None
            both.append((units, *units.by_cluster()))
        (ours, values, aggregate), (base, base_values, _) = both
        of_pictures = resampled_retention("t", values, base_values, aggregate, RESAMPLES, repeat)[1]
        of_questions = resampled_retention("t", ours.values, base.values, None, RESAMPLES, repeat)[1]
        clustered.append(percentile_interval(of_pictures))
        single.append(percentile_interval(of_questions))
    assert covered(clustered, 1.0) > 0.88
    assert covered(single, 1.0) < 0.75, "drawn alone, questions of one image look like more evidence than they are"


def test_mcnemar_believes_chance_at_most_5_times_in_100() -> None:
    rng = np.random.default_rng(SEED)
    disagreements = rng.binomial(300, 0.2, size=4000)
    p_values = np.array(
        [mcnemar_p(lost, total - lost) for total in disagreements for lost in [rng.binomial(total, 0.5)]]
    )
    assert 0.02 < np.mean(p_values < 0.05) < 0.055, "exact tests keep below their level, but not far"
    # And it sees a real difference: 40 lost against 20 gained of 300, nearly always.
    found = [
        mcnemar_p(lost, total - lost) < 0.05 for total in disagreements[:500] for lost in [rng.binomial(total, 0.7)]
    ]
    assert np.mean(found) > 0.8
