"""Figure 4 from records made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.records import record

from vzip.report.figures.figure_4 import draw, points_of
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
    assert num_left_out == 2 and points[0].low is not None and abs(points[0].low - (70 - 1.96)) < 1e-9
    drawing = draw(points, "m", num_left_out)
    (axes,) = drawing.figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["32", "64"]
    assert axes.get_legend_handles_labels()[1] == ["vanilla", "VisionZip"]
    assert drawing.rows[1]["record"] == "few"
    assert "left out, older or on other questions: 2" in drawing.caption and "Hollow" in drawing.caption
