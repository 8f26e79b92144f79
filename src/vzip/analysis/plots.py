"""Retention against visual tokens, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """One run: retention in percent of vanilla with the ends of its confidence interval, and whether it was limited."""

    method: str
    num_tokens: float
    retention: float
    low: float
    high: float
    provisional: bool = False


def plot_retention(points: Sequence[Point], out: Path, title: str) -> None:
    """Draws the points to `out` (PNG or SVG by its suffix); tokens on a logarithmic axis, vanilla as a line at 100."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color="0.5", linewidth=1, linestyle="--")
    axes.annotate("vanilla", (0.995, 100), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="0.4")
    for method in dict.fromkeys(p.method for p in points):
        line = sorted((p for p in points if p.method == method), key=lambda p: p.num_tokens)
        is_provisional = any(p.provisional for p in line)
        axes.errorbar(
            [p.num_tokens for p in line],
            [p.retention for p in line],
            yerr=[[p.retention - p.low for p in line], [p.high - p.retention for p in line]],
            marker="o",
            capsize=3,
            label=f"{method} (provisional)" if is_provisional else method,
            markerfacecolor="white" if is_provisional else None,
        )
    ticks = sorted({p.num_tokens for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens per image")
    axes.set_ylabel("retention, % of vanilla (95 % interval)")
    axes.set_title(f"{title} (provisional)" if any(p.provisional for p in points) else title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=150)
