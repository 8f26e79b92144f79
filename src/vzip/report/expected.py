"""What a recipe must produce: ``configs/exp/NAME.expected.json``, beside the recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzip.errors import ManifestError

UNITS = ("percent", "fraction", "points")


@dataclass(frozen=True)
class ExpectedRow:
    """One expected number.

    Attributes:
        task, metric: lmms-eval's names; a metric ``a+b`` is a sum.
        value: the number, in ``unit``.
        unit: "percent" (0..100), "fraction" (0..1) or "points" (the benchmark's own scale).
        tolerance: largest difference that counts as reproduced, in ``unit``; None: not judged.
        source: where the number stands.
        protocol: how it was made, and what differs here.
    """

    task: str
    metric: str
    value: float
    unit: str
    tolerance: float | None
    source: str
    protocol: str


@dataclass(frozen=True)
class Expectation:
    """A recipe's expected numbers.

    Attributes:
        recipe: its name.
        vanilla: the recipe of the uncompressed run it is measured against, or None.
        rows: the numbers.
    """

    recipe: str
    vanilla: str | None
    rows: tuple[ExpectedRow, ...]

    def find(self, task: str, metric: str) -> ExpectedRow | None:
        """The row of a task and metric."""
        return next((row for row in self.rows if (row.task, row.metric) == (task, metric)), None)


def read_expected(path: str | Path) -> Expectation:
    """Reads and checks an expectation.

    Raises:
        ManifestError: no such file, not JSON, or a row that lacks something; the message names row and key.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"{str(path)!r} does not exist: name an existing .expected.json with --expected FILE.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("rows"), list) or not content["rows"]:
        raise ManifestError(f"{path}: must be an object with a list 'rows' of at least one expected number.")
    rows = tuple(_row(path, number, row) for number, row in enumerate(content["rows"]))
    keys = [(row.task, row.metric) for row in rows]
    for key in keys:
        if keys.count(key) > 1:
            raise ManifestError(f"{path}: {key[0]} {key[1]} stands there twice.")
    return Expectation(
        str(content.get("recipe", path.name.removesuffix(".expected.json"))), content.get("vanilla"), rows
    )


def _row(path: Path, number: int, row: Any) -> ExpectedRow:
    where = f"{path}, row {number}"
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: must be an object, is {row!r}.")
    names = tuple(ExpectedRow.__dataclass_fields__)
    missing = [name for name in names if name not in row]
    unknown = [name for name in row if name not in names]
    if missing or unknown:
        raise ManifestError(
            f"{where}: missing keys {missing}, unknown keys {unknown}; each row has exactly {', '.join(names)}."
        )
    for name in ("value", "tolerance"):
        value = row[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            if name == "tolerance" and value is None:
                continue
            raise ManifestError(f"{where}: {name} is {value!r}, must be a number.")
    if row["tolerance"] is not None and row["tolerance"] < 0:
        raise ManifestError(f"{where}: tolerance is {row['tolerance']}, must be 0 or more, or null.")
    if row["unit"] not in UNITS:
        raise ManifestError(f"{where}: unit is {row['unit']!r}, must be one of {', '.join(UNITS)}.")
    return ExpectedRow(**row)
