"""The runs of a sweep beside each other: scores, retention against the sweep's own vanilla run, and the plot of it."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vzip.analysis.plots import Point, plot_retention
from vzip.errors import ManifestError
from vzip.results.averages import average_retention
from vzip.results.files import replace_file, written_aside
from vzip.results.layout import Layout, Piece, to_markdown
from vzip.results.paired import Paired, compare_task
from vzip.results.record import (
    Run,
    Score,
    answers_of,
    is_vanilla,
    is_vanilla_of,
    method_of,
    primary_scores,
    runs_beside,
    unit_factor,
    visual_tokens_of,
)

FILES = ("summary.md", "summary.csv", "retention.png")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        number: as the launcher counts.
        words: what it was given that not every job was.
        run: its record; None if it failed.
        error: why it failed, or None.
    """

    number: int
    words: tuple[str, ...]
    run: Run | None
    error: str | None = None

    @property
    def method(self) -> str:
        """What tells its line of the plot from others: its words but those of the budget, or else its compressor."""
        words = [word for word in self.words if not word.lstrip("+").startswith("budget")]
        if words or self.run is None:
            return " ".join(words)
        return method_of(self.run.record)


@dataclass(frozen=True)
class Line:
    """A finished job in numbers; retention in percent, None where the sweep has no vanilla run for it.

    Attributes:
        job: which; it has a run.
        scores: primary score of each task, in the task's own unit.
        average: see ``average_score``.
        retention: mean over the tasks of score / vanilla score.
        low, high: its 95 % interval, from a paired bootstrap; None where it cannot be had.
        remark: why there is no retention although there is a vanilla run, or None.
    """

    job: Job
    scores: Mapping[str, Score]
    average: float | None
    retention: float | None = None
    low: float | None = None
    high: float | None = None
    remark: str | None = None

    @property
    def run(self) -> Run:
        assert self.job.run is not None
        return self.job.run

    @property
    def visual_tokens(self) -> tuple[float | None, float | None]:
        """Fewest and most visual tokens of an image, measured; with a pruner, on average over the layers."""
        return visual_tokens_of(self.run.record)


def average_score(record: Mapping[str, Any]) -> float | None:
    """Mean over the tasks of the primary score: shares in percent, points as they are; None where the two are mixed.

    Scores without a known unit count as what the others are.
    """
    units = {record["tasks"][task]["unit"] for task in primary_scores(record)} - {None}
    if not primary_scores(record) or ("points" in units and len(units) > 1):
        return None
    wanted = "points" if "points" in units else "percent"
    scaled = [
        score.value * (unit_factor(record["tasks"][task]["unit"], wanted, task) if units else 1.0)
        for task, score in primary_scores(record).items()
    ]
    return float(np.mean(scaled))


def summarise(jobs: Sequence[Job]) -> list[Line]:
    """The finished jobs in their order, each against a vanilla run of its model, of theirs or of their runs tree."""
    runs = [job.run for job in jobs if job.run is not None]
    return [_line(job, job.run, runs) for job in jobs if job.run is not None]


def _line(job: Job, run: Run, runs: Sequence[Run]) -> Line:
    scores, average = primary_scores(run.record), average_score(run.record)
    near = itertools.chain(runs, reversed(runs_beside(run)))
    vanilla = next((other for other in near if is_vanilla_of(other.record, run.record)), None)
    if vanilla is None:
        return Line(job, scores, average, remark="no vanilla run of its model and questions under the runs folder")
    try:
        found = [_paired(run, vanilla, task) for task in scores if task in vanilla.record["tasks"]]
    except ManifestError as error:
        return Line(job, scores, average, remark=str(error))
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        return Line(job, scores, average, remark="the vanilla run scored 0 everywhere, so there is no ratio to it")
    kept = average_retention(pairs)
    low, high = (None if bound is None else 100 * bound for bound in (kept.low, kept.high))
    return Line(job, scores, average, 100 * kept.point, low, high)


def _paired(run: Run, vanilla: Run, task: str) -> Paired | None:
    metric = run.record["tasks"][task]["primary_metric"]
    return compare_task(run.record, vanilla.record, task, metric, answers_of(run, task), answers_of(vanilla, task))


