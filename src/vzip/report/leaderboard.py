"""Methods beside each other at each budget: retention, which differences are more than noise, what each costs.

A folder of results holds ``leaderboard.json``, ``leaderboard.md``, ``pareto.svg``, ``pareto.png`` and each run's record
and answers under ``runs/``, so that another leaderboard of the same model and protocol can take it over.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vzip.analysis.plots import Timed, plot_pareto
from vzip.errors import ManifestError, MissingPackageError
from vzip.report.leaderboard_folder import FILE_NAME, KIND, SCHEMA_VERSION, VANILLA, Entry
from vzip.results.averages import average_retention
from vzip.results.files import make_folder, replace_file, write_json, written_aside
from vzip.results.layout import Layout, Piece, to_markdown
from vzip.results.paired import SIGNIFICANCE, compare_task, match
from vzip.results.record import (
    RECORD_NAME,
    SAMPLES_NAME,
    answers_of,
    primary_scores,
    title_of,
    visual_tokens_of,
)
from vzip.results.stats import difference_p, holm

logger = logging.getLogger(__name__)

TABLE_NAME, PLOTS = "leaderboard.md", ("pareto.svg", "pareto.png")
HEAD = ("method", "budget", "enter", "average", "retention, %", "rank", "select", "prefill", "TTFT", "KV MiB")
MIB = 1024**2


@dataclass(frozen=True)
class Line:
    """An entry in numbers; retention in percent of its own vanilla run.

    Attributes:
        draws: bootstrap values of the retention (not in percent); None where answers were not kept.
        answered: for each question what its own and vanilla's scores are, as a number; None likewise.
        rank: at its budget, 1 is the highest retention.
        best, worst: the ranks that the noise leaves open.
    """

    entry: Entry
    retention: float
    low: float | None
    high: float | None
    draws: NDArray[np.float64] | None
    answered: NDArray[np.int64] | None = None
    rank: int = 0
    best: int = 0
    worst: int = 0


@dataclass(frozen=True)
class Pair:
    """Two methods at a budget: a's retention less b's, in percent, and how likely noise alone makes it."""

    budget: str
    a: str
    b: str
    difference: float
    p_value: float
    corrected: float

    @property
    def outside_noise(self) -> bool:
        return self.corrected < SIGNIFICANCE


def compare(entries: Sequence[Entry]) -> tuple[list[Line], list[Pair]]:
    """Every entry against the vanilla run of its origin, ranked at each budget; every two of a budget."""
    vanilla = {entry.origin: entry for entry in entries if entry.method == VANILLA}
    lines = [_line(entry, vanilla[entry.origin]) for entry in entries]
    ranked, pairs = [], []
    for budget in dict.fromkeys(line.entry.budget for line in lines):
        of_budget = [line for line in lines if line.entry.budget == budget]
        if of_budget[0].entry.method == VANILLA:
            ranked += of_budget
            continue
        of_budget.sort(key=lambda line: -line.retention)
        own = _pairs(budget, of_budget)
        pairs += own
        for line in of_budget:
            name = line.entry.name
            rank = 1 + sum(other.retention > line.retention + 1e-9 for other in of_budget)  # equal ones share it
            better = sum(pair.outside_noise and pair.b == name for pair in own)
            worse = sum(pair.outside_noise and pair.a == name for pair in own)
            ranked.append(replace(line, rank=rank, best=1 + better, worst=len(of_budget) - worse))
    return ranked, pairs


def _line(entry: Entry, vanilla: Entry) -> Line:
    found, answered = [], []
    for task in primary_scores(entry.run.record):
        metric = entry.run.record["tasks"][task]["primary_metric"]
        rows = answers_of(entry.run, task), answers_of(vanilla.run, task)
        found.append(compare_task(entry.run.record, vanilla.run.record, task, metric, *rows))
        if rows[0] is not None and rows[1] is not None:
            pairs = zip(*match(rows[0], rows[1], task), strict=True)
            answered += [hash(repr((own["scores"], theirs["scores"]))) for own, theirs in pairs]
    tasks = [task for task in found if task is not None]  # None: vanilla scored 0, so there is no ratio to it
    if not tasks:
        raise ManifestError(f"{vanilla.run.path}: vanilla scored 0 everywhere, so there is no retention. Ask more.")
    share = average_retention(tasks)
    low, high = (None if bound is None else 100 * bound for bound in (share.low, share.high))
    draws = [task.resampled for task in tasks if task.resampled is not None and task.is_paired]
    own = np.mean(draws, axis=0) if len(draws) == len(tasks) else None
    return Line(entry, 100 * share.point, low, high, own, np.array(answered))


def _pairs(budget: str, lines: Sequence[Line]) -> list[Pair]:
    """Of lines in the order of their ranks; the same questions are drawn for all, so their draws are paired."""
    couples = [(a, b) for a, b in itertools.combinations(lines, 2) if a.draws is not None and b.draws is not None]
    p_values = [
        difference_p((a.retention - b.retention) / 100, a.draws - b.draws, int((a.answered != b.answered).sum()))  # type: ignore[operator, union-attr]
        for a, b in couples
    ]
    return [
        Pair(budget, a.entry.name, b.entry.name, a.retention - b.retention, p, corrected)
        for (a, b), p, corrected in zip(couples, p_values, holm(p_values), strict=True)
    ]


def lay_out(
    lines: Sequence[Line], pairs: Sequence[Pair], missing: Sequence[tuple[str, str, str]], said: Sequence[str]
) -> Layout:
    """A block of vanilla, then one a budget, the highest retention first.

    Args:
        lines, pairs: from ``compare``.
        missing: method, budget and reason of what could not be run.
        said: further remarks.
    """
    ours = next(line for line in lines if line.entry.method == VANILLA and not line.entry.origin)
    machine = ours.entry.machine
    blocks: dict[str, list[tuple[Piece, ...]]] = {}
    for line in lines:
        blocks.setdefault(line.entry.budget, []).append(_cells(line, machine))
    for method, budget, _ in missing:
        blank = (
            *map(Piece, (method, budget.removesuffix("tok"), "", "", "not possible")),
            *[Piece()] * (len(HEAD) - 5),
        )
        blocks.setdefault(budget, []).append(blank)
    order = sorted(blocks, key=lambda name: -int(name.removesuffix("tok")) if name.endswith("tok") else -(10**9))
    reasons: dict[tuple[str, str], list[str]] = {}
    for method, budget, reason in missing:
        plain = re.sub(rf"budget={budget.removesuffix('tok')}(tok)?\b", "budget=...", reason).splitlines()[0]
        reasons.setdefault((method, plain), []).append(budget.removesuffix("tok"))
    remarks = [f"{method} at {', '.join(at)}: {reason}" for (method, reason), at in reasons.items()]
    record = ours.entry.run.record
    title = f"{title_of(record).partition(', ')[0]} on {', '.join(record['tasks'])}; {num_questions(record)} questions"
    limit = record.get("limit")
    return Layout(
        title + (f" (PROVISIONAL: the first {limit} of each benchmark)" if limit else ""),
        HEAD,
        tuple(tuple(blocks[name]) for name in order),
        (*remarks, *_explanations(lines, pairs, machine), *said),
        left=frozenset({0}),
    )


def num_questions(record: Mapping[str, Any]) -> int:
    return sum(task["num_samples"] for task in record["tasks"].values())


def _cells(line: Line, machine: str) -> tuple[Piece, ...]:
    entry = line.entry
    tokens, cost = entry.run.record["visual_tokens"], entry.cost or {}
    mark = "†" if cost and entry.machine != machine else ""
    ms = cost.get("median_ms", {})
    is_vanilla = entry.method == VANILLA
    interval = "" if is_vanilla or line.low is None else f" [{line.low:.1f}, {line.high:.1f}]"
    rank = f"{line.rank}" if line.best == line.worst else f"{line.rank} ({line.best}-{line.worst})"
    select = "" if "selection" not in ms or is_vanilla else f"{ms['selection']:.2f}{mark}"
    texts = [
        f"{entry.name} ‡" if entry.text_aware else entry.name,
        entry.budget.removesuffix("tok"),
        _range(tokens["measured_min"], tokens["measured_max"]),
        _range(*visual_tokens_of(entry.run.record)),
        f"{line.retention:.1f}{interval}",
        "" if is_vanilla else rank,
        "in prefill" if entry.run.record.get("pruner") and ms else select,
        *(f"{ms[stage]:.1f}{mark}" if stage in ms else "" for stage in ("prefill", "time_to_first_token")),
        f"{cost['kv_cache_bytes'] / MIB:.2f}" if cost else "",
    ]
    return tuple(Piece(text, bold=line.rank == 1 and number == 0) for number, text in enumerate(texts))


def _range(fewest: float | None, most: float | None) -> str:
    if fewest is None or most is None:
        return ""
    return f"{fewest:g}" if fewest == most else f"{fewest:g}-{most:g}"


def _explanations(lines: Sequence[Line], pairs: Sequence[Pair], machine: str) -> Iterator[str]:
    yield (
        "enter: visual tokens of an image that enter the language model; average: attended to, on average over its"
        " layers, measured"
    )
    yield (
        "retention: mean over the benchmarks of score / our own vanilla run's score, with a 95 % interval (paired"
        " bootstrap); rank, with the ranks that the noise leaves open: every two methods of a budget are tested on the"
        f" same questions, Holm-corrected at {SIGNIFICANCE:.0%}"
    )
    for budget in dict.fromkeys(pair.budget for pair in pairs):
        own = [pair for pair in pairs if pair.budget == budget]
        outside = sum(pair.outside_noise for pair in own)
        floor = [pair for pair in own if "random" in (pair.a, pair.b)]
        above = [pair.a for pair in floor if pair.b == "random" and pair.outside_noise]
        yield (
            f"{budget}: {outside} of {len(own)} differences are outside the noise; above random beyond it:"
            f" {', '.join(above) or 'none'}"
        )
    if any(line.entry.cost for line in lines):
        yield (
            f"select, prefill, TTFT (pixels on the device to the first token): medians in ms, one prompt of one image,"
            f" methods in turns; KV: of that prompt, allocated; {machine}"
        )
    if any(line.entry.text_aware for line in lines):
        yield "‡: text-aware, what it keeps depends on the question; the time to read it is in TTFT, not in select"
    load = max((line.entry.cost.get("load_average", 0) for line in lines if line.entry.cost), default=0)
    if load > 1.5 * (os.cpu_count() or 1):
        yield f"the machine was busy (load average {load:.0f}): times are longer than on an idle one, and less certain"
    for other in dict.fromkeys(line.entry.machine for line in lines if line.entry.cost):
        if other != machine:
            yield f"†: measured on {other}, not comparable with the others"
    if any(line.entry.run.record["provisional"] for line in lines):
        reasons = dict.fromkeys(r for line in lines for r in line.entry.run.record["provisional_reasons"])
        yield f"provisional: {'; '.join(reasons)}"


def timed(lines: Sequence[Line], floors: Sequence[str]) -> tuple[list[Timed], float | None]:
    """The points of the plot, of the machine that vanilla was measured on, and vanilla's own time."""
    ours = next(line for line in lines if line.entry.method == VANILLA and not line.entry.origin)
    if not ours.entry.cost:
        return [], None
    points = []
    for line in lines:
        entry = line.entry
        if entry.method == VANILLA or not entry.cost or entry.machine != ours.entry.machine:
            continue
        low, high = (line.retention if bound is None else bound for bound in (line.low, line.high))
        ms = entry.cost["median_ms"]["time_to_first_token"]
        budget = entry.budget.removesuffix("tok")
        points.append(Timed(entry.name, budget, ms, line.retention, low, high, entry.method in floors))
    return points, ours.entry.cost["median_ms"]["time_to_first_token"]


