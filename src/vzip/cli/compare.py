"""A record beside what its recipe must produce, or beside another record.

  python -m vzip compare RUN            against its recipe's row in the paper's tables and our own vanilla run
  python -m vzip compare runs/scenes/tiny/visionzip-64tok/seed0       as the built-in model's
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

from vzip.errors import ConfigError, ManifestError, nearest
from vzip.report.paper_tables import Column, PaperTable, Row
from vzip.report.table_files import read_table, row_of_recipe, table_names
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
    title_of,
    unit_factor,
)


@dataclass(frozen=True)
class Comparison:
    """One score: numbers in the column's unit, retentions as shares of 1; None where there is nothing to compare.

    Attributes:
        column: what was measured.
        expected: the table's number.
        measured, standard_error: ours.
        difference: measured - expected.
        expected_retention: expected / the number in the table's row for vanilla.
        measured_retention: measured / our own vanilla run.
        paired: the uncertainty of that, and how often both runs gave the same answer; None without a vanilla run.
        verdict: "reproduced" or "not reproduced" by the tolerance, "-" without one, "provisional" where not all
            questions were asked, "missing" where the record lacks the task.
        tolerance: see ``PaperTable.tolerance``.
    """

    column: Column
    expected: float
    measured: float | None
    standard_error: float | None
    difference: float | None
    expected_retention: float | None
    measured_retention: float | None
    verdict: str
    paired: Paired | None = None
    tolerance: float | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip compare`."""
    parser.add_argument("run", type=Path, help="run directory, or its run.json")
    parser.add_argument("other", type=Path, nargs="?", help="another run, to compare with instead of a table")
    parser.add_argument(
        "--expected",
        metavar="TABLE",
        help="table (python -m vzip table), or a .json file of one's own in its form; by default the recipe's",
    )
    parser.add_argument("--row", metavar="LABEL", help="row of it, '64, VisionZip'; by default that of the recipe")
    parser.add_argument("--vanilla", type=Path, help="run to take retention from; by default searched in the runs tree")


def main(args: argparse.Namespace) -> int:
    """Prints the comparison. Returns 0, or 1 if a number is out of its tolerance."""
    if args.other is not None and (args.expected or args.row) is not None:
        raise ConfigError("compare RUN OTHER holds two runs against each other; leave out --expected and --row.")
    if args.row is not None and args.expected is None:
        raise ConfigError(f"--row {args.row}: say of which table, --expected TABLE.")
    run = _run(args.run)
    vanilla_path = args.vanilla or find_vanilla(run.record, args.run)
    vanilla = None if vanilla_path is None else _run(vanilla_path)
    if args.other is not None:
        print_layout(lay_out_pair(run, _run(args.other), vanilla), Console())
        return 0
    if args.expected is None and not has_row(run):
        if vanilla is None or vanilla.path.resolve() == run.path.resolve():
            recipe = (run.record.get("config") or {}).get("recipe")
            raise ManifestError(
                f"{args.run}: no table has numbers for it (its recipe: {recipe}), and there is no run of its model"
                " without compression under its runs folder. Make one (compressor=none budget=full), or name what to"
                " compare with: OTHER, or --expected TABLE --row LABEL (as in --expected 1 --row '64, VisionZip')."
            )
        print(f"no table has numbers for {title_of(run.record)}: beside our own vanilla run, {vanilla_path}")
        print_layout(lay_out_pair(run, vanilla, vanilla), Console())
        return 0
    table, row = find_row(run, args.expected, args.row)
    rows = compare(run, table, row, vanilla)
    _print(run.record, table, row, rows, vanilla_path)
    if vanilla is not None:
        for remark in pillow_remarks(run.record, vanilla.record, "this run and the vanilla run"):
            print(remark)
    return 1 if any(row.verdict == "not reproduced" for row in rows) else 0


def _run(path: Path) -> Run:
    return Run(record_path(path), read_record(path))


def compare(run: Run, table: PaperTable, row: Row, vanilla: Run | None = None) -> list[Comparison]:
    """Compares a record with a row of a table.

    Args:
        run: the run.
        table, row: what it must produce.
        vanilla: our own uncompressed run of the same model and questions, for the measured retention.

    Raises:
        ManifestError: units that cannot be converted, e.g. a column in percent for a metric in points.
    """
    return [_compare_score(run, table, row, column, vanilla) for column in table.scores(row)]


