"""`python -m vzip compare RUN`: a record beside what its recipe must produce, absolute and as retention."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vzip.errors import ManifestError, VzipError

from .expected import Expectation, ExpectedRow, read_expected
from .record import RECORD_NAME, is_vanilla_of, read_record, record_path, score_of, unit_factor

_SUFFIX = ".expected.json"


@dataclass(frozen=True)
class Comparison:
    """One row: numbers in the expectation's unit, retentions as shares of 1; None where there is nothing to compare.

    Attributes:
        expected: the row of the expectation.
        measured, standard_error: ours.
        difference: measured - expected.
        expected_retention: expected / expected of the vanilla recipe.
        measured_retention: measured / our own vanilla run.
        verdict: "ok" or "off" by the tolerance, "-" without one, "missing" where the record lacks the task.
    """

    expected: ExpectedRow
    measured: float | None
    standard_error: float | None
    difference: float | None
    expected_retention: float | None
    measured_retention: float | None
    verdict: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip compare`."""
    parser.add_argument("run", type=Path, help="run directory, or its run.json")
    parser.add_argument("--expected", type=Path, help=f"NAME{_SUFFIX}; by default that of the record's recipe")
    parser.add_argument("--vanilla", type=Path, help="run to take retention from; by default searched in the runs tree")


def main(args: argparse.Namespace) -> int:
    """Prints the comparison. Returns 0, 1 if a number is out of its tolerance, 2 for an error of the user's."""
    try:
        record = read_record(args.run)
        expectation = read_expected(args.expected or find_expected(record, args.run))
        vanilla_path = args.vanilla or find_vanilla(record, args.run)
        vanilla = None if vanilla_path is None else read_record(vanilla_path)
        of_vanilla = _expectation_of_vanilla(expectation, args.expected or find_expected(record, args.run))
        rows = compare(record, expectation, vanilla, of_vanilla)
    except VzipError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    _print(record, expectation, rows, vanilla_path)
    return 1 if any(row.verdict == "off" for row in rows) else 0


def compare(
    record: Mapping[str, Any],
    expectation: Expectation,
    vanilla: Mapping[str, Any] | None = None,
    of_vanilla: Expectation | None = None,
) -> list[Comparison]:
    """Compares a record with an expectation.

    Args:
        record: the run.
        expectation: what it must produce.
        vanilla: our own uncompressed run of the same model and questions, for the measured retention.
        of_vanilla: what that one must produce, for the expected retention.

    Raises:
        ManifestError: units that cannot be converted, e.g. an expectation in percent for a metric in points.
    """
    rows = []
    for row in expectation.rows:
        score = score_of(record, row.task, row.metric)
        base = None if vanilla is None else score_of(vanilla, row.task, row.metric)
        expected_base = None if of_vanilla is None else of_vanilla.find(row.task, row.metric)
        measured = error = difference = None
        verdict = "missing"
        if score is not None:
            factor = unit_factor(record["tasks"][row.task]["unit"], row.unit, f"{row.task} {row.metric}")
            measured = score.value * factor
            error = None if score.standard_error is None else score.standard_error * factor
            difference = measured - row.value
            verdict = "-" if row.tolerance is None else ("ok" if abs(difference) <= row.tolerance else "off")
        rows.append(
            Comparison(
                row,
                measured,
                error,
                difference,
                row.value / expected_base.value if expected_base and expected_base.value else None,
                score.value / base.value if score and base and base.value else None,
                verdict,
            )
        )
    return rows


def find_expected(record: Mapping[str, Any], run: Path) -> Path:
    """The expectation beside the recipe that the record names.

    Raises:
        ManifestError: the record names no recipe, or its recipe has no expectation.
    """
    recipe = (record.get("config") or {}).get("recipe")
    if not recipe:
        raise ManifestError(f"{run} was not made by a recipe (+exp=NAME): say what to compare with, --expected FILE.")
    # Where the command is run, then the checkout this package is in.
    places = [Path.cwd(), *Path(__file__).resolve().parents]
    for place in places:
        candidate = place / "configs" / "exp" / f"{recipe}{_SUFFIX}"
        if candidate.is_file():
            return candidate
    raise ManifestError(f"recipe {recipe} has no configs/exp/{recipe}{_SUFFIX}: name another with --expected FILE.")


def find_vanilla(record: Mapping[str, Any], run: Path) -> Path | None:
    """The newest matching uncompressed record in the runs tree that holds ``run``; ``run`` itself if it is one."""
    own = record_path(run).resolve()
    if is_vanilla_of(record, record):
        return own
    above = own.parents
    # runs/<task>/<recipe or model>/<compressor>-<budget>/seed<k>: `runs` by its name, else four levels up.
    root = next((folder for folder in above if folder.name == "runs"), above[min(4, len(above) - 1)])
    found = [path for path in _records_below(root) if path != own and is_vanilla_of(read_record(path), record)]
    return max(found, key=lambda path: str(read_record(path).get("created")), default=None)


def _records_below(root: Path) -> Iterable[Path]:
    for path in sorted(root.glob(f"*/*/*/*/{RECORD_NAME}")):
        try:
            read_record(path)
        except ManifestError:  # other kinds of records lie in the same tree
            continue
        yield path


def _expectation_of_vanilla(expectation: Expectation, path: Path) -> Expectation | None:
    if expectation.vanilla is None:
        return None
    beside = Path(path).with_name(f"{expectation.vanilla}{_SUFFIX}")
    return read_expected(beside) if beside.is_file() else None


def _print(record: Mapping[str, Any], expectation: Expectation, rows: list[Comparison], vanilla: Path | None) -> None:
    console = Console()
    table = Table(title=f"{expectation.recipe}: measured beside expected", title_justify="left")
    for name in ("task", "metric", "unit"):
        table.add_column(name, overflow="fold")
    for name in ("expected", "measured", "± s.e.", "difference", "retention expected", "measured"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for row in rows:
        table.add_row(
            row.expected.task,
            row.expected.metric,
            row.expected.unit,
            f"{row.expected.value:g}",
            _number(row.measured),
            _number(row.standard_error),
            _number(row.difference, sign=True),
            _percent(row.expected_retention),
            _percent(row.measured_retention),
            row.verdict,
        )
    console.print(table)
    for row in rows:
        console.print(f"{row.expected.task}: {row.expected.source}. {row.expected.protocol}.", markup=False)
    console.print(f"vanilla run: {vanilla or 'none found, so no measured retention; name one with --vanilla RUN'}")
    for reason in record.get("provisional_reasons", []):
        console.print(f"provisional: {reason}")


def _number(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+.2f}" if sign else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
