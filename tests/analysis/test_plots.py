"""The plot of retention says which of its runs were limited."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from vzip.analysis.plots import Point, plot_retention


@pytest.mark.parametrize("limited", [True, False])
def test_a_limited_run_is_marked(limited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    points = [Point("VisionZip", 64, 90, 85, 95, limited), Point("random", 64, 70, 65, 75)]
    plot_retention(points, tmp_path / "plot.png", "tiny")
    (axes,) = drawn[0].axes
    mark = " (provisional)" if limited else ""
    assert axes.get_title() == f"tiny{mark}"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"VisionZip{mark}", "random"]