def lay_out_sweep(jobs: Sequence[Job], lines: Sequence[Line]) -> Layout:
    """One line a job in the order of the jobs; failed ones without numbers."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.scores))
    head = ("job", "words", "tokens", *tasks, "average", "retention", "95 %", "s")
    of_job = {line.job.number: line for line in lines}
    rows = []
    for job in jobs:
        line = of_job.get(job.number)
        cells = ["failed" if job.error is not None else ""] if line is None else _cells(line, tasks)
        texts = [str(job.number), " ".join(job.words), *cells]
        rows.append(tuple(Piece(text) for text in [*texts, *[""] * (len(head) - len(texts))]))
    remarks = [
        f"score: each benchmark's primary metric in its own unit; average: {_unit_words(lines)}",
        "retention: mean over the benchmarks of score / score of the vanilla run (budget=full), in percent",
    ]
    if any(line.run.record["provisional"] for line in lines):
        remarks.append("*: provisional; the record says why")
    reasons = dict.fromkeys(line.remark for line in lines if line.remark is not None)
    remarks += [f"no retention of jobs {_numbers(lines, reason)}: {reason}" for reason in reasons]
    return Layout(f"{len(jobs)} jobs", head, (tuple(rows),), tuple(remarks), left=frozenset({1}))


def _unit_words(lines: Sequence[Line]) -> str:
    """In what the averages are, as ``average_score`` takes them."""
    units = {entry["unit"] for line in lines for entry in line.run.record["tasks"].values()}
    if units <= {None}:
        return "in the benchmarks' own unit, which the records do not name"
    if "points" in units:
        return "in points" if units <= {"points", None} else "in points, none where shares and points are mixed"
    return "in percent"


def _numbers(lines: Sequence[Line], remark: str) -> str:
    return ", ".join(str(line.job.number) for line in lines if line.remark == remark)


def _cells(line: Line, tasks: Sequence[str]) -> list[str]:
    fewest, most = line.visual_tokens
    mark = "*" if line.run.record["provisional"] else ""
    return [
        "" if fewest is None else f"{fewest}" if fewest == most else f"{fewest} to {most}",
        *(f"{line.scores[task].value:.4g}{mark}" if task in line.scores else "" for task in tasks),
        "" if line.average is None else f"{line.average:.2f}{mark}",
        "" if line.retention is None else f"{line.retention:.1f}{mark}",
        "" if line.low is None else f"{line.low:.1f} to {line.high:.1f}",
        f"{line.run.record['wall_time_s']:.0f}",
    ]


def to_csv(jobs: Sequence[Job], lines: Sequence[Line]) -> str:
    """Everything known of each job, one line a job and task; one without a task for a failed job."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head: tuple[str, ...] = (
        "job",
        "words",
        "error",
        "tokens_min",
        "tokens_max",
        "task",
        "metric",
        "unit",
        "score",
        "standard_error",
    )
    head += ("questions", "average", "retention_percent", "low", "high", "wall_time_s", "provisional", "run")
    writer.writerow(head)
    of_job = {line.job.number: line for line in lines}
    for job in jobs:
        line = of_job.get(job.number)
        own = [job.number, " ".join(job.words), job.error]
        if line is None:
            writer.writerow([*own, *[""] * (len(head) - len(own))])
            continue
        record = line.run.record
        rest = [line.average, line.retention, line.low, line.high, record["wall_time_s"], record["provisional"]]
        for task, score in line.scores.items():
            entry = record["tasks"][task]
            scored = [task, entry["primary_metric"], entry["unit"], score.value, score.standard_error]
            writer.writerow([*own, *line.visual_tokens, *scored, score.num_samples, *rest, line.run.path])
    return text.getvalue()


def write_summary(jobs: Sequence[Job], lines: Sequence[Line], folder: Path) -> list[str]:
    """Writes ``summary.md``, ``summary.csv`` and, where there is retention to show, ``retention.png``.

    Returns:
        the names of the files written.
    """
    replace_file(folder / FILES[0], to_markdown(lay_out_sweep(jobs, lines)))
    replace_file(folder / FILES[1], to_csv(jobs, lines))
    points = plot_points(lines)
    if not points:
        return list(FILES[:2])
    with written_aside(folder / FILES[2]) as aside:
        plot_retention(points, aside, "Retention against visual tokens")
    return list(FILES)


def plot_points(lines: Sequence[Line]) -> list[Point]:
    """A point for each compressed run that has a retention; vanilla is the plot's line at 100."""
    points = []
    for line in lines:
        most = line.visual_tokens[1]
        if line.retention is None or most is None or is_vanilla(line.run.record):
            continue
        low = line.retention if line.low is None else line.low
        high = line.retention if line.high is None else line.high
        points.append(Point(line.job.method, most, line.retention, low, high, line.run.record["provisional"]))
    return points