def write(
    folder: Path,
    lines: Sequence[Line],
    pairs: Sequence[Pair],
    missing: Sequence[tuple[str, str, str]],
    layout: Layout,
    floors: Sequence[str],
    command: str,
) -> list[str]:
    """Writes all files of a folder of results; returns their names."""
    make_folder(folder)
    for line in lines:
        place = folder / line.entry.folder
        make_folder(place)
        for name in (RECORD_NAME, SAMPLES_NAME):
            source = line.entry.run.path.with_name(name)
            if source.is_file() and source.resolve() != (place / name).resolve():
                replace_file(place / name, source.read_bytes())
    points, vanilla_ms = timed(lines, floors)
    names = [FILE_NAME, TABLE_NAME]
    if points and vanilla_ms is not None:
        try:
            _plot(folder, points, vanilla_ms, plot_title(lines[0].entry.run.record))
            names += PLOTS
        except MissingPackageError as error:
            logger.warning("no plot: %s", error)
    image = f"\n![retention against time]({PLOTS[0]})\n" if PLOTS[0] in names else ""
    replace_file(folder / TABLE_NAME, f"# Leaderboard\n\n```bash\n{command}\n```\n\n{to_markdown(layout)}{image}")
    table = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "title": layout.title,
        "command": command,
        "entries": [_entry(line) for line in lines],
        "not_possible": [dict(zip(("method", "budget", "reason"), row, strict=True)) for row in missing],
        "pairs": [vars(pair) | {"outside_noise": pair.outside_noise} for pair in pairs],
        "remarks": list(layout.remarks),
    }
    write_json(folder / FILE_NAME, table)  # last: it says that all of it is there
    return names


