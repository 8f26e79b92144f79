"""Committed counts are held against the data, once it is loaded."""

from __future__ import annotations

import logging

import pytest

from vzip.evaluation.benchmarks import question_counts
from vzip.evaluation.run import evaluate


def test_another_number_is_warned_of_and_the_record_keeps_the_datas_own(
    include_path, vlm, tmp_path, monkeypatch, caplog
) -> None:
    known = {"own_exact": {"num_questions": 1000, "exact": True, "source": "a page"}}
    monkeypatch.setattr(question_counts, "known_counts", lambda: known)
    monkeypatch.setattr(logging.getLogger("vzip"), "propagate", True)
    record = evaluate(vlm, tasks=["own_exact"], include_path=include_path, run_dir=tmp_path, progress=False, limit=2)
    rows = record["data"]["own_exact"]["num_rows"]
    assert f"task own_exact: its data has {rows} questions, the committed count is 1000 (a page)" in caplog.text
    assert record["tasks"]["own_exact"]["num_samples"] == 2 < rows


@pytest.mark.parametrize(("task", "count"), [("mmvet_direct", 218), ("of_ones_own", 3), ("tgif_qa_zero_shot", 25751)])
def test_the_same_or_no_committed_number_is_none(task: str, count: int, caplog: pytest.LogCaptureFixture) -> None:
    question_counts.compare_counts([(task, count)])
    assert not caplog.text
