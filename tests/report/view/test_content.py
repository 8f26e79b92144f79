"""What the page says of two runs: matched questions, right and wrong, scores of tasks and categories."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.records import record

from vzip.errors import ManifestError
from vzip.report.two_runs import compare_runs
from vzip.report.view.content import build_content, question_scores, read_tasks
from vzip.results.record import Run


def put(folder: Path, rows: list[dict[str, Any]], compressor: str = "VisionZip", metric: str = "exact_match") -> Run:
    """A run of one task, ``gqa``, whose score is the mean of its rows'."""
    folder.mkdir(parents=True)
    content = record(compressor)
    values = [float(row["scores"][metric]) for row in rows if metric in row["scores"]]
    score = {"value": sum(values) / max(1, len(values)), "standard_error": None}
    content["tasks"] = {
        "gqa": {"primary_metric": metric, "unit": "fraction", "num_samples": len(rows), "metrics": {metric: score}}
    }
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder / "run.json", content)


def row(number: int, score: float, **change: Any) -> dict[str, Any]:
    return {
        "task": "gqa",
        "doc_id": number,
        "filter_index": 0,
        "question": f"q{number}",
        "target": "yes",
        "answer": "yes" if score else "no",
        "scores": {"exact_match": score},
        "num_visual_tokens": [64],
        "group": "odd" if number % 2 else "even",
    } | change


def content_of(run: Run, other: Run | None = None) -> dict[str, Any]:
    tasks, remarks = read_tasks(run, other)
    return build_content(run, other, tasks, remarks)


