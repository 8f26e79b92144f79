"""Puts our own runs beside the paper's numbers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .paired import Paired, compare_task
from .paper_tables import AVERAGE, Column, Mismatch, PaperTable, Row
from .record import Run, answers_of, is_vanilla_of, score_of, unit_factor
from .stats import percentile_interval

# 95 % of a normal distribution lie within this many standard errors.
NORMAL_95 = 1.96
MIB_PER_GIB = 1024


@dataclass(frozen=True)
class FilledCell:
    """One cell: the paper's number and ours. None where there is nothing.

    Attributes:
        column: which.
        paper, paper_ratio: the paper's value, and its value over its base row's (of a cost: the factor saved).
        reason: why no run here gives this cell.
        mark: where the paper contradicts itself here.
        ours, standard_error: in the column's unit.
        run, vanilla: the records behind ours and behind ``ratio``.
        ratio: ours over our own vanilla run (of a cost: the factor saved).
        paired: what is known of the ratio's uncertainty.
        provisional: why ours is not final.
    """

    column: Column
    paper: float | None
    paper_ratio: float | None
    reason: str | None
    mark: Mismatch | None
    ours: float | None = None
    standard_error: float | None = None
    run: Path | None = None
    vanilla: Path | None = None
    ratio: float | None = None
    paired: Paired | None = None
    provisional: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """Ours - the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper

    @property
    def difference_outside_noise(self) -> bool:
        """Whether the difference is more than ours may be off by chance, and the paper's by rounding.

        False where our error is not known.
        """
        if self.difference is None or self.paper is None or self.standard_error is None:
            return False
        # The paper prints whole points of MME and one digit of everything else.
        rounding = 0.5 if self.column.unit == "points" and self.paper == int(self.paper) else 0.05
        return abs(self.difference) > NORMAL_95 * self.standard_error + rounding

    @property
    def ratio_outside_noise(self) -> bool:
        return self.paired is not None and self.paired.outside_noise