def _compare_score(run: Run, table: PaperTable, row: Row, column: Column, vanilla: Run | None) -> Comparison:
    assert column.task is not None and column.metric is not None  # table.scores
    expected, expected_retention = row.values[column.key], table.ratio(row, column)
    score = score_of(run.record, column.task, column.metric)
    if score is None:
        return Comparison(column, expected, None, None, None, expected_retention, None, "missing")
    factor = unit_factor(run.record["tasks"][column.task]["unit"], column.unit, f"{column.task} {column.metric}")
    difference = score.value * factor - expected
    paired = None
    if vanilla is not None and vanilla.path.resolve() != run.path.resolve():
        ours, theirs = answers_of(run, column.task), answers_of(vanilla, column.task)
        paired = compare_task(run.record, vanilla.record, column.task, column.metric, ours, theirs)
    tolerance = table.tolerance(row, column)
    if tolerance is None:
        verdict = "-"
    elif run.record.get("provisional_reasons"):
        verdict = "provisional"
    else:
        # Numbers are compared as printed: 0.1 + 0.2 is not 0.3.
        verdict = "reproduced" if abs(difference) <= tolerance + 1e-9 else "not reproduced"
    return Comparison(
        column,
        expected,
        score.value * factor,
        None if score.standard_error is None else score.standard_error * factor,
        difference,
        expected_retention,
        None if paired is None else paired.retention,
        verdict,
        paired,
        tolerance,
    )


def has_row(run: Run) -> bool:
    """Whether a table has numbers for the run's recipe."""
    recipe = (run.record.get("config") or {}).get("recipe")
    return recipe is not None and row_of_recipe(str(recipe), _tables()) is not None


def _tables() -> list[str]:
    """The package's tables, then the user's own, ``configs/exp/*.json``."""
    return [*table_names(), *(str(path) for path in sorted(Path.cwd().glob("configs/exp/*.json")))]


def find_row(run: Run, table: str | None = None, label: str | None = None) -> tuple[PaperTable, Row]:
    """The numbers that a run must produce.

    Args:
        run: the run; without a label its recipe is looked for.
        table: name or file of the table; None: the package's, then the user's own, ``configs/exp/*.json``.
        label: the row of it.

    Raises:
        ConfigError: the table has no such row, or there is no such table.
        ManifestError: the record names no recipe, or no table has numbers for it.
    """
    if table is not None and label is not None:
        content = read_table(table)
        labels = [row.label for row in content.rows]
        if label not in labels:
            raise ConfigError(
                f"--row {label}: table {table} has no such row{nearest(label, labels)}: {'; '.join(labels)}."
            )
        return content, content.row(label)
    recipe = (run.record.get("config") or {}).get("recipe")
    say = "say what to compare with, --expected TABLE --row LABEL (as in --expected 1 --row '64, VisionZip')."
    if not recipe:
        raise ManifestError(f"{run.path} was not made by a recipe (+exp=NAME): {say}")
    found = row_of_recipe(recipe, _tables() if table is None else [table])
    if found is None:
        raise ManifestError(f"recipe {recipe} has no numbers in {f'table {table}' if table else 'any table'}: {say}")
    return found


def find_vanilla(record: Mapping[str, Any], run: Path) -> Path | None:
    """The newest matching uncompressed record in the runs tree that holds ``run``; ``run`` itself if it is one."""
    own = record_path(run).resolve()
    if is_vanilla_of(record, record):
        return own
    runs = runs_beside(Run(own, record))
    found = [other for other in runs if other.path != own and is_vanilla_of(other.record, record)]
    newest = max(found, key=lambda other: str(other.record.get("created")), default=None)
    return None if newest is None else newest.path


def _print(
    record: Mapping[str, Any], expected: PaperTable, row: Row, scores: list[Comparison], vanilla: Path | None
) -> None:
    console = Console()
    title = (record.get("config") or {}).get("recipe") or f"{expected.title}, {row.label}"
    table = Table(title=f"{title}: measured beside expected", title_justify="left")
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
    for score in scores:
        table.add_row(
            score.column.task,
            score.column.metric,
            score.column.unit,
            f"{score.expected:g}",
            _number(score.measured),
            _number(score.standard_error),
            _number(score.difference, sign=True),
            _percent(score.expected_retention),
            _percent(score.measured_retention),
            _interval(score.paired),
            _percent(None if score.paired is None else score.paired.agreement),
            score.verdict if score.tolerance is None else f"{score.verdict} (± {score.tolerance:.2f})",
        )
    console.print(table)
    for score in scores:
        protocol = f" {score.column.protocol}." if score.column.protocol else ""
        console.print(f'{score.column.task}: {expected.source}, row "{row.label}".{protocol}', markup=False)
    judged = {
        score.column.key for score in scores if score.tolerance is not None and score.column.key not in row.tolerance
    }
    if judged:
        of = [
            one for one in expected.reruns if expected.row(one.row).method == row.method and judged & one.values.keys()
        ]
        sources = "; ".join(dict.fromkeys(f"{one.source} ({one.row})" for one in of))
        console.print(
            "reproduced: within 1 % of the printed number, or within what others were off by who ran the method again,"
            f" if that is more: {sources}",
            markup=False,
        )
    if any(score.paired is not None for score in scores):
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
