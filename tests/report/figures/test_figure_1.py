"""Figure 1 from records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.records import record

from vzip.report.costs import Bench
from vzip.report.figures.figure_1 import draw, evaluation_times, prefill_times, radar_of
from vzip.report.figures.figure_4 import points_of
from vzip.results.record import Run

TASKS = ["a", "b", "c", "d"]


def run(name: str, compressor: str, tokens: int, scores: dict[str, float], **change: Any) -> Run:
    counts = {"budget_per_crop": tokens, "measured_min": tokens, "measured_max": tokens, "num_images": 9}
    entries = {
        task: {
            "primary_metric": "m",
            "unit": "fraction",
            "chance": None,
            "num_samples": 50,
            "metrics": {"m": {"value": score, "standard_error": 0.01, "standard_error_source": "x"}},
        }
        for task, score in scores.items()
    }
    data = {task: {"questions_sha256": task} for task in scores}
    return Run(Path(name), record(compressor, visual_tokens=counts, tasks=entries, data=data, **change))


VANILLA = run("vanilla", "Identity", 576, {"a": 0.8, "b": 0.5, "c": 0.4, "d": 0.0}, wall_time_s=90.0)
OURS = run("ours", "VisionZip", 64, {"a": 0.6, "b": 0.5, "c": 0.2}, wall_time_s=30.0)
RUNS = [
    VANILLA,
    OURS,
    run("more", "VisionZip", 192, {"a": 0.7, "b": 0.5, "c": 0.3}),
    run("random", "RandomTokens", 62, {"a": 0.4, "b": 0.1, "c": 0.1}, wall_time_s=20.0, num_resumed_answers=3),
    run("part", "DivPrune", 64, {"a": 0.9}),
]


def test_every_method_in_percent_of_vanilla_at_the_budget_that_most_have() -> None:
    radar = radar_of(points_of(RUNS, TASKS)[0], TASKS)
    assert radar is not None and list(radar.tasks) == ["a", "b", "c"], "vanilla's 0 is no base"
    assert radar.num_tokens in (62, 64) and radar.left_out == ["DivPrune"]
    assert list(radar.retention) == ["vanilla", "RandomTokens", "VisionZip"]
    assert radar.retention["VisionZip"] == pytest.approx([100 * 0.6 / 0.8, 100, 50])
    assert radar.retention["vanilla"].tolist() == [100, 100, 100]
    assert radar_of(points_of(RUNS, TASKS[:2])[0], TASKS[:2]) is None, "two benchmarks make no radar"
    assert radar_of(points_of([VANILLA], TASKS)[0], TASKS) is None
    assert radar_of(points_of([OURS], TASKS)[0], TASKS) is None, "nothing to compare with"


def test_times_are_of_whole_runs_on_one_machine() -> None:
    radar = radar_of(points_of(RUNS, TASKS)[0], TASKS)
    assert radar is not None
    same = {"d": 0.1, "a": 0.6, "b": 0.5, "c": 0.2}
    timed = [VANILLA, run("ours", "VisionZip", 64, same, wall_time_s=30.0), *RUNS[2:]]
    assert [(bar.method, bar.value) for bar in evaluation_times(radar, timed)] == [("vanilla", 90), ("VisionZip", 30)]
    other = {"hardware": {"cpu": "another", "gpus": []}, "wall_time_s": 1.0}
    assert [b.method for b in evaluation_times(radar, [VANILLA, run("ours", "VisionZip", 64, same, **other)])] == [
        "vanilla"
    ]
    assert [b.method for b in evaluation_times(radar, [VANILLA, OURS])] == ["vanilla"], "of other benchmarks"
    assert not evaluation_times(radar, [OURS])


def bench(time_ms: float, tokens: int = 64, model: str = "m") -> Bench:
    def method(ms: float, count: int) -> dict[str, Any]:
        timing = {"median_ms": ms, "q1_ms": ms - 1, "q3_ms": ms + 2}
        return {"stages": {"prefill": timing}, "num_visual_tokens": count}

    content = {
        "model": model,
        "methods": {"vanilla": method(8 * time_ms, 576), "vzip": method(time_ms, tokens)},
        "environment": {"processor": "a GPU"},
    }
    return Bench(Path(f"bench{time_ms}"), content)


def test_prefill_is_the_newest_of_the_model_at_that_budget() -> None:
    bars, machine = prefill_times([bench(5), bench(6), bench(7, 192), bench(9, model="n")], "m", 64.0)
    assert [(bar.method, bar.value, bar.low, bar.high) for bar in bars] == [
        ("vanilla", 48, 47, 50),
        ("VisionZip", 6, 5, 8),
    ]
    assert machine == "a GPU" and prefill_times([bench(7, 192)], "m", 64.0) == ([], "")
    for settings in ({"compressor": "divprune"}, {"method_settings": {"compressor": {"merge_rule": "mean"}}}):
        other = bench(4)
        other.content["settings"] = settings
        assert prefill_times([bench(6), other], "m", 64.0)[0] == bars, "another method is no VisionZip"


def test_lines_and_bars_are_the_numbers() -> None:
    points, num_left_out = points_of(RUNS, TASKS)
    radar = radar_of(points, TASKS)
    assert radar is not None
    bars, machine = prefill_times([bench(6)], "m", 64.0)
    drawing = draw(radar, bars, machine, [], "m", num_left_out, ["No evaluation: do this."])
    polar, prefill = drawing.figure.axes
    lines = {line.get_label(): np.asarray(line.get_ydata(), float) for line in polar.lines}
    assert lines["VisionZip, 75.0 %"].tolist() == pytest.approx([75, 100, 50, 75]), "closed"
    assert polar.get_ylim()[0] == 10 and "middle of the radar is 10 %" in drawing.caption  # RandomTokens has 20
    assert [tick.get_text() for tick in polar.get_xticklabels()] == ["a\n(80)", "b\n(50)", "c\n(40)"]
    assert [patch.get_height() for patch in prefill.patches] == [48, 6]
    assert [text.get_text() for text in prefill.texts] == ["48", "6\n8.0x"]
    assert drawing.caption.endswith(
        "No evaluation: do this."
    ) and "Left out, since a benchmark is missing: DivPrune" in (drawing.caption)
    assert "measured apart on a GPU" in drawing.caption and "wall time" not in drawing.caption
    found = {(row["what"], row["method"]): row["percent_of_vanilla"] for row in drawing.rows}
    assert found["c", "VisionZip"] == pytest.approx(50) and found["prefill", "vanilla"] is None
