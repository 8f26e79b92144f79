"""Retention against visual tokens, or against measured time: one line a method."""

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


@dataclass(frozen=True)
class Timed:
    """A method at a budget, in words (``64``), with its time and its retention in percent and that one's interval."""

    method: str
    budget: str
    milliseconds: float
    retention: float
    low: float
    high: float
    is_floor: bool = False


def pareto_front(points: Sequence[Timed]) -> list[Timed]:
    """Those that no other point beats in both: sorted by time, each keeps more than all faster ones."""
    front: list[Timed] = []
    for point in sorted(points, key=lambda p: (p.milliseconds, -p.retention)):
        if not front or point.retention > front[-1].retention:
            front.append(point)
    return front


def plot_pareto(points: Sequence[Timed], vanilla_ms: float, outs: Sequence[Path], title: str) -> None:
    """Draws retention against time to each of ``outs`` (PNG or SVG by suffix); floors in grey, the front as a line."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color="0.6", linewidth=1, linestyle="--")
    axes.plot([vanilla_ms], [100], marker="*", markersize=13, color="black", linestyle="", label="vanilla")
    front = pareto_front(points)
    axes.step([p.milliseconds for p in front], [p.retention for p in front], where="post", color="0.75", linewidth=5)
    axes.plot([], [], color="0.75", linewidth=5, label="Pareto front")
    marks = "osD^vP<>Xph"
    for number, method in enumerate(dict.fromkeys(p.method for p in points)):
        line = sorted((p for p in points if p.method == method), key=lambda p: p.milliseconds)
        axes.errorbar(
            [p.milliseconds for p in line],
            [p.retention for p in line],
            yerr=[[p.retention - p.low for p in line], [p.high - p.retention for p in line]],
            marker=marks[number % len(marks)],
            linestyle=":" if line[0].is_floor else "-",
            color=f"{0.35 + 0.05 * (number % 5):.2f}" if line[0].is_floor else f"C{number % 10}",
            linewidth=1,
            elinewidth=0.6,
            capsize=2,
            label=method,
        )
    for point in points:
        where = (point.milliseconds, point.retention)
        axes.annotate(point.budget, where, xytext=(4, 3), textcoords="offset points", fontsize=7, color="0.3")
    axes.set_xlabel("time to the first token, ms (median)")
    axes.set_ylabel("retention, % of vanilla (95 % interval)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    with rc_context({"svg.hashsalt": "vzip"}):  # the same numbers are the same file
        for out in outs:
            figure.savefig(out, dpi=150, metadata={"Date": None} if out.suffix == ".svg" else None)
