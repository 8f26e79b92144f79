"""Figure 4: accuracy against visual tokens, a panel a benchmark, a line a method; from the records of finished runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vzip.results.method_label import VANILLA, method_labels
from vzip.results.record import Run, is_vanilla, primary_scores, same_judge, visual_tokens_of
from vzip.results.stats import score_interval

from .drawing import Drawing, legend_below


@dataclass(frozen=True)
class Point:
    """A run on a benchmark; ``low`` and ``high`` are its 95 % interval, None where there is no standard error."""

    task: str
    method: str
    num_tokens: float
    score: float
    low: float | None
    high: float | None
    unit: str
    num_questions: int
    provisional: bool
    record: str


def points_of(
    runs: Sequence[Run], tasks: Sequence[str], asked: Mapping[str, Any] | None = None
) -> tuple[list[Point], int]:
    """The newest run of each method and number of tokens on each task, all on the same questions, those of the newest.

    A method is a compressor and a pruner with their settings, and what else was set of the model; see
    ``method_labels``.

    Args:
        runs: of one model.
        tasks: in the order of the panels.
        asked: a configuration: settings of ``model`` and ``eval`` that are as there are not told.

    Returns:
        The points, vanilla first, and how many scores were left out: of other questions, another judge or other
        weights than vanilla's, or older.
    """
    labels = dict(zip((run.path for run in runs), method_labels(runs, asked), strict=True))
    newest_first = sorted(runs, key=lambda run: str(run.record.get("created")), reverse=True)
    points: list[Point] = []
    num_left_out = 0
    for task in tasks:
        having = [run for run in newest_first if task in primary_scores(run.record)]
        if not having:
            continue
        # Vanilla's questions, since every line is read against it.
        base = min(having, key=lambda run: (labels[run.path] != VANILLA, not is_vanilla(run.record)))
        found: dict[tuple[str, float], Point] = {}
        for run in having:
            point = _point(run, task, labels[run.path]) if _beside(run, base, task) else None
            if point is not None:
                found.setdefault((point.method, point.num_tokens), point)
        num_left_out += len(having) - len(found)
        points += sorted(found.values(), key=lambda point: (point.method != VANILLA, point.method, point.num_tokens))
    return points, num_left_out


def _beside(run: Run, base: Run, task: str) -> bool:
    """Whether a score may stand beside another: of the same questions, judge and weights."""
    weights = {record["model"].get("weights_sha256") for record in (run.record, base.record)} - {None}
    same = _questions(run, task) == _questions(base, task) and same_judge(run.record, base.record, task)
    return same and len(weights) < 2


def _questions(run: Run, task: str) -> object:
    return (run.record.get("data") or {}).get(task, {}).get("questions_sha256")


def _point(run: Run, task: str, method: str) -> Point | None:
    fewest, most = visual_tokens_of(run.record)
    if fewest is None or most is None:
        return None
    score, entry = primary_scores(run.record)[task], run.record["tasks"][task]
    factor = 100.0 if entry["unit"] == "fraction" else 1.0
    interval = score_interval(score.value, score.standard_error, score.num_samples, entry["unit"])
    return Point(
        task,
        method,
        (fewest + most) / 2,
        factor * score.value,
        None if interval is None else factor * interval[0],
        None if interval is None else factor * interval[1],
        "percent" if entry["unit"] == "fraction" else str(entry["unit"]),
        score.num_samples,
        bool(run.record["provisional"]),
        str(run.path),
    )


def draw(points: Sequence[Point], model: str, num_left_out: int = 0) -> Drawing:
    """A panel a task; hollow markers are provisional, the dashed line is vanilla."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    tasks = list(dict.fromkeys(point.task for point in points))
    methods = [m for m in dict.fromkeys(point.method for point in points) if m != VANILLA]
    num_columns = min(3, len(tasks)) if len(tasks) != 4 else 2
    num_rows = math.ceil(len(tasks) / num_columns)
    figure = Figure(figsize=(1 + 3.6 * num_columns, 0.9 + 2.9 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(panels, tasks, strict=False):
        own = [point for point in points if point.task == task]
        for point in own:
            if point.method == VANILLA:
                axes.axhline(point.score, color="0.4", linestyle="--", linewidth=1, zorder=0, label=VANILLA)
        for number, method in enumerate(methods):
            line = [point for point in own if point.method == method]
            if not line:
                continue
            spreads = [
                [0.0 if point.low is None else max(0.0, point.score - point.low) for point in line],
                [0.0 if point.high is None else max(0.0, point.high - point.score) for point in line],
            ]
            hollow = {"markerfacecolor": "white"} if any(point.provisional for point in line) else {}
            x, y = [point.num_tokens for point in line], [point.score for point in line]
            axes.errorbar(x, y, yerr=spreads, marker="o", capsize=3, color=f"C{number}", label=method, **hollow)
        ticks: list[int] = []
        for tick in sorted({round(point.num_tokens) for point in own if point.method != VANILLA or not methods}):
            ticks += [tick] if not ticks or tick > 1.15 * ticks[-1] else []  # else they overlap
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(f"{task}, {own[0].num_questions} questions", fontsize=10, parse_math=False)
        axes.set_ylabel(own[0].unit)
        axes.grid(alpha=0.3)
    for axes in panels[max(0, len(tasks) - num_columns) : len(tasks)]:
        axes.set_xlabel("visual tokens an image")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        legend_below(figure, list(handles.values()), list(handles), num_columns + 1)
    provisional = any(point.provisional for point in points)
    figure.suptitle(
        f"{model}: score against visual tokens" + (" (provisional)" if provisional else ""), parse_math=False
    )
    return Drawing(figure, [vars(point) for point in points], _caption(points, model, tasks, num_left_out))


def _caption(points: Sequence[Point], model: str, tasks: Sequence[str], num_left_out: int) -> str:
    text = (
        f"Figure 4 of arXiv 2412.04467 from our own records: primary score of {model} on {', '.join(tasks)} against the"
        " visual tokens an image (measured; with a pruner on average over the language model's layers; the middle of"
        " fewest and most where images differ). Bars: 95 % by the score's standard error, of shares Wilson's. Dashed:"
        " the model without compression. A line's name has the settings that are not its option's own; of several that"
        " differ in the seed alone the newest. All on vanilla's questions."
    )
    if any(point.provisional for point in points):
        text += " Hollow markers are provisional: a limited number of questions, or code that is not committed."
    left_out = f" Scores left out, older or of other questions, weights or judges: {num_left_out}."
    return text + (left_out if num_left_out else "")
