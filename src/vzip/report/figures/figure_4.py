"""Figure 4: accuracy against visual tokens, a panel a benchmark, a line a method; from the records of finished runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vzip.results.record import Run, is_vanilla, method_of, primary_scores, visual_tokens_of

from .drawing import Drawing


@dataclass(frozen=True)
class Point:
    """A run on a benchmark; ``low`` and ``high`` are two standard errors' 95 % interval, None without one."""

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


def points_of(runs: Sequence[Run], tasks: Sequence[str]) -> tuple[list[Point], int]:
    """The newest run of each method and number of tokens on each task, all on the same questions, those of the newest.

    Returns:
        The points, vanilla first, and how many scores were left out: of other questions, or older.
    """
    newest_first = sorted(runs, key=lambda run: str(run.record.get("created")), reverse=True)
    points: list[Point] = []
    num_left_out = 0
    for task in tasks:
        having = [run for run in newest_first if task in primary_scores(run.record)]
        # Vanilla's questions, since every line is read against it.
        of_questions = [_questions(run, task) for run in sorted(having, key=lambda run: not is_vanilla(run.record))]
        same = [run for run in having if _questions(run, task) == of_questions[0]]
        found: dict[tuple[str, float], Point] = {}
        for run in same:
            point = _point(run, task)
            if point is not None:
                found.setdefault((point.method, point.num_tokens), point)
        num_left_out += len(having) - len(found)
        points += sorted(found.values(), key=lambda point: (point.method != "vanilla", point.method, point.num_tokens))
    return points, num_left_out


def _questions(run: Run, task: str) -> object:
    return (run.record.get("data") or {}).get(task, {}).get("questions_sha256")


def _point(run: Run, task: str) -> Point | None:
    fewest, most = visual_tokens_of(run.record)
    if fewest is None or most is None:
        return None
    score, entry = primary_scores(run.record)[task], run.record["tasks"][task]
    factor = 100.0 if entry["unit"] == "fraction" else 1.0
    spread = None if score.standard_error is None or math.isnan(score.standard_error) else 1.96 * score.standard_error
    return Point(
        task,
        _method(run),
        (fewest + most) / 2,
        factor * score.value,
        None if spread is None else factor * (score.value - spread),
        None if spread is None else factor * (score.value + spread),
        "percent" if entry["unit"] == "fraction" else str(entry["unit"]),
        score.num_samples,
        bool(run.record["provisional"]),
        str(run.path),
    )


def _method(run: Run) -> str:
    if is_vanilla(run.record):
        return "vanilla"
    tuned = ", tuned" if ((run.record.get("config") or {}).get("model") or {}).get("projector") else ""
    return method_of(run.record).removeprefix("Identity+") + tuned


def draw(points: Sequence[Point], model: str, num_left_out: int = 0) -> Drawing:
    """A panel a task; hollow markers are provisional, the dashed line is vanilla."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    tasks = list(dict.fromkeys(point.task for point in points))
    methods = [m for m in dict.fromkeys(point.method for point in points) if m != "vanilla"]
    num_columns = min(3, len(tasks)) if len(tasks) != 4 else 2
    num_rows = math.ceil(len(tasks) / num_columns)
    figure = Figure(figsize=(1 + 3.6 * num_columns, 0.9 + 2.9 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(panels, tasks, strict=False):
        own = [point for point in points if point.task == task]
        for point in own:
            if point.method == "vanilla":
                axes.axhline(point.score, color="0.4", linestyle="--", linewidth=1, zorder=0, label="vanilla")
        for number, method in enumerate(methods):
            line = [point for point in own if point.method == method]
            if not line:
                continue
            spreads = [0.0 if point.high is None else point.high - point.score for point in line]
            hollow = {"markerfacecolor": "white"} if any(point.provisional for point in line) else {}
            x, y = [point.num_tokens for point in line], [point.score for point in line]
            axes.errorbar(x, y, yerr=spreads, marker="o", capsize=3, color=f"C{number}", label=method, **hollow)
        ticks: list[int] = []
        for tick in sorted({round(point.num_tokens) for point in own if point.method != "vanilla" or not methods}):
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
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=num_columns + 1, frameon=False
        )
    provisional = any(point.provisional for point in points)
    figure.suptitle(
        f"{model}: score against visual tokens" + (" (provisional)" if provisional else ""), parse_math=False
    )
    return Drawing(figure, [vars(point) for point in points], _caption(points, model, tasks, num_left_out))


def _caption(points: Sequence[Point], model: str, tasks: Sequence[str], num_left_out: int) -> str:
    text = (
        f"Figure 4 of arXiv 2412.04467 from our own records: primary score of {model} on {', '.join(tasks)} against the"
        " visual tokens an image (measured; with a pruner on average over the language model's layers; the middle of"
        " fewest and most where images differ). Bars: 95 %, 1.96 standard errors of the score. Dashed: the model"
        " without compression. Of several runs of a method with as many tokens the newest; all on vanilla's questions."
    )
    if any(point.provisional for point in points):
        text += " Hollow markers are provisional: a limited number of questions, or code that is not committed."
    return text + (f" Scores left out, older or on other questions: {num_left_out}." if num_left_out else "")
