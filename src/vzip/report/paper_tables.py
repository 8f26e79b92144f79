"""What a table of the paper is; ``table_files`` reads them.

Every cell says what it is (``PaperTable.cells``): method, tokens, benchmark, value, unit, source, and the command that
produces it, or why none here can.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from vzip.installed import program

AVERAGE = "average"  # stands for the average where a column is named
# Shares of 100 and of 1, and a benchmark's own scale.
SCORE_UNITS = ("percent", "fraction", "points")
# Units in which less is better; their ratio is a factor saved, not a retention.
COST_UNITS = ("s", "ms", "h", "MB")


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        key, title: its name here and in the paper.
        unit: one of ``SCORE_UNITS`` or ``COST_UNITS``.
        task, metric: lmms-eval's names of what produces it; of a cost, the one task that the run must consist of.
        cost: the field of a record that holds a cost, with a dot between nested names.
        bench: the stage of ``python -m vzip bench`` that holds it.
        training: what of a training holds it: "hours", or "memory_gib" of one GPU.
        none: why nothing here produces it.
        protocol: how the paper's number was made, and what differs here.
    """

    key: str
    title: str
    unit: str
    task: str | None = None
    metric: str | None = None
    cost: str | None = None
    bench: str | None = None
    training: str | None = None
    none: str | None = None
    protocol: str | None = None

    @property
    def is_cost(self) -> bool:
        return self.unit in COST_UNITS


@dataclass(frozen=True)
class Row:
    """A method at a number of tokens.

    Attributes:
        tokens: visual tokens, as the paper counts them.
        method: "vanilla", "VisionZip", "VisionZip‡" (tuned), or a rival.
        run: the overrides for eval.py; empty for a rival.
        none: why there are none; None where there are some.
        values: the paper's numbers by column; a number that the paper does not give is absent.
        average: the paper's printed average retention in percent, or None.
        printed_ratio: the paper's printed percentages (or factors, of costs) beside the values, by column.
        base: label of the row that retention is taken against, or None.
        bench: the overrides for ``python -m vzip bench`` that measure it; empty where no column asks for that.
        train: the overrides of each call of train.py that the row tells of, in order; empty likewise. ``{before}``
            stands for the tuned weights of the call before.
        tolerance: by column the largest difference that counts as reproduced; absent: not judged.
        values_of: the table that the values are taken from, or None.
    """

    tokens: int
    method: str
    run: tuple[str, ...]
    none: str | None
    values: Mapping[str, float]
    average: float | None
    printed_ratio: Mapping[str, float]
    base: str | None
    bench: tuple[str, ...] = ()
    train: tuple[tuple[str, ...], ...] = ()
    tolerance: Mapping[str, float] = field(default_factory=dict)
    values_of: str | None = None

    @property
    def label(self) -> str:
        return f"{self.tokens}, {self.method}"


@dataclass(frozen=True)
class Mismatch:
    """Where the paper contradicts itself. It is marked and left as printed.

    Attributes:
        row, column: where.
        note: what disagrees with what.
        recomputed: of an average: what its rule gives.
        elsewhere: table, row and column that print another number for the same, or None.
    """

    row: str
    column: str
    note: str
    recomputed: float | None = None
    elsewhere: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Rerun:
    """What others measured when they ran a row's method themselves.

    Attributes:
        row: label of the row.
        source: who, where.
        values: their numbers by column, in the columns' units.
    """

    row: str
    source: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Cell:
    """One number of the paper and where it comes from; ``command`` is empty where ``reason`` says why."""

    table: str
    method: str
    tokens: int
    benchmark: str
    value: float | None
    unit: str
    source: str
    command: tuple[str, ...]
    reason: str | None


@dataclass(frozen=True)
class PaperTable:
    """A table in the paper's layout; ``average_over`` is empty where it has no average."""

    name: str
    title: str
    source: str
    columns: tuple[Column, ...]
    average_over: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    mismatches: tuple[Mismatch, ...] = field(default=())
    reruns: tuple[Rerun, ...] = field(default=())

    def row(self, label: str) -> Row:
        """The row of a label, ``"64, VisionZip"``."""
        return next(row for row in self.rows if row.label == label)

    def column(self, key: str) -> Column:
        """The column of a key."""
        return next(column for column in self.columns if column.key == key)

    def tolerance(self, row: Row, column: Column) -> float | None:
        """The largest difference that counts as reproduced, in the column's unit; None: not judged.

        The paper states no spread. Where others have run the method again, it is the largest difference between their
        number and the printed one in any row of the method, and 1 % of the printed number where that is more: the one
        published re-measurement of a whole average was 0.8 points off.
        """
        if column.key in row.tolerance:
            return row.tolerance[column.key]
        reruns = [(self.row(one.row), one.values[column.key]) for one in self.reruns if column.key in one.values]
        found = [abs(value - of.values[column.key]) for of, value in reruns if of.method == row.method]
        return max(*found, 0.01 * abs(row.values[column.key])) if found else None

    def scores(self, row: Row) -> tuple[Column, ...]:
        """The columns of which a row gives a number that an evaluation measures."""
        return tuple(column for column in self.columns if column.metric and column.key in row.values)

    def reason(self, row: Row, column: Column) -> str | None:
        """Why no run here gives this cell; None where one does."""
        if column.bench is not None and not row.bench:
            return row.none or "no measurement is named for this row"
        if column.training is not None and not row.train:
            return row.none or "nothing is trained for this row"
        return row.none or column.none

    def command(self, row: Row, column: Column) -> tuple[str, ...]:
        """What is typed to get this cell; empty where ``reason`` says why there is nothing."""
        if self.reason(row, column) is not None:
            return ()
        if column.bench is not None:
            return (*program("bench").split(), *row.bench)
        if column.training is not None:
            return (*program("train").split(), *row.train[-1])
        return (*program("eval").split(), *row.run)

    def mismatch(self, row: Row, column: str) -> Mismatch | None:
        """The mark of a cell, or of the average (``AVERAGE``)."""
        return next((m for m in self.mismatches if (m.row, m.column) == (row.label, column)), None)

    def ratio(self, row: Row, column: Column) -> float | None:
        """The paper's value over its base row's, 1.0 being as good; of a cost the inverse, the factor saved."""
        if row.base is None or column.key not in row.values:
            return None
        base = self.row(row.base).values.get(column.key)
        value = row.values[column.key]
        if not base or not value:
            return None
        return base / value if column.is_cost else value / base

    def average(self, row: Row, keys: Iterable[str] | None = None) -> float | None:
        """The average by the paper's rule, in percent: the mean of the ratios; None if a number is absent."""
        ratios = [self.ratio(row, self.column(key)) for key in (self.average_over if keys is None else keys)]
        known = [ratio for ratio in ratios if ratio is not None]
        return 100 * sum(known) / len(known) if known and len(known) == len(ratios) else None

    def cells(self) -> Iterator[Cell]:
        """Every cell, averages left out: those are computed."""
        for row in self.rows:
            for column in self.columns:
                yield Cell(
                    self.name,
                    row.method,
                    row.tokens,
                    column.key,
                    row.values.get(column.key),
                    column.unit,
                    f'{self.source}, row "{row.label}"',
                    self.command(row, column),
                    self.reason(row, column),
                )
