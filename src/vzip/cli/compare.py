"""A record beside what its recipe must produce, or beside another record.

  python -m vzip compare RUN            against its recipe's expected numbers and our own vanilla run
  python -m vzip compare RUN OTHER      any two runs: scores, paired statistics on the same questions, settings; and how
                                        much of what OTHER loses against vanilla RUN has won back

RUN is a run directory or its run.json; `python -m vzip runs` lists them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vzip.errors import ConfigError, ManifestError
from vzip.installed import checkout
from vzip.report.expected import Expectation, ExpectedRow, read_expected
from vzip.report.two_runs import lay_out_pair, pillow_remarks
from vzip.results.layout import print_layout
from vzip.results.paired import Paired, compare_task
from vzip.results.record import (
    Run,
    answers_of,
    is_vanilla_of,
    read_record,
    record_path,
    runs_beside,
    score_of,
    unit_factor,
)

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
        paired: the uncertainty of that, and how often both runs gave the same answer; None without a vanilla run.
        verdict: "ok" or "off" by the tolerance, "-" without one, "missing" where the record lacks the task.
    """

    expected: ExpectedRow
    measured: float | None
    standard_error: float | None
    difference: float | None
    expected_retention: float | None
    measured_retention: float | None
    verdict: str
    paired: Paired | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip compare`."""
    parser.add_argument("run", type=Path, help="run directory, or its run.json")
    parser.add_argument("other", type=Path, nargs="?", help="another run, to compare with instead of the expectation")
    parser.add_argument("--expected", type=Path, help=f"NAME{_SUFFIX}; by default that of the record's recipe")
    parser.add_argument("--vanilla", type=Path, help="run to take retention from; by default searched in the runs tree")


def main(args: argparse.Namespace) -> int:
    """Prints the comparison. Returns 0, or 1 if a number is out of its tolerance."""
    if args.other is not None and args.expected is not None:
        raise ConfigError("compare RUN OTHER holds two runs against each other; leave out --expected.")
    run = _run(args.run)
    vanilla_path = args.vanilla or find_vanilla(run.record, args.run)
    vanilla = None if vanilla_path is None else _run(vanilla_path)
    if args.other is not None:
        print_layout(lay_out_pair(run, _run(args.other), vanilla), Console())
        return 0
    path = args.expected or find_expected(run.record, args.run)
    expectation = read_expected(path)
    rows = compare(run, expectation, vanilla, _expectation_of_vanilla(expectation, path))
    _print(run.record, expectation, rows, vanilla_path)
    if vanilla is not None:
        for remark in pillow_remarks(run.record, vanilla.record, "this run and the vanilla run"):
            print(remark)
    return 1 if any(row.verdict == "off" for row in rows) else 0


def _run(path: Path) -> Run:
    return Run(record_path(path), read_record(path))


def compare(
    run: Run, expectation: Expectation, vanilla: Run | None = None, of_vanilla: Expectation | None = None
) -> list[Comparison]:
    """Compares a record with an expectation.

    Args:
        run: the run.
        expectation: what it must produce.
        vanilla: our own uncompressed run of the same model and questions, for the measured retention.
        of_vanilla: what that one must produce, for the expected retention.

    Raises:
        ManifestError: units that cannot be converted, e.g. an expectation in percent for a metric in points.
    """
    return [_compare_row(row, run, vanilla, of_vanilla) for row in expectation.rows]


def _compare_row(row: ExpectedRow, run: Run, vanilla: Run | None, of_vanilla: Expectation | None) -> Comparison:
    score = score_of(run.record, row.task, row.metric)
    expected_base = None if of_vanilla is None else of_vanilla.find(row.task, row.metric)
    expected_retention = row.value / expected_base.value if expected_base and expected_base.value else None
    if score is None:
        return Comparison(row, None, None, None, expected_retention, None, "missing")
    factor = unit_factor(run.record["tasks"][row.task]["unit"], row.unit, f"{row.task} {row.metric}")
    measured = score.value * factor
    difference = measured - row.value
    paired = None
    if vanilla is not None and vanilla.path.resolve() != run.path.resolve():
        ours, theirs = answers_of(run, row.task), answers_of(vanilla, row.task)
        paired = compare_task(run.record, vanilla.record, row.task, row.metric, ours, theirs)
    return Comparison(
        row,
        measured,
        None if score.standard_error is None else score.standard_error * factor,
        difference,
        expected_retention,
        None if paired is None else paired.retention,
        "-" if row.tolerance is None else ("ok" if abs(difference) <= row.tolerance else "off"),
        paired,
    )


def find_expected(record: Mapping[str, Any], run: Path) -> Path:
    """The expectation beside the recipe that the record names.

    Raises:
        ManifestError: the record names no recipe, or its recipe has no expectation.
    """
    recipe = (record.get("config") or {}).get("recipe")
    if not recipe:
        raise ManifestError(f"{run} was not made by a recipe (+exp=NAME): say what to compare with, --expected FILE.")
    for place in (checkout(), Path.cwd()):  # ours, or a recipe of the user's own
        expected = place / "configs" / "exp" / f"{recipe}{_SUFFIX}"
        if expected.is_file():
            return expected
    raise ManifestError(f"recipe {recipe} has no configs/exp/{recipe}{_SUFFIX}: name another with --expected FILE.")


def find_vanilla(record: Mapping[str, Any], run: Path) -> Path | None:
    """The newest matching uncompressed record in the runs tree that holds ``run``; ``run`` itself if it is one."""
    own = record_path(run).resolve()
    if is_vanilla_of(record, record):
        return own
    runs = runs_beside(Run(own, record))
    found = [other for other in runs if other.path != own and is_vanilla_of(other.record, record)]
    newest = max(found, key=lambda other: str(other.record.get("created")), default=None)
    return None if newest is None else newest.path


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
    for name in (
        "expected",
        "measured",
        "± s.e.",
        "difference",
        "retention expected",
        "measured",
        "95 %",
        "same answers",
    ):
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
            _interval(row.paired),
            _percent(None if row.paired is None else row.paired.agreement),
            row.verdict,
        )
    console.print(table)
    for row in rows:
        console.print(f"{row.expected.task}: {row.expected.source}. {row.expected.protocol}.", markup=False)
    if any(row.paired is not None for row in rows):
        console.print(
            "same: share of questions to which the vanilla run gave the same answer; ~: not from the same questions"
        )
    console.print(f"vanilla run: {vanilla or 'none found, so no measured retention; name one with --vanilla RUN'}")
    for reason in record.get("provisional_reasons", []):
        console.print(f"provisional: {reason}")


def _number(value: float | None, *, sign: bool = False) -> str:
    return "" if value is None else f"{value:+.2f}" if sign else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _interval(paired: Paired | None) -> str:
    if paired is None or paired.low is None or paired.high is None:
        return ""
    return f"{100 * paired.low:.1f} to {100 * paired.high:.1f}" + ("" if paired.is_paired else " ~")
