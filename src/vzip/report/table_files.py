"""Reads the tables that are data: ``tables/NAME.json``, one row a line, and ``tables/columns.json``.

A number stands in one file only: a row with ``values_of`` takes its numbers from the same row of another table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from vzip.errors import ConfigError, ManifestError, nearest
from vzip.json_files import read_json

from .paper_tables import COST_UNITS, SCORE_UNITS, Column, Mismatch, PaperTable, Rerun, Row

FOLDER = Path(__file__).parent / "tables"
_ROW = frozenset((*(field.name for field in fields(Row)), "extra"))


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
        return _table(path, _load(path), read_columns())
    except (KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{path} is not a table: {type(error).__name__} {error}; see {FOLDER / '1.json'}."
        ) from error


def row_of_recipe(recipe: str, names: Iterable[str]) -> tuple[PaperTable, Row] | None:
    """The row of scores that a recipe, and no other override, produces; None where no table has one.

    A table with numbers of its own goes before one that takes them over, one with an average before one without.
    """
    rows = [(table, row) for table in map(read_table, names) for row in table.rows]
    found = [(table, row) for table, row in rows if row.run == (f"+exp={recipe}",) and table.scores(row)]
    return min(found, key=lambda pair: (pair[1].values_of is not None, not pair[0].average_over), default=None)


@cache
def read_columns() -> dict[str, Column]:
    return {key: Column(key, **entry) for key, entry in _load(FOLDER / "columns.json").items()}


def _load(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ManifestError(f"{path} is not JSON: {error}.") from error


def _table(path: Path, content: dict[str, Any], known: Mapping[str, Column]) -> PaperTable:
    own = {key: Column(key, **entry) for key, entry in content.get("own_columns", {}).items()}
    known = {**known, **own}
    for key in content["columns"]:
        if key not in known:
            raise ManifestError(f"{path}: column {key!r} is not known{nearest(key, known)}; see own_columns.")
        if content["columns"].count(key) > 1:
            raise ManifestError(f"{path}: column {key!r} stands there twice.")
        if known[key].unit not in (*SCORE_UNITS, *COST_UNITS):
            units = ", ".join((*SCORE_UNITS, *COST_UNITS))
            raise ManifestError(f"{path}, column {key!r}: unit is {known[key].unit!r}, must be one of {units}.")
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
    reruns = tuple(Rerun(**entry) for entry in content.get("reruns", []))
    wanted = {
        *(m.row for m in mismatches),
        *(one.row for one in reruns),
        *(row.base for row in rows if row.base is not None),
    }
    for label in sorted({*(wanted - set(labels)), *(label for label in labels if labels.count(label) > 1)}):
        raise ManifestError(f"{path}: row {label!r} is named and must stand there exactly once.")
    for one in reruns:
        printed = rows[labels.index(one.row)].values
        for key in sorted(one.values.keys() - printed.keys()):
            raise ManifestError(f"{path}: a rerun of {one.row!r} has {key!r}, of which the row prints no number.")
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
        reruns,
    )


def _row(path: Path, row: dict[str, Any], columns: tuple[Column, ...], base: str | None) -> Row:
    label = f"{row['tokens']}, {row['method']}"
    if ("run" in row) == ("none" in row):
        raise ManifestError(f"{path}, row {label!r}: must have either run (overrides for eval.py) or none (why not).")
    for key in sorted(row.keys() - _ROW):
        raise ManifestError(f"{path}, row {label!r}: {key!r} is no key of a row{nearest(key, _ROW)}.")
    keys = [column.key for column in columns]
    tolerance = _by_column(path, label, keys, row.get("tolerance"))
    if min(tolerance.values(), default=0) < 0:
        raise ManifestError(
            f"{path}, row {label!r}: tolerance has {min(tolerance.values())}, must be 0 or more, or null."
        )
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
        tuple(row.get("bench", "").split()),
        tuple(tuple(words.split()) for words in row.get("train", ())),
        tolerance,
        row.get("values_of"),
    )


def _by_column(path: Path, label: str, keys: list[str], numbers: list[float | None] | None) -> dict[str, float]:
    if numbers is None:
        return {}
    if len(numbers) != len(keys):
        raise ManifestError(f"{path}, row {label!r}: {len(numbers)} numbers for {len(keys)} columns.")
    for key, number in zip(keys, numbers, strict=True):
        if isinstance(number, bool) or not isinstance(number, int | float | None):
            raise ManifestError(f"{path}, row {label!r}: {key} is {number!r}, must be a number or null.")
    return {key: number for key, number in zip(keys, numbers, strict=True) if number is not None}
