"""``python -m vzip table N --hours --gpu NAME``."""

from __future__ import annotations

from pathlib import Path

import pytest

from vzip import cli
from vzip.bench.forecast import Assumptions, gpus
from vzip.evaluation.benchmarks import question_counts
from vzip.report.table_files import read_table
from vzip.results.record import Run
from vzip.sweep.hours import ESTIMATED, MEASURED, Line, forecast, model_work
from vzip.sweep.plan import plan
from vzip.sweep.table import select

GPU = gpus()["3090"]


def lines_of(name: str, only: str, runs: list[Run], num_gpus: int = 1) -> list[Line]:
    table = select(read_table(name), only)
    return list(forecast(table, plan(table, [], Path("runs")), runs, GPU, num_gpus, Assumptions()))


def test_estimated_and_measured() -> None:
    vanilla, pruned, by_data, compressed, training, tuned = lines_of("1", "gqa,pope,64", [])
    assert by_data.label == "64, SparseVLM" and by_data.hours == vanilla.hours  # nobody knows how many it will drop
    assert pruned.label == "64, FastV" and compressed.hours < pruned.hours < vanilla.hours  # all enter its first layers
    assert [line.label for line in (vanilla, compressed)] == ["576, vanilla", "64, VisionZip"]
    assert training.what == "training (projector)" and training.label == tuned.label == "64, VisionZip‡"
    asked = question_counts.num_questions("gqa") + question_counts.num_questions("pope_splits")  # type: ignore[operator]
    assert vanilla.count == compressed.count == asked and training.count == 66530
    assert {line.source for line in (vanilla, pruned, compressed, training, tuned)} == {ESTIMATED}
    assert compressed.hours is not None and vanilla.hours is not None and tuned.hours == compressed.hours
    # 576 visual tokens against 64, each with 100 of text, and a tower that both run.
    assert 2 < vanilla.hours / compressed.hours < (576 + 100) / (64 + 100)
    assert lines_of("1", "gqa,pope,64", [], num_gpus=4)[0].hours == pytest.approx(vanilla.hours / 4)

    model = {"name_or_path": "llava-hf/llava-1.5-7b-hf"}
    tasks = {task: {"num_samples": 50} for task in ("gqa", "pope_splits")}
    record = {
        "config": {"model": model},
        "hardware": {"gpus": ["NVIDIA GeForce RTX 3090"]},
        "model": {"device": "cuda:0"},
        "wall_time_s": 36.0,
        "tasks": tasks,
        "data": {task: {"num_rows": 10_000} for task in tasks},
    }
    measured = lines_of("1", "gqa,pope,64", [Run(Path("run"), record)])
    assert measured[0].source == MEASURED and measured[0].hours == pytest.approx(20_000 * 0.36 / 3600)
    two = record | {"hardware": {"gpus": ["NVIDIA GeForce RTX 3090"] * 2}}
    assert lines_of("1", "gqa,pope,64", [Run(Path("run"), two)])[0].source == ESTIMATED


def test_what_is_not_known_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(question_counts.known_counts(), "pope_splits", {"num_questions": None})
    line = lines_of("1", "gqa,pope,64", [])[0]
    assert line.note == "without pope_splits: number of questions unknown" and line.hours is not None
    assert lines_of("1", "pope,64", [])[0].hours is None


def test_operations_of_the_vision_side_are_those_that_the_bench_counts() -> None:
    """Mini-Gemini has all the parts: tower, high-resolution tower, mining, projector."""
    from vzip.bench import flops
    from vzip.bench.shapes import SHAPES

    planned = plan(select(read_table("14"), "64,visionzip"), [], Path("runs"))
    config = planned["64, VisionZip"].config
    shape = SHAPES["mini_gemini_7b"]().config
    work = model_work(config)
    tower = flops.tower_formula(shape.vision_config, num_layers=23, num_crops=1, has_cls=True)
    highres = flops.convnext_formula(shape.high_res_config, image_size=768, num_images=1)
    assert work.vision_operations > tower + highres


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--hours"], "--gpu is missing"),
        (["--hours", "--gpu", "309"], "did you mean '3090'"),
        (["--gpu", "3090"], "needs --hours"),
        (["--hours", "--gpu", "3090", "--utilisation", "40"], "above 0 and at most 1"),
    ):
        assert cli.main(["table", "1", *words]) == 2
        assert message in capsys.readouterr().err


def test_printed_with_what_was_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["table", "1", "--hours", "--gpu", "3090", "--only", "gqa,64"]) == 0
    shown = capsys.readouterr().out
    assert (
        "64, VisionZip" in shown.replace("\n", " ")
        and "estimate" in shown
        and "40% of the operations" in shown
        and "100 text tokens" in shown
    )
