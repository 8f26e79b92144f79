"""Figure 1: what a method keeps of each benchmark, as a radar, and what time it saves; from the records of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vzip.report.costs import Bench, is_of_visionzip, machine_of, took_something_over
from vzip.results.method_label import VANILLA
from vzip.results.record import Run

from .drawing import Drawing, legend_below
from .figure_4 import Point

SAME_BUDGET = 0.05  # what counts of tokens may differ by and still be one budget (a pruner's are an average)
MIN_TASKS = 3  # fewer make no radar


@dataclass(frozen=True)
class Radar:
    """Methods at one number of visual tokens, each on every task.

    Attributes:
        tasks: the axes.
        num_tokens: of the methods but vanilla, an image.
        retention: by method, vanilla among them: 100 * score / vanilla's score, a value a task.
        points: by method, likewise: what it is made of.
        left_out: methods at this number that lack a task.
    """

    tasks: Sequence[str]
    num_tokens: float
    retention: Mapping[str, np.ndarray]
    points: Mapping[str, Sequence[Point]]
    left_out: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """A time of a method in ``unit``; ``low`` and ``high`` are quartiles, None where it was measured once."""

    method: str
    value: float
    low: float | None
    high: float | None
    unit: str
    record: str


def radar_of(points: Sequence[Point], tasks: Sequence[str]) -> Radar | None:
    """The number of tokens at which most scores are, of several the fewest; None where there is nothing to compare.

    Args:
        points: from ``figure_4.points_of``.
        tasks: in the order of the axes; those without a vanilla score above 0 are left out.
    """
    base = {point.task: point for point in points if point.method == VANILLA and point.score > 0}
    tasks = [task for task in tasks if task in base]
    others = [point for point in points if point.method != VANILLA and point.task in tasks]
    if len(tasks) < MIN_TASKS or not others:
        return None

    def near(tokens: float) -> list[Point]:
        return [point for point in others if abs(point.num_tokens - tokens) <= SAME_BUDGET * tokens]

    def full(own: Sequence[Point]) -> dict[str, list[Point]]:
        found = {}
        for method in dict.fromkeys(point.method for point in own):
            of_task = {point.task: point for point in own if point.method == method}
            if len(of_task) == len(tasks):
                found[method] = [of_task[task] for task in tasks]
        return found

    # Methods that have every task first, then scores at all.
    tokens = max({p.num_tokens for p in others}, key=lambda n: (len(full(near(n))), len(near(n)), -n))
    chosen = full(near(tokens))
    if not chosen:
        return None
    of_methods = {VANILLA: [base[task] for task in tasks], **chosen}
    retention = {
        method: np.array([100 * point.score / base[point.task].score for point in own])
        for method, own in of_methods.items()
    }
    left_out = sorted({point.method for point in near(tokens)} - set(chosen))
    return Radar(tasks, tokens, retention, of_methods, left_out)


def evaluation_times(radar: Radar, runs: Sequence[Run]) -> list[Bar]:
    """Wall time of each method's evaluation, in seconds; of those alone that are vanilla's on the same machine.

    A time stands for all of a method's scores, so they must be of one run that took nothing over from another.
    """
    by_path = {str(run.path): run for run in runs}
    found: dict[str, Run] = {}
    for method, points in radar.points.items():
        (path, *others) = dict.fromkeys(point.record for point in points)
        run = by_path.get(path)
        if run is not None and not others and run.record.get("wall_time_s") and not took_something_over(run.record):
            found[method] = run
    if VANILLA not in found:
        return []

    def asked(run: Run) -> object:
        return machine_of(run.record), sorted(run.record["tasks"])

    same = {method: run for method, run in found.items() if asked(run) == asked(found[VANILLA])}
    return [
        Bar(method, float(run.record["wall_time_s"]), None, None, "s, evaluation", str(run.path))
        for method, run in same.items()
    ]


def prefill_times(benches: Sequence[Bench], model: str, num_tokens: float) -> tuple[list[Bar], str]:
    """Median prefill of one prompt with all tokens and with as many as the radar's, from the newest measurement.

    Returns:
        The bars, and the machine; nothing where there is no such measurement.
    """
    for bench in reversed(benches):
        methods = bench.content["methods"]
        if bench.content["model"] != model or not {VANILLA, "vzip"} <= set(methods):
            continue
        if not is_of_visionzip(bench.content):
            continue
        if abs(methods["vzip"]["num_visual_tokens"] - num_tokens) > SAME_BUDGET * num_tokens:
            continue
        bars = []
        for name, label in ((VANILLA, VANILLA), ("vzip", "VisionZip")):
            timing = methods[name]["stages"]["prefill"]
            quartiles = timing.get("q1_ms"), timing.get("q3_ms")
            bars.append(Bar(label, float(timing["median_ms"]), *quartiles, "ms, prefill", str(bench.path)))
        return bars, str(bench.content["environment"]["processor"])
    return [], ""


def draw(
    radar: Radar,
    prefill: Sequence[Bar],
    machine: str,
    evaluation: Sequence[Bar],
    model: str,
    num_left_out: int = 0,
    missing: Sequence[str] = (),
) -> Drawing:
    """A radar of retention, and bars of the times there are.

    Args:
        radar, prefill, evaluation: what was found.
        machine: that prefill was measured on.
        model: by name.
        num_left_out: scores that ``points_of`` left out.
        missing: commands that would fill what is not there, told in the caption.
    """
    from matplotlib.figure import Figure  # slow to import; only figures need it

    panels = [bars for bars in (prefill, evaluation) if bars]
    figure = Figure(figsize=(6.2 + 3.4 * len(panels), 5.4), layout="constrained")
    grid = figure.add_gridspec(1, 1 + len(panels), width_ratios=[1.8] + [1] * len(panels))
    colors = {method: "0.4" if method == VANILLA else f"C{n - 1}" for n, method in enumerate(radar.retention)}
    _draw_radar(figure.add_subplot(grid[0], projection="polar"), radar, colors)
    for number, bars in enumerate(panels, start=1):
        axes = figure.add_subplot(grid[number])
        ends = [
            (bar.value - bar.low, bar.high - bar.value) for bar in bars if bar.low is not None and bar.high is not None
        ]
        spread = list(zip(*ends, strict=True)) if len(ends) == len(bars) else None
        names = [bar.method.replace("+", "+\n").replace(", ", ",\n") for bar in bars]
        drawn = axes.bar(
            names, [bar.value for bar in bars], yerr=spread, capsize=3, color=[colors.get(b.method, "C0") for b in bars]
        )
        base = bars[0].value
        labels = [f"{bar.value:.3g}" + (f"\n{base / bar.value:.1f}x" if bar is not bars[0] else "") for bar in bars]
        axes.bar_label(drawn, labels, padding=3, fontsize=9)
        axes.margins(y=0.18)
        axes.set_ylabel(bars[0].unit.split(",")[0])
        axes.set_title("prefill of one prompt" if bars is prefill else "the whole evaluation", fontsize=10)
        axes.tick_params(axis="x", labelsize=8, rotation=30 if len(bars) > 3 else 0)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend_below(figure, handles, labels, 3)
    provisional = any(point.provisional for own in radar.points.values() for point in own)
    words = f"{model}: {radar.num_tokens:g} visual tokens against vanilla" + (" (provisional)" if provisional else "")
    figure.suptitle(words, parse_math=False)
    rows: list[dict[str, Any]] = []
    for method, points in radar.points.items():
        for point, kept in zip(points, radar.retention[method], strict=True):
            rows.append(
                {"what": point.task, "method": method, "num_tokens": point.num_tokens, "value": point.score}
                | {"unit": point.unit, "percent_of_vanilla": kept, "low": point.low, "high": point.high}
                | {"record": point.record}
            )
    for bar in (*prefill, *evaluation):
        what, unit = bar.unit.split(", ")[1], bar.unit.split(", ")[0]
        rows.append(
            {"what": what, "method": bar.method, "num_tokens": None, "value": bar.value, "unit": unit}
            | {"percent_of_vanilla": None, "low": bar.low, "high": bar.high, "record": bar.record}
        )
    return Drawing(figure, rows, _caption(radar, prefill, machine, evaluation, model, num_left_out, missing))


def _center(radar: Radar) -> float:
    """What the middle of the radar stands for, in percent of vanilla: else all lines lie at its rim."""
    least = min(float(values.min()) for values in radar.retention.values())
    return max(0.0, 10 * (least // 10) - 10)


def _draw_radar(axes: Any, radar: Radar, colors: Mapping[str, str]) -> None:
    angles = np.linspace(0, 2 * np.pi, len(radar.tasks), endpoint=False)
    for method, values in radar.retention.items():
        mean = f"{method}, {values.mean():.1f} %" if method != VANILLA else VANILLA
        look = {"linestyle": "--"} if method == VANILLA else {}
        closed = np.append(values, values[0])
        axes.plot(np.append(angles, angles[0]), closed, color=colors[method], linewidth=1.5, label=mean, **look)
        if method != VANILLA:
            axes.fill(angles, values, color=colors[method], alpha=0.08)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    names = [task.replace("_", "\n", 1) for task in radar.tasks]
    scores = [f"{point.score:.4g}" for point in radar.points[VANILLA]]
    axes.set_xticks(angles, [f"{name}\n({score})" for name, score in zip(names, scores, strict=True)], fontsize=8)
    axes.tick_params(axis="x", pad=12)
    top = max(float(values.max()) for values in radar.retention.values())
    axes.set_ylim(_center(radar), max(102.0, top + 2))
    ticks = [tick for tick in range(10, 101, 10) if tick > _center(radar)]
    shown = ticks[:: -(-len(ticks) // 5)] if len(ticks) > 5 else ticks
    axes.set_yticks(shown, [f"{tick} %" for tick in shown], fontsize=7, color="0.4")
    axes.set_rlabel_position(180 / len(radar.tasks))


def _caption(
    radar: Radar,
    prefill: Sequence[Bar],
    machine: str,
    evaluation: Sequence[Bar],
    model: str,
    num_left_out: int,
    missing: Sequence[str],
) -> str:
    counts = ", ".join(f"{point.task} ({point.num_questions})" for point in radar.points[VANILLA])
    lines = [
        f"Figure 1 of arXiv 2412.04467 from our own records: {model} with {radar.num_tokens:g} visual tokens an image"
        f" (measured; within {100 * SAME_BUDGET:g} %) in percent of its own score with all, on {counts}; in brackets"
        f" the questions, and at the axes vanilla's scores. The middle of the radar is {_center(radar):g} %, not 0."
        " In the legend the mean over the benchmarks. Scores come with error; the CSV has their 95 % intervals."
    ]
    if prefill:
        lines.append(
            f"Prefill: median over one prompt's repeats, bars from quartile to quartile, measured apart on {machine};"
            " no vision tower, no selection."
        )
    if evaluation:
        lines.append(
            "Evaluation: wall time of the runs behind the radar, on one machine, each measured once: reading images,"
            " vision tower and answers, without loading the model."
        )
    if any(point.provisional for own in radar.points.values() for point in own):
        lines.append("Provisional: a limited number of questions, or code that is not committed.")
    if radar.left_out:
        lines.append(f"Left out, since a benchmark is missing: {', '.join(radar.left_out)}.")
    if num_left_out:
        lines.append(f"Scores left out, older or of other questions, weights or judges: {num_left_out}.")
    return "\n".join([*lines, *missing])
