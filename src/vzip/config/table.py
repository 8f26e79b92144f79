"""A table of the paper: its numbers, and beside them ours from the records of finished runs.

  python -m vzip table 1                                the paper's numbers; ours where runs/ has them
  python -m vzip table 1 --run                          evaluates what is missing first, one eval.py after the other
  python -m vzip table 1 --run --only gqa,pope,64       two benchmarks at 64 tokens (and vanilla, for retention)
  python -m vzip table 1 --run eval.batch_size=8        further words for every eval.py
  python -m vzip table scenes --run eval.limit=20       the built-in model; a limited run is marked provisional
  python -m vzip table 1 --format csv > table1.csv      everything known of each cell, with its record

Prefill times come from `python -m vzip bench`, its bench.json below the runs folder. Tables: 1 to 7 and 10 to 18 of
arXiv 2412.04467, scenes (the built-in model), or a .json file of one's own.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console

from vzip.config.build import resolved
from vzip.config.options import config_dir
from vzip.config.overrides import check_overrides
from vzip.config.rundir import recipe_changes, training_directory
from vzip.config.validate import TRAINED, validate
from vzip.errors import ConfigError, nearest
from vzip.report.layout import print_layout, to_latex, to_markdown
from vzip.report.paper_tables import PaperTable, Row, read_table
from vzip.report.record import Run, find_runs
from vzip.report.table_fill import fill, find_benches, holds
from vzip.report.table_format import FORMATS, lay_out, to_csv

Runner = Callable[[Sequence[str]], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip table`."""
    parser.add_argument("table", help="1 to 7, 10 to 18, scenes, or a .json file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="with --run: further words for eval.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where records are, and go (runs)")
    parser.add_argument("--format", choices=FORMATS, help="to standard output; without it a table for the terminal")
    parser.add_argument("--run", action="store_true", help="evaluate what has no record yet")
    parser.add_argument("--only", help="columns, numbers of tokens or methods, by commas: gqa,mme,64,visionzip")


def main(args: argparse.Namespace) -> int:
    """Runs what is asked for and prints. Returns 1 if a run failed."""
    table = select(read_table(args.table), args.only)
    if args.words and not args.run:
        raise ConfigError(f"{' '.join(args.words)}: words for eval.py need --run.")
    planned = plan(table, args.words, args.runs)
    failed = run_missing(table, planned, args.words, args.runs, evaluate) if args.run else []
    print_table(table, planned, args.runs, args.format)
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


@dataclass(frozen=True)
class Planned:
    """What one row's words, and the further ones of the command line, compose to."""

    words: tuple[str, ...]
    config: Mapping[str, Any]


def select(table: PaperTable, only: str | None) -> PaperTable:
    """The part of a table that ``--only`` names; the rows that retention is taken against stay.

    Raises:
        ConfigError: a word that is neither a column, nor a number of tokens, nor a method of the table.
    """
    words = {word.strip().casefold() for word in (only or "").split(",") if word.strip()}
    columns = {key.casefold(): c.key for c in table.columns for key in (c.key, c.title)}
    tokens, methods = {str(row.tokens) for row in table.rows}, {row.method.casefold() for row in table.rows}
    for word in sorted(words - columns.keys() - tokens - methods):
        allowed = [*(c.key for c in table.columns), *sorted(tokens, key=int), *sorted(methods)]
        raise ConfigError(
            f"--only {word}: not in table {table.name}{nearest(word, allowed)}; columns, tokens and methods of it:"
            f" {', '.join(allowed)}."
        )
    keys = {columns[word] for word in words & columns.keys()} or {c.key for c in table.columns}
    rows = [
        row
        for row in table.rows
        if (str(row.tokens) in words or not words & tokens) and (row.method.casefold() in words or not words & methods)
    ]
    kept = {row.label for row in rows} | {row.base for row in rows}
    return replace(
        table,
        columns=tuple(c for c in table.columns if c.key in keys),
        average_over=tuple(key for key in table.average_over if key in keys),
        rows=tuple(row for row in table.rows if row.label in kept),
    )


def plan(table: PaperTable, words: Sequence[str], runs_dir: Path) -> dict[str, Planned]:
    """Composes every row's words as eval.py will.

    Raises:
        ConfigError: words that do not compose, or further words that would change what a row is.
    """
    directory = config_dir()
    planned = {}
    with initialize_config_dir(config_dir=str(directory), version_base="1.3"):
        for row in table.rows:
            if not row.run:
                continue
            own = (*row.run, f"paths.runs_dir={runs_dir}")
            check_overrides([*own, *words], directory, "eval")
            changed = resolved(compose("eval", [*own, *words]))
            validate(changed)
            changes = recipe_changes(changed, resolved(compose("eval", list(own)))) if words else []
            if changes:
                raise ConfigError(f"row {row.label!r} would not be the paper's any more: {'; '.join(changes)}.")
            planned[row.label] = Planned(row.run, changed)
    return planned


def runs_of(planned: Planned, runs: Sequence[Run]) -> list[Run]:
    """The runs whose settings are the row's; which tasks were asked may differ."""
    config = {key: value for key, value in planned.config.items() if key != "model"}
    model = dict(planned.config["model"])
    if model["projector"] == TRAINED:
        # In a record stands where the tuned weights were.
        model["projector"] = str(training_directory(planned.config, config_dir()) / "final")
    return [run for run in runs if _same(run.record.get("config"), {**config, "model": model})]


def _same(recorded: Mapping[str, Any] | None, config: Mapping[str, Any]) -> bool:
    if recorded is None or recorded.get("seed") != config["seed"]:
        return False
    try:
        changes = recipe_changes(recorded, config)
    except KeyError:  # recorded by a version with other settings
        return False
    return all(change.startswith("eval.tasks=") for change in changes)


def missing_tasks(table: PaperTable, row: Row, planned: Planned, runs: Sequence[Run]) -> list[list[str]]:
    """The tasks that a row still needs, in lists that one eval.py each can answer.

    Scores come from one run; the time of a benchmark only from a run of that benchmark alone. A run of a part of the
    questions (eval.limit) does for a run of the same part, not for a whole one.
    """
    runs = [run for run in runs if run.record.get("limit") in (None, planned.config["eval"]["limit"])]
    open_columns = [c for c in table.columns if table.reason(row, c) is None and not any(holds(run, c) for run in runs)]
    scores = [c.task for c in open_columns if c.task is not None and c.cost is None]
    alone = [[c.task] for c in open_columns if c.task is not None and c.cost is not None]
    together = [task for task in dict.fromkeys(scores) if [task] not in alone]
    return [*([together] if together else []), *alone]


def run_missing(
    table: PaperTable, planned: Mapping[str, Planned], words: Sequence[str], runs_dir: Path, evaluate: Runner
) -> list[str]:
    """Runs eval.py for every row that lacks something. An interrupted run goes on where it stopped.

    Args:
        table: the selected part.
        planned: from ``plan``.
        words: further words for eval.py.
        runs_dir: where records go.
        evaluate: runs eval.py with words; returns its exit code.

    Returns:
        The commands that failed; the others are run all the same.
    """
    failed = []
    for label, entry in planned.items():
        found = runs_of(entry, find_runs(runs_dir))
        for tasks in missing_tasks(table, table.row(label), entry, found):
            command = [*entry.words, *words, f"paths.runs_dir={runs_dir}"]
            if tasks != list(entry.config["eval"]["tasks"]):
                command.append(f"eval.tasks=[{','.join(tasks)}]")
            shown = shlex.join(["python", "eval.py", *command])
            print(f"row {label}: {shown}", file=sys.stderr, flush=True)
            if evaluate(command) != 0:
                failed.append(shown)
    return failed


def evaluate(words: Sequence[str]) -> int:
    """``python eval.py`` in a process of its own, so that each model's memory is given back."""
    return subprocess.run([sys.executable, str(config_dir().parent / "eval.py"), *words], check=False).returncode


def print_table(table: PaperTable, planned: Mapping[str, Planned], runs_dir: Path, form: str | None) -> None:
    """Finds the records and prints the table in a format, or for the terminal."""
    found = find_runs(runs_dir)
    runs = {label: runs_of(entry, found) for label, entry in planned.items()}
    rows = fill(table, runs, find_benches(runs_dir))
    if form == "csv":
        print(to_csv(table, rows), end="")
        return
    layout = lay_out(table, rows)
    if form is not None:
        print({"markdown": to_markdown, "latex": to_latex}[form](layout), end="")
        return
    print_layout(layout, Console())
    waiting = [label for label, entry in planned.items() if missing_tasks(table, table.row(label), entry, runs[label])]
    if waiting:
        print(
            f"{len(waiting)} of {len(planned)} rows of ours have no full record in {runs_dir}/: --run evaluates them."
        )
