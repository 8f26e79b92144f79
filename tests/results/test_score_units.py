"""Units against lmms-eval's own aggregations, on answers drawn at random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from vzip.demo import scoring
from vzip.results.score_units import Units, units_of

DRAW = random.Random(5)


def rows(scores: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"doc_id": number, "scores": entry} for number, entry in enumerate(scores)]


def units(metric: str, of: list[dict[str, Any]]) -> Units:
    found = units_of(metric, of)
    assert found is not None
    return found


def pope(num: int) -> list[dict[str, Any]]:
    said = [DRAW.choice(["yes", "yes", "no", "no", "perhaps"]) for _ in range(num)]
    true = [DRAW.choice(["yes", "no"]) for _ in range(num)]
    return [
        {"question_id": i, "score": float(s == t), "prediction": s, "ground_truth": t}
        for i, (s, t) in enumerate(zip(said, true, strict=True))
    ]


def mme(num: int, categories: str) -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"p{i // 2}",
            "category": categories[(i // 2) % len(categories)],
            "score": float(DRAW.random() < 0.7),
        }
        for i in range(num)
    ]


def test_pope_is_lmms_evals() -> None:
    theirs = pytest.importorskip("lmms_eval.tasks.pope.utils")
    scores = pope(200)
    f1 = units("pope_f1_score", rows([{"pope_f1_score": s} for s in scores]))
    assert f1.score == pytest.approx(theirs.pope_aggregate_f1_score(scores))
    accuracy = units("pope_accuracy", rows([{"pope_accuracy": s} for s in scores]))
    assert accuracy.score == pytest.approx(theirs.pope_aggregate_accuracy(scores))
    assert f1.correct is not None and f1.correct.mean() == pytest.approx(accuracy.score)
    # A resample is scored like lmms-eval would score those questions.
    draw = np.array([DRAW.randrange(200) for _ in range(200)])
    assert f1.aggregate is not None
    assert f1.aggregate(f1.values[draw]) == pytest.approx(theirs.pope_aggregate_f1_score([scores[i] for i in draw]))


def test_pope_by_splits_is_the_mean_of_lmms_evals_f1() -> None:
    theirs = pytest.importorskip("vzip.evaluation.benchmarks.image_tasks")
    scores = [s | {"split": DRAW.choice(["random", "popular", "adversarial"])} for s in pope(200)]
    mean = units("pope_f1_mean", rows([{"pope_f1_mean": s} for s in scores]))
    assert mean.score == pytest.approx(theirs.pope_mean_of_splits(scores))
    draw = np.array([DRAW.randrange(200) for _ in range(200)])
    assert mean.aggregate is not None
    assert mean.aggregate(mean.values[draw]) == pytest.approx(theirs.pope_mean_of_splits([scores[i] for i in draw]))


def test_questions_about_one_image_are_drawn_together() -> None:
    scores = pope(60)
    single = rows([{"pope_f1_score": s, "pope_accuracy": s, "exact_match": s["score"]} for s in scores])
    pictures = [row | {"cluster": f"image{i % 7}"} for i, row in enumerate(single)]
    for metric in ("pope_f1_score", "pope_accuracy", "exact_match"):
        alone, found = units(metric, single), units(metric, pictures)
        assert len(alone.by_cluster()[0]) == 60
        values, aggregate = found.by_cluster()
        assert len(values) == 7 and aggregate is not None and aggregate(values) == pytest.approx(alone.score)
        assert found.correct is not None and len(found.correct) == 60
        # Drawing an image twice is scoring its questions twice.
        by_hand = [row for number in (2, 2, 5) for row in single[number::7]]
        assert aggregate(values[[2, 2, 5]]) == pytest.approx(units(metric, by_hand).score)


def test_mmbench_and_mmmu_by_the_verdicts_kept() -> None:
    entries = [
        {"index": group + 1_000_000 * turn, "group": group, "hit": int(group % 3 > 0)}
        for group in range(9)
        for turn in range(1 + group % 2)
    ]
    mmbench = units("gpt_eval_score", rows([{"gpt_eval_score": s} for s in entries]))
    assert mmbench.score == pytest.approx(100 * 6 / 9) and len(mmbench.by_cluster()[0]) == 9
    assert mmbench.correct is not None and mmbench.correct.tolist() == [False, True, True] * 3
    mmmu = units("mmmu_acc", rows([{"mmmu_acc": {"id": i, "hit": int(i < 3)}} for i in range(4)]))
    assert mmmu.score == 0.75


def test_mmstar_is_lmms_evals() -> None:
    theirs = pytest.importorskip("lmms_eval.tasks.mmstar.utils")
    scores = [
        {"question_id": i, "l2_category": DRAW.choice("xyz"), "score": float(DRAW.random() < 0.4)} for i in range(50)
    ]
    found = units("average", rows([{"average": s} for s in scores]))
    assert found.score == pytest.approx(theirs.mmstar_aggregate_results(scores))


def test_mme_is_lmms_evals() -> None:
    theirs = pytest.importorskip("lmms_eval.tasks.mme.utils")
    perception, cognition = mme(60, "abc"), mme(20, "xy")
    of = rows([{"p": s} for s in perception] + [{"c": s} for s in cognition])
    alone, both = units("p", of), units("p+c", of)
    assert alone.score == pytest.approx(theirs.mme_aggregate_results(perception))
    total = theirs.mme_aggregate_results(perception) + theirs.mme_aggregate_results(cognition)
    assert both.score == pytest.approx(total)
    assert len(both.values) == 40 and both.correct is None, "an image with its two questions is one unit"
    assert units_of("p", of[:59]) is None, "half a pair is not scored"


def test_seed_is_lmms_evals() -> None:
    theirs = pytest.importorskip("lmms_eval.tasks.seedbench.utils")
    scores = [{"pred": DRAW.choice("AbCd"), "answer": DRAW.choice("ABCD"), "question_id": i} for i in range(80)]
    of = rows([{"seed_all": s} | ({"seed_image": s} if i % 2 else {}) for i, s in enumerate(scores)])
    assert units("seed_all", of).score == pytest.approx(theirs.seed_aggregation_result(scores))
    pictures = units("seed_image", of)
    assert pictures.score == pytest.approx(theirs.seed_aggregation_result(scores[1::2]))
    assert pictures.keys == tuple(range(1, 80, 2)), "questions about videos are left out"


@pytest.mark.parametrize("metric", ["f1", "accuracy", "mme"])
def test_scenes_are_its_own_scoring(metric: str) -> None:
    scores = [
        scoring.Result(answer=DRAW.choice(["yes", "no"]), said=DRAW.choice(["yes", "no", "x"]), pair=str(i // 2))
        for i in range(100)
    ]
    ours = units(metric, rows([{metric: s} for s in scores]))
    assert ours.score == pytest.approx(getattr(scoring, metric)(scores))
    assert (ours.correct is None) == (metric == "mme")


def test_numbers() -> None:
    of = rows([{"exact_match": value} for value in (1.0, 0.0, 1.0, 1.0)])
    exact = units("exact_match", of)
    assert exact.score == 0.75 and exact.correct is not None and exact.correct.tolist() == [True, False, True, True]
    shared = units("exact_match", rows([{"exact_match": 0.3}, {"exact_match": 1}]))
    assert shared.score == pytest.approx(0.65) and shared.correct is None, "VQA's scores are between right and wrong"


def test_unknown_forms_give_nothing() -> None:
    assert units_of("gpt_eval_score", rows([{"gpt_eval_score": {"answer": "A", "prediction": "A"}}])) is None
    assert units_of("x", rows([{"y": 1}])) is None


def test_rated_against_a_reference() -> None:
    of = rows([{"judge_score": {"judged": a, "reference": b}} for a, b in [(6, 8), (9, 10), (3, 9)]])
    rated = units("judge_score", of)
    assert rated.score == pytest.approx(100 * 18 / 27), "of the sums, not of each question"
    assert rated.correct is None and rated.values.shape == (3, 2)
