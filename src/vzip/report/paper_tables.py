"""The paper's tables as data: ``tables/NAME.json``, one row a line, and ``tables/columns.json``.

Every cell says what it is (``PaperTable.cells``): method, tokens, benchmark, value, unit, source, and the words that
``eval.py`` is given to produce it, or why no run here can. A number stands in one file only: a row with ``values_of``
takes its numbers from the same row of another table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from vzip.errors import ConfigError, ManifestError, nearest

FOLDER = Path(__file__).parent / "tables"
AVERAGE = "average"  # stands for the average where a column is named
# Units in which less is better; their ratio is a factor saved, not a retention.
COST_UNITS = ("s", "ms", "h", "MB")


@dataclass(frozen=True)
class Column:
    """What a column holds.

    Attributes:
        key, title: its name here and in the paper.
        unit: "percent", "points" or one of ``COST_UNITS``.
        task, metric: lmms-eval's names of what produces it; of a cost, the one task that the run must consist of.
        cost: the field of a record that holds a cost, with a dot between nested names.
        bench: the stage of ``python -m vzip bench`` that holds it.
        none: why nothing here produces it.
    """

    key: str
    title: str
    unit: str
    task: str | None = None
    metric: str | None = None
    cost: str | None = None
    bench: str | None = None
    none: str | None = None

    @property
    def is_cost(self) -> bool:
        return self.unit in COST_UNITS


@dataclass(frozen=True)
class Row:
    """A method at a number of tokens.

    Attributes:
        tokens: visual tokens, as the paper counts them.
        method: "vanilla", "VisionZip", "VisionZip‡" (tuned), or a rival.
        run: the words for eval.py; empty for a rival.
        none: why there are none; None where there are some.
        values: the paper's numbers by column; a number that the paper does not give is absent.
        average: the paper's printed average retention in percent, or None.
        printed_ratio: the paper's printed percentages (or factors, of costs) beside the values, by column.
        base: label of the row that retention is taken against, or None.
        bench: the model that ``python -m vzip bench model=`` names, or None.
    """

    tokens: int
    method: str
    run: tuple[str, ...]
    none: str | None
    values: Mapping[str, float]
    average: float | None
    printed_ratio: Mapping[str, float]
    base: str | None
    bench: str | None

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
class Cell:
    """One number of the paper and where it comes from; ``run`` is empty where ``reason`` says why."""

    table: str
    method: str
    tokens: int
    benchmark: str
    value: float | None
    unit: str
    source: str
    run: tuple[str, ...]
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

    def row(self, label: str) -> Row:
        """The row of a label, ``"64, VisionZip"``."""
        return next(row for row in self.rows if row.label == label)

    def column(self, key: str) -> Column:
        """The column of a key."""
        return next(column for column in self.columns if column.key == key)

    def reason(self, row: Row, column: Column) -> str | None:
        """Why no run here gives this cell; None where one does."""
        missing = "no measurement is named for this row" if column.bench and row.bench is None else None
        return row.none or column.none or missing

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
                reason = self.reason(row, column)
                yield Cell(
                    self.name,
                    row.method,
                    row.tokens,
                    column.key,
                    row.values.get(column.key),
                    column.unit,
                    f'{self.source}, row "{row.label}"',
                    () if reason else row.run,
                    reason,
                )


def table_names() -> list[str]:
    """Names of the tables that come with the package, the paper's in its order."""
    names = [path.stem for path in FOLDER.glob("*.json") if path.stem != "columns"]
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


@cache
def read_table(name: str) -> PaperTable:
    """Reads a table.

    Args:
        name: one of ``table_names()``, or the path of a ``.json`` file of one's own in the same form.

    Raises:
        ConfigError: there is no such table.
        ManifestError: the file is not a table; the message names file and row.
    """
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file() or (path.parent == FOLDER and path.stem == "columns"):
        known = table_names()
        raise ConfigError(
            f"table {name!r}: no such table{nearest(name, known)}; tables: {', '.join(known)}, or a .json file."
        )
    try:
        return _table(path, _load(path), _columns())
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{path} is not a table: {type(error).__name__} {error}; see {FOLDER / '1.json'}."
        ) from error


@cache
def _columns() -> dict[str, Column]:
    return {key: Column(key, **entry) for key, entry in _load(FOLDER / "columns.json").items()}


def _load(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path} is not JSON: {error}.") from error


def _table(path: Path, content: dict[str, Any], known: Mapping[str, Column]) -> PaperTable:
    own = {key: Column(key, **entry) for key, entry in content.get("own_columns", {}).items()}
    known = {**known, **own}
    for key in content["columns"]:
        if key not in known:
            raise ManifestError(f"{path}: column {key!r} is not known{nearest(key, known)}; see own_columns.")
    columns = tuple(known[key] for key in content["columns"])
    vanilla = next((f"{r['tokens']}, vanilla" for r in content["rows"] if r["method"] == "vanilla"), None)
    base = content.get("base", vanilla)
    rows = tuple(_row(path, row, columns, base) for row in content["rows"])
    labels = [row.label for row in rows]
    mismatches = tuple(
        Mismatch(
            m["row"], m["column"], m["note"], m.get("recomputed"), tuple(m["elsewhere"]) if "elsewhere" in m else None
        )
        for m in content.get("mismatches", [])
    )
    wanted = {*(m.row for m in mismatches), *(row.base for row in rows if row.base is not None)}
    for label in sorted({*(wanted - set(labels)), *(label for label in labels if labels.count(label) > 1)}):
        raise ManifestError(f"{path}: row {label!r} is named and must stand there exactly once.")
    for key in content["average_over"]:
        if key not in content["columns"]:
            raise ManifestError(f"{path}: average_over names {key!r}, which is no column of it.")
    return PaperTable(
        content["name"],
        content["title"],
        content["source"],
        columns,
        tuple(content["average_over"]),
        rows,
        tuple(content.get("notes", ())),
        mismatches,
    )


def _row(path: Path, row: dict[str, Any], columns: tuple[Column, ...], base: str | None) -> Row:
    label = f"{row['tokens']}, {row['method']}"
    if ("run" in row) == ("none" in row):
        raise ManifestError(f"{path}, row {label!r}: must have either run (words for eval.py) or none (why not).")
    keys = [column.key for column in columns]
    values = dict(row.get("extra", {}))
    if "values_of" in row:
        of = read_table(row["values_of"]).row(label).values
        values |= {key: of[key] for key in keys if key in of}
    return Row(
        row["tokens"],
        row["method"],
        tuple(row.get("run", "").split()),
        row.get("none"),
        values | _by_column(path, label, keys, row.get("values")),
        row.get("average"),
        _by_column(path, label, keys, row.get("printed_ratio")),
        row.get("base", base),
        row.get("bench"),
    )


def _by_column(path: Path, label: str, keys: list[str], numbers: list[float | None] | None) -> dict[str, float]:
    if numbers is None:
        return {}
    if len(numbers) != len(keys):
        raise ManifestError(f"{path}, row {label!r}: {len(numbers)} numbers for {len(keys)} columns.")
    return {key: number for key, number in zip(keys, numbers, strict=True) if number is not None}
