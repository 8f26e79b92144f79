"""Puts our own runs beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vzip.results.averages import average_retention
from vzip.results.paired import Paired, compare_task
from vzip.results.record import Run, answers_of, is_comparable, score_of, unit_factor

from .costs import Bench, Cost, cost_of_bench, cost_of_run, cost_of_training
from .paper_tables import AVERAGE, Column, Mismatch, PaperTable, Row

# 95 % of a normal distribution lie within this many standard errors.
NORMAL_95 = 1.96


@dataclass(frozen=True)
class FilledCell:
    """One cell: the paper's number and ours. None where there is nothing.

    Attributes:
        column: which.
        paper, paper_ratio: the paper's value, and its value over its base row's (of a cost: the factor saved).
        reason: why no run here gives this cell.
        mark: where the paper contradicts itself here.
        command: what is typed to get ours; empty where ``reason`` says why there is nothing.
        ours, standard_error: in the column's unit.
        run, vanilla: the records behind ours and behind ``ratio``.
        ratio: ours over our own vanilla run (of a cost: the factor saved).
        paired: what is known of the ratio's uncertainty.
        provisional: why ours is not final.
        machine: what a cost was measured on.
    """

    column: Column
    paper: float | None
    paper_ratio: float | None
    reason: str | None
    mark: Mismatch | None
    command: tuple[str, ...] = ()
    ours: float | None = None
    standard_error: float | None = None
    run: Path | None = None
    vanilla: Path | None = None
    ratio: float | None = None
    paired: Paired | None = None
    provisional: tuple[str, ...] = ()
    machine: str | None = None

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
    table: PaperTable,
    runs: Mapping[str, Sequence[Run]],
    benches: Sequence[Bench] = (),
    trainings: Mapping[str, Path] | None = None,
) -> list[FilledRow]:
    """Fills a table.

    Args:
        table: the paper's.
        runs: for each row's label the evaluations of it.
        benches: from ``find_benches``.
        trainings: for a row's label the directory of the training that it tells of.

    Raises:
        ManifestError: two runs that should be on the same questions are not, a unit that cannot be converted, or a
            measurement that cannot be read.
    """
    found = _Found(table, runs, benches, trainings or {})
    filled = []
    for row in table.rows:
        cells = tuple(_cell(found, row, column) for column in table.columns)
        filled.append(FilledRow(row, cells, _average(table, row, cells)))
    return filled


@dataclass(frozen=True)
class _Found:
    """What there is of ours, by the labels of the rows."""

    table: PaperTable
    runs: Mapping[str, Sequence[Run]]
    benches: Sequence[Bench]
    trainings: Mapping[str, Path]

    def costs(self, row: Row, column: Column) -> list[Cost]:
        """Every measurement of a row's cost, the best last: the newest, and a provisional one before any other."""
        if column.bench is not None:
            return sorted(cost_of_bench(self.benches, row, column), key=lambda cost: not cost.reasons)
        if column.training is not None:
            directory = self.trainings.get(row.label)
            cost = None if directory is None else cost_of_training(directory, column)
            return [] if cost is None else [cost]
        costs = [cost_of_run(run, column) for run in sorted(self.runs.get(row.label, ()), key=_order)]
        return [cost for cost in costs if cost is not None]


def holds(run: Run, column: Column) -> bool:
    """Whether an evaluation has the column's number."""
    return (cost_of_run(run, column) if column.cost is not None else _value(run, column)) is not None


def _cell(found: _Found, row: Row, column: Column) -> FilledCell:
    table = found.table
    reason = table.reason(row, column)
    blank = FilledCell(
        column,
        row.values.get(column.key),
        table.ratio(row, column),
        reason,
        table.mismatch(row, column.key),
        table.command(row, column),
    )
    if reason is not None:
        return blank
    base = table.row(row.base) if row.base not in (None, row.label) else None
    return _cost_cell(found, blank, row, base) if column.is_cost else _score_cell(found, blank, row, base)


def _cost_cell(found: _Found, blank: FilledCell, row: Row, base: Row | None) -> FilledCell:
    costs = found.costs(row, blank.column)
    if not costs:
        return blank
    base_costs = [] if base is None else found.costs(base, blank.column)
    # A pair of one machine, and of one measurement where there is one, tells more than two newest ones of two machines.
    paired = [(ours, b) for ours in costs for b in base_costs if b.comparable(ours)]
    paired.sort(key=lambda pair: pair[0].path == pair[1].path)
    ours, against = paired[-1] if paired else (costs[-1], None)
    filled = replace(blank, ours=ours.value, run=ours.path, provisional=ours.reasons, machine=ours.machine)
    if against is None or not ours.value:
        return filled
    return replace(filled, vanilla=against.path, ratio=against.value / ours.value)


def _score_cell(found: _Found, blank: FilledCell, row: Row, base: Row | None) -> FilledCell:
    column = blank.column
    assert column.task is not None and column.metric is not None
    run = _newest(run for run in found.runs.get(row.label, ()) if holds(run, column))
    if run is None:
        return blank
    value, error = _value(run, column) or (None, None)
    reasons = tuple(run.record.get("provisional_reasons", ()))
    filled = replace(blank, ours=value, standard_error=error, run=run.path, provisional=reasons)
    candidates = () if base is None else found.runs.get(base.label, ())
    base_run = _newest(r for r in candidates if holds(r, column) and is_comparable(r.record, run.record))
    if base_run is None:
        return filled
    answers, base_answers = answers_of(run, column.task), answers_of(base_run, column.task)
    paired = compare_task(run.record, base_run.record, column.task, column.metric, answers, base_answers)
    return replace(filled, vanilla=base_run.path, ratio=None if paired is None else paired.retention, paired=paired)


def _value(run: Run, column: Column) -> tuple[float, float | None] | None:
    """(value, standard error) of a score in the column's unit."""
    if column.task is None or column.metric is None:
        return None
    score = score_of(run.record, column.task, column.metric)
    if score is None:
        return None
    factor = unit_factor(run.record["tasks"][column.task]["unit"], column.unit, f"{run.path}, {column.task}")
    return score.value * factor, None if score.standard_error is None else score.standard_error * factor


def _order(run: Run) -> tuple[bool, str]:
    return not run.record["provisional"], str(run.record.get("created"))


def _newest(runs: Iterable[Run]) -> Run | None:
    """The newest run; one that is not provisional before any that is."""
    return max(runs, key=_order, default=None)


def _average(table: PaperTable, row: Row, cells: Sequence[FilledCell]) -> FilledAverage | None:
    if not table.average_over:
        return None
    used = [(c.column.key, c.paired) for c in cells if c.column.key in table.average_over and c.paired is not None]
    kept = average_retention([paired for _, paired in used]) if used else None
    bounds = (None, None, None) if kept is None else (kept.point, kept.low, kept.high)
    ours, low, high = (None if bound is None else 100 * bound for bound in bounds)
    return FilledAverage(
        row.average,
        table.average(row, [key for key, _ in used]) if used else None,
        ours,
        low,
        high,
        len(used),
        len(table.average_over),
        table.mismatch(row, AVERAGE),
    )
