"""Figure 4 from records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from tests.records import record

from vzip.installed import checkout
from vzip.option_files import option_values
from vzip.report.figures.figure_4 import Point, draw, points_of
from vzip.results.record import Run


def run(name: str, compressor: str, tokens: int, score: float, **change: Any) -> Run:
    counts = {"budget_per_crop": tokens, "measured_min": tokens, "measured_max": tokens, "num_images": 9}
    return Run(Path(name), record(compressor, (score, 0.5), visual_tokens=counts, **change))


def test_the_newest_run_of_each_method_on_vanillas_questions() -> None:
    runs = [
        run("new", "VisionZip", 64, 0.6, created="2026-01-02"),
        run("old", "VisionZip", 64, 0.1, created="2026-01-01"),
        run("few", "VisionZip", 32, 0.5, provisional=True),
        run("vanilla", "Identity", 576, 0.7),
        run("others", "RandomTokens", 64, 0.9, created="2026-01-03", data={"gqa": {"questions_sha256": "other"}}),
    ]
    points, num_left_out = points_of(runs, ["gqa", "absent"])
    assert [(p.method, p.num_tokens, round(p.score, 6)) for p in points] == [
        ("vanilla", 576, 70),
        ("VisionZip", 32, 50),
        ("VisionZip", 64, 60),
    ]
    assert num_left_out == 2 and (points[0].low, points[0].high) == pytest.approx((70 - 1.96, 70 + 1.96), abs=0.1)
    drawing = draw(points, "m", num_left_out)
    (axes,) = drawing.figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["32", "64"]
    assert axes.get_legend_handles_labels()[1] == ["vanilla", "VisionZip"]
    assert drawing.rows[1]["record"] == "few"
    assert (
        "left out, older or of other questions, weights or judges: 2" in drawing.caption and "Hollow" in drawing.caption
    )


def test_a_newer_ablation_is_a_line_of_its_own() -> None:
    def configured(name: str, score: float, merge_rule: str, created: str) -> Run:
        own = {**option_values(checkout() / "configs", "compressor", "visionzip"), "merge_rule": merge_rule}
        return run(name, "VisionZip", 64, score, created=created, config={"compressor": own})

    runs = [
        configured("recipe", 0.6, "sum", "2026-01-01"),
        configured("newer", 0.4, "mean", "2026-01-02"),
        run("vanilla", "Identity", 576, 1.0),
    ]
    points, num_left_out = points_of(runs, ["gqa"])
    found = [(point.method, round(point.score)) for point in points]
    assert found == [("vanilla", 100), ("VisionZip", 60), ("VisionZip, merge_rule=mean", 40)] and num_left_out == 0
    assert points[0].low is not None and points[0].high == 100


def test_scores_of_other_weights_are_left_out() -> None:
    def weighed(name: str, compressor: str, tokens: int, digest: str) -> Run:
        own = {**record()["model"], "weights_sha256": digest}
        return run(name, compressor, tokens, 0.5, model=own)

    ours, old = weighed("ours", "VisionZip", 64, "a"), weighed("old", "VisionZip", 32, "b")
    runs = [ours, old, weighed("all", "Identity", 576, "a")]
    points, num_left_out = points_of(runs, ["gqa"])
    assert [point.record for point in points] == ["all", "ours"] and num_left_out == 1


def test_a_long_name_stays_within_the_figure() -> None:
    long = "WithoutOutliers, of=vispruner(important_ratio=0.75), positions=original, quantization=4bit, tuned"
    rows = [Point("gqa", name, 64.0, 50.0, 40.0, 60.0, "percent", 9, False, "r") for name in ("VisionZip", long)]
    figure = draw(rows, "m").figure
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    assert " ".join(" ".join(text.get_text() for text in legend.get_texts()).split()) == f"VisionZip {long}"