def test_what_only_one_run_answers_rightly_and_mcnemar_by_category(tmp_path: Path) -> None:
    ours, base = [0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]
    run = put(tmp_path / "a", [row(n, s) for n, s in enumerate(ours)])
    vanilla = put(tmp_path / "b", [row(n, s) for n, s in reversed(list(enumerate(base)))], "Identity")
    content = content_of(run, vanilla)
    assert [one["name"] for one in content["runs"]] == ["compressed", "vanilla"] and content["base"] == 1
    outcome = {(0, 1): "lost", (1, 0): "gained", (1, 1): "right", (0, 0): "wrong"}
    assert [one["outcome"] for one in content["samples"]] == [outcome[pair] for pair in zip(ours, base, strict=True)]
    assert [one["same"] for one in content["samples"]] == [a == b for a, b in zip(ours, base, strict=True)]
    (task,) = content["tasks"]
    assert [group["category"] for group in task["groups"]] == [None, "even", "odd"]
    for group in task["groups"]:
        chosen = [n for n in range(12) if group["category"] in (None, "odd" if n % 2 else "even")]
        lost, gained = (sum((ours[n], base[n]) == pair for n in chosen) for pair in ((0, 1), (1, 0)))
        assert (group["num_questions"], group["lost"], group["gained"]) == (len(chosen), lost, gained)
        tail = sum(math.comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
        assert group["p"] == pytest.approx(min(1.0, 2 * tail))
        means = [sum(own[n] for n in chosen) / len(chosen) for own in (ours, base)]
        assert group["scores"] == pytest.approx(means)
        assert group["retention"][0] == pytest.approx(means[0] / means[1])
        assert group["same"] == pytest.approx(sum(ours[n] == base[n] for n in chosen) / len(chosen))

    (pair,) = compare_runs(run, vanilla)  # what `python -m vzip compare` prints
    assert pair.paired is not None
    expected = (pair.paired.retention, pair.paired.low, pair.paired.high, pair.paired.p_value)
    whole = task["groups"][0]
    assert (*whole["retention"], whole["p"]) == pytest.approx(expected)
    assert whole["outside_noise"] == pair.paired.outside_noise

    turned = content_of(vanilla, run)  # vanilla is what is held against, whichever comes first
    assert turned["base"] == 0 and turned["tasks"][0]["groups"][0]["lost"] == task["groups"][0]["lost"]
    by_key = {one["key"]: one["outcome"] for one in turned["samples"]}
    assert by_key == {one["key"]: one["outcome"] for one in content["samples"]}


def test_graded_answers_are_held_against_each_other(tmp_path: Path) -> None:
    run = put(tmp_path / "a", [row(n, s) for n, s in enumerate([0.3, 1.0, 0.6, 0.0])])
    other = put(tmp_path / "b", [row(n, s) for n, s in enumerate([0.6, 0.9, 0.6, 0.0])])
    content = content_of(run, other)
    assert [one["name"] for one in content["runs"]] == ["A", "B"]
    assert [one["outcome"] for one in content["samples"]] == ["lost", "gained", "right", "wrong"]
    group = content["tasks"][0]["groups"][0]
    assert "p" not in group and group["scores"] == pytest.approx([1.9 / 4, 2.1 / 4])


def test_a_metric_of_pairs_still_tells_right_from_wrong(tmp_path: Path) -> None:
    def twins(right: list[bool]) -> list[dict[str, Any]]:
        entries = [
            {"answer": "yes", "said": "yes" if own else "no", "pair": f"{n // 2}"} for n, own in enumerate(right)
        ]
        return [row(n, 0, scores={"mme": one, "accuracy": one}) for n, one in enumerate(entries)]

    rows = twins([True, False, True, True])
    assert question_scores(["mme", "accuracy"], rows) == [1, 0, 1, 1]
    mme = [{"score": float(n), "category": "ocr", "question_id": "7"} for n in (1, 0)]
    assert question_scores(["mme"], [{"doc_id": n, "scores": {"mme": one}} for n, one in enumerate(mme)]) == [1, 0]


def test_of_partly_different_questions_those_in_common_are_compared_and_the_rest_is_told(tmp_path: Path) -> None:
    run = put(tmp_path / "a", [row(n, 1) for n in range(6)])
    rows = [row(2, 0), row(3, 1, question="another"), row(4, 1), row(9, 1), row(0, 1, task="pope")]
    other = put(tmp_path / "b", rows, "Identity")
    content = content_of(run, other)
    assert [one["key"] for one in content["samples"]] == ["gqa:2", "gqa:4"]
    told = " ".join(content["remarks"])
    assert "2 questions are in both runs" in told and "compressed has 6, vanilla 4" in told
    assert "1 have another text" in told and "Only vanilla has the tasks pope" in told
    group = content["tasks"][0]["groups"][0]
    assert (group["lost"], group["gained"], group["num_questions"]) == (0, 1, 2)


def test_runs_without_a_question_in_common_are_refused(tmp_path: Path) -> None:
    run, other = put(tmp_path / "a", [row(1, 1)]), put(tmp_path / "b", [row(2, 1)])
    with pytest.raises(ManifestError, match=r"answered gqa \(1 questions\).*nothing to compare"):
        read_tasks(run, other)
    twice = put(tmp_path / "c", [row(1, 1), row(1, 1)])
    with pytest.raises(ManifestError, match="more than once"):
        read_tasks(twice, None)
    broken = put(tmp_path / "d", [{key: value for key, value in row(1, 1).items() if key != "answer"}])
    with pytest.raises(ManifestError, match="no usable answer"):
        read_tasks(broken, None)


def test_one_run_alone_and_scores_that_are_no_numbers(tmp_path: Path) -> None:
    rows = [row(0, 1), row(1, 0), row(2, 1, scores={}), row(3, 1, scores={"exact_match": float("nan")})]
    content = content_of(put(tmp_path / "a", rows))
    assert [one["outcome"] for one in content["samples"]] == ["right", "wrong", "", ""]
    assert content["samples"][3]["scores"] == [None]
    json.dumps(content, allow_nan=False)


def test_several_filters_of_a_question_are_told_apart(tmp_path: Path) -> None:
    run = put(tmp_path / "a", [row(5, 1), row(5, 0, filter_index=1, answer=["a", "b"])])
    samples = content_of(run)["samples"]
    assert [one["key"] for one in samples] == ["gqa:5", "gqa:5:1"] and samples[1]["answers"] == ["a\nb"]