def plot_title(record: Mapping[str, Any]) -> str:
    limited = " (provisional)" if record["provisional"] else ""
    return f"{title_of(record).partition(', ')[0]}, {num_questions(record)} questions{limited}"


def _plot(folder: Path, points: Sequence[Timed], vanilla_ms: float, title: str) -> None:
    with written_aside(folder / PLOTS[0]) as svg, written_aside(folder / PLOTS[1]) as png:
        plot_pareto(points, vanilla_ms, [svg, png], title)


def _entry(line: Line) -> dict[str, Any]:
    entry, record = line.entry, line.entry.run.record
    least, most = visual_tokens_of(record)
    return {
        "method": entry.method,
        "budget": entry.budget,
        "origin": entry.origin,
        "text_aware": entry.text_aware,
        "run": entry.folder,
        "num_entering": [record["visual_tokens"]["measured_min"], record["visual_tokens"]["measured_max"]],
        "average_over_layers": [least, most],
        "scores": {task: score.value for task, score in primary_scores(record).items()},
        "retention_percent": line.retention,
        "interval_percent": [line.low, line.high],
        "rank": line.rank or None,
        "rank_interval": [line.best, line.worst] if line.rank else None,
        "cost": entry.cost,
        "machine": entry.machine,
        "provisional": record["provisional"],
    }