@dataclass(frozen=True)
class FilledAverage:
    """A row's average retention in percent.

    Attributes:
        paper: as printed.
        paper_same: the paper's numbers over the columns that ours has, by the paper's rule.
        ours, low, high: ours over those columns, with its 95 % interval.
        num, of: how many columns that is, and how many the paper's average has.
        mark: where the paper contradicts itself.
    """

    paper: float | None
    paper_same: float | None
    ours: float | None
    low: float | None
    high: float | None
    num: int
    of: int
    mark: Mismatch | None

    @property
    def outside_noise(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 100 <= self.high


@dataclass(frozen=True)
class FilledRow:
    """A row with its cells in the table's order."""

    row: Row
    cells: tuple[FilledCell, ...]
    average: FilledAverage | None = field(default=None)


def fill(
    table: PaperTable, runs: Mapping[str, Sequence[Run]], benches: Sequence[Mapping[str, Any]] = ()
) -> list[FilledRow]:
    """Fills a table.

    Args:
        table: the paper's.
        runs: for each row's label the runs of it.
        benches: contents of ``bench.json`` files.

    Raises:
        ManifestError: two runs that should be on the same questions are not, or a unit that cannot be converted.
    """
    filled = []
    for row in table.rows:
        base_runs = runs.get(row.base, ()) if row.base not in (None, row.label) else ()
        cells = tuple(
            _cell(table, row, column, runs.get(row.label, ()), base_runs, benches) for column in table.columns
        )
        filled.append(FilledRow(row, cells, _average(table, row, cells)))
    return filled


def find_benches(folder: Path) -> list[dict[str, Any]]:
    """Every ``bench.json`` below a runs folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("bench/**/bench.json"))]


def holds(run: Run, column: Column) -> bool:
    """Whether a run has the column's number."""
    return _value(run, column) is not None


def _cell(
    table: PaperTable,
    row: Row,
    column: Column,
    runs: Iterable[Run],
    base_runs: Iterable[Run],
    benches: Sequence[Mapping[str, Any]],
) -> FilledCell:
    blank = (column, row.values.get(column.key), table.ratio(row, column), table.reason(row, column))
    mark = table.mismatch(row, column.key)
    if column.bench is not None:
        ours, base = (_bench(benches, table, label, column.bench) for label in (row.label, row.base))
        ratio = base / ours if ours and base and row.base != row.label else None
        return FilledCell(*blank, mark, ours, ratio=ratio)
    run = _newest(run for run in runs if holds(run, column))
    if blank[3] is not None or run is None:
        return FilledCell(*blank, mark)
    value, error = _value(run, column) or (None, None)
    base_run = _newest(r for r in base_runs if holds(r, column) and is_vanilla_of(r.record, run.record))
    reasons = tuple(run.record.get("provisional_reasons", ()))
    if base_run is None or value is None:
        return FilledCell(*blank, mark, value, error, run.path, provisional=reasons)
    if column.is_cost:
        base_value = (_value(base_run, column) or (0.0, None))[0]
        return FilledCell(*blank, mark, value, error, run.path, base_run.path, base_value / value, None, reasons)
    assert column.task is not None and column.metric is not None
    paired = compare_task(
        run.record,
        base_run.record,
        column.task,
        column.metric,
        answers_of(run, column.task),
        answers_of(base_run, column.task),
    )
    ratio = None if paired is None else paired.retention
    return FilledCell(*blank, mark, value, error, run.path, base_run.path, ratio, paired, reasons)


def _value(run: Run, column: Column) -> tuple[float, float | None] | None:
    """(value, standard error) in the column's unit."""
    if column.cost is not None:
        return _cost(run, column)
    if column.task is None or column.metric is None:
        return None
    score = score_of(run.record, column.task, column.metric)
    if score is None:
        return None
    factor = unit_factor(run.record["tasks"][column.task]["unit"], column.unit, f"{run.path}, {column.task}")
    return score.value * factor, None if score.standard_error is None else score.standard_error * factor


def _cost(run: Run, column: Column) -> tuple[float, None] | None:
    if column.task is not None and list(run.record["tasks"]) != [column.task]:
        return None  # the time of several benchmarks is not the time of one
    if column.cost == "wall_time_s" and run.record.get("num_resumed_answers"):
        return None  # answers taken over from an interrupted run took no time in this one
    value: Any = run.record
    for name in (column.cost or "").split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if value is None:
        return None
    return (value * MIB_PER_GIB if column.unit == "MB" else value), None


def _bench(benches: Sequence[Mapping[str, Any]], table: PaperTable, label: str | None, stage: str) -> float | None:
    """The stage's median in ms, of the row's model and number of tokens; the last measurement found counts."""
    row = None if label is None else table.row(label)
    if row is None or row.bench is None:
        return None
    method = "vanilla" if row.method.startswith("vanilla") else "vzip"
    found = None
    for bench in benches:
        entry = bench["methods"].get(method) if bench["model"] == row.bench else None
        if entry is not None and entry["num_visual_tokens"] == row.tokens and stage in entry["stages"]:
            found = float(entry["stages"][stage]["median_ms"])
    return found


def _newest(runs: Iterable[Run]) -> Run | None:
    """The newest run; one that is not provisional before any that is."""
    return max(runs, key=lambda run: (not run.record["provisional"], str(run.record.get("created"))), default=None)


def _average(table: PaperTable, row: Row, cells: Sequence[FilledCell]) -> FilledAverage | None:
    if not table.average_over:
        return None
    used = [c for c in cells if c.column.key in table.average_over and c.ratio is not None]
    ours = low = high = None
    if used:
        ours = 100 * float(np.mean([c.ratio for c in used]))
        draws = [c.paired.resampled for c in used if c.paired is not None and c.paired.resampled is not None]
        if len(draws) == len(used):
            low, high = (100 * bound for bound in percentile_interval(np.mean(draws, axis=0)))
    return FilledAverage(
        row.average,
        table.average(row, [c.column.key for c in used]) if used else None,
        ours,
        low,
        high,
        len(used),
        len(table.average_over),
        table.mismatch(row, AVERAGE),
    )
