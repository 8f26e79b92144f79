"""A table of the paper: its numbers, and beside them ours from the records of finished runs.

  python -m vzip table 1                                the paper's numbers; ours where runs/ has them
  python -m vzip table 1 --dry-run                      what --run would run, with hours
  python -m vzip table 1 --run                          evaluates what is missing first; a model is loaded once
  python -m vzip table 1 --run --only gqa,pope,64       two benchmarks at 64 tokens (and vanilla, for retention)
  python -m vzip table 1 --run eval.batch_size=8        further overrides for every eval.py
  python -m vzip table scenes --run eval.limit=20       the built-in model; a limited run is marked provisional
  python -m vzip table 1 --run --train zero2_8gpu       also trains what tuned rows (‡) lack
  python -m vzip table 1 --hours --gpu 3090             how long each row takes: measured, else estimated
  python -m vzip table 1 --format csv > table1.csv      everything known of each cell, with its record
  python -m vzip table --protocol B                     what another method's paper prints, by its own protocol

Prefill times come from `python -m vzip bench`, its bench.json below the runs folder, hours and memory of trainings from
the logs of train.py. Costs have a ratio only where both were measured on one machine. Tables: 1 to 7 and 10 to 18 of
arXiv 2412.04467, scenes and scenes5 (the built-in model; the latter as Table 5), or a .json file of one's own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from vzip import log
from vzip.config.options import config_dir
from vzip.errors import ConfigError, VzipError, nearest
from vzip.report.costs import Bench, find_benches
from vzip.report.paper_tables import PaperTable
from vzip.report.protocols import lay_out_published, protocol_names, read_protocol
from vzip.report.table_files import read_table, table_names
from vzip.report.table_fill import fill
from vzip.report.table_format import FORMATS, lay_out, to_csv
from vzip.results.layout import Layout, print_layout, to_latex, to_markdown
from vzip.results.record import Run, find_runs
from vzip.sweep.execute import evaluate_words
from vzip.sweep.plan import Planned, Todo, hours, missing, plan, runs_of

_OF_THE_PAPER = ("run", "dry_run", "hours", "gpu", "train", "only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip table`."""
    parser.add_argument("table", nargs="?", help="1 to 7, 10 to 18, scenes, scenes5, or a .json file")
    parser.add_argument("words", nargs="*", metavar="key=value", help="with --run: further overrides for eval.py")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where records are, and go (runs)")
    parser.add_argument("--format", choices=FORMATS, help="to standard output; without it a table for the terminal")
    parser.add_argument("--run", action="store_true", help="run what is missing")
    parser.add_argument("--dry-run", action="store_true", help="only say what --run would run, with hours")
    parser.add_argument("--hours", action="store_true", help="how long each row takes on --gpu, and nothing else")
    parser.add_argument("--gpu", help="with --hours: 3090, a100_80, ... (src/vzip/bench/gpus.json)")
    parser.add_argument("--num-gpus", type=int, default=1, help="with --hours: of them that share the work (1)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="with --hours: share of the GPU's peak (0.4)")
    parser.add_argument("--train", metavar="LAUNCHER", help="with --run: trainings too, with launcher=LAUNCHER")
    parser.add_argument(
        "--protocol", metavar="NAME", help=f"instead: the numbers of another source: {', '.join(protocol_names())}"
    )
    parser.add_argument("--only", help="columns, numbers of tokens or methods, by commas: gqa,mme,64,visionzip")


def main(args: argparse.Namespace) -> int:
    """Runs what is asked for and prints. Returns 1 if a run failed."""
    if args.protocol is not None:
        return print_protocol(args)
    if args.table is None:
        raise ConfigError(f"say which table: {', '.join(table_names())}, a .json file, or --protocol NAME.")
    table = select(read_table(args.table), args.only)
    if args.words and not (args.run or args.dry_run or args.hours):
        raise ConfigError(f"{' '.join(args.words)}: overrides for eval.py need --run.")
    if args.train is not None and not (args.run or args.dry_run):
        raise ConfigError(f"--train {args.train} needs --run.")
    if args.hours:
        return tell_hours(table, args)
    if args.gpu is not None:
        raise ConfigError(f"--gpu {args.gpu} needs --hours.")
    planned = plan(table, args.words, args.runs)
    found = Results(find_runs(args.runs), find_benches(args.runs))
    todos = missing(table, planned, args.words, args.runs, found.runs, found.benches)
    failed: list[str] = []
    if args.run or args.dry_run:
        print_todos(todos, found.runs)
    if args.run and not args.dry_run:
        failed = run_all(todos, args.train)
        found = Results(find_runs(args.runs), find_benches(args.runs))
        todos = missing(table, planned, args.words, args.runs, found.runs, found.benches)
    print_table(table, planned, found, args.format)
    left = [todo for todo in todos if todo.program == "judge"] if args.run else todos
    if args.format is None and left and not args.dry_run:
        print_todos(left, found.runs)
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


def print_protocol(args: argparse.Namespace) -> int:
    """Prints what another source published, and our own scores of the same model, method and budget."""
    given = [args.table, *(f"--{name.replace('_', '-')}" for name in _OF_THE_PAPER if getattr(args, name)), *args.words]
    given = [word for word in given if word is not None]
    if given or args.format == "csv":
        raise ConfigError(
            f"--protocol {args.protocol}: {' '.join(given) or '--format csv'} goes with a table of the paper; beside"
            " --protocol stand --runs and --format markdown or latex alone."
        )
    for layout in lay_out_published(read_protocol(args.protocol), find_runs(args.runs)):
        _print_layout(layout, args.format)
    return 0


def tell_hours(table: PaperTable, args: argparse.Namespace) -> int:
    """Prints how long the rows take."""
    from vzip.bench.forecast import Assumptions
    from vzip.sweep.hours import find_gpu, forecast, print_hours

    gpu = find_gpu(args.gpu)
    if args.num_gpus < 1 or not 0 < args.utilisation <= 1:
        raise ConfigError(
            f"--num-gpus {args.num_gpus}, --utilisation {args.utilisation:g}: at least 1, and above 0 and at most 1."
        )
    assumed = Assumptions(utilisation=args.utilisation)
    planned = plan(table, args.words, args.runs)
    lines = list(forecast(table, planned, find_runs(args.runs), gpu, args.num_gpus, assumed))
    print_hours(lines, args.gpu, gpu, args.num_gpus, assumed)
    return 0


@dataclass(frozen=True)
class Results:
    """What there is of ours below the runs folder."""

    runs: Sequence[Run]
    benches: Sequence[Bench]


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
    if not rows:
        raise ConfigError(
            f"--only {only}: no row has both one of these numbers of tokens and one of these methods; rows of table"
            f" {table.name}: {'; '.join(row.label for row in table.rows)}."
        )
    kept = {row.label for row in rows} | {row.base for row in rows}
    return replace(
        table,
        columns=tuple(c for c in table.columns if c.key in keys),
        # The paper's printed average stays one over all of its columns; ours says over how many of them it is.
        average_over=table.average_over if keys & set(table.average_over) else (),
        rows=tuple(row for row in table.rows if row.label in kept),
    )


def print_todos(todos: Sequence[Todo], runs: Sequence[Run]) -> None:
    """Says on standard error what fills the blank cells, with the hours where a record of the model here tells them."""
    if not todos:
        print("nothing is missing", file=sys.stderr)
        return
    known = [hours(todo, runs) for todo in todos]
    print("for the blank cells (--run runs it):", file=sys.stderr)
    for todo, estimate in zip(todos, known, strict=True):
        time = "" if estimate is None else f"   about {estimate:.1f} h" if estimate >= 0.05 else "   minutes"
        print(f"  {todo.command}{time}", file=sys.stderr)
    unknown = sum(todo.program == "eval.py" and estimate is None for todo, estimate in zip(todos, known, strict=True))
    if any(todo.makes is not None for todo in todos):
        print("  train.py needs --train LAUNCHER beside --run (python -m vzip list launcher)", file=sys.stderr)
    if any(todo.program == "judge" for todo in todos):
        print("  a judge model costs money: --run leaves it to you (python -m vzip judge --help)", file=sys.stderr)
    if unknown:
        print(
            f"  hours of {unknown} evaluations are not known: no record of their model on this machine has all of their"
            " benchmarks; eval.limit=20 makes one in minutes",
            file=sys.stderr,
        )


def run_all(todos: Sequence[Todo], launcher: str | None) -> list[str]:
    """Runs the commands in order. An interrupted one goes on where it stopped.

    Args:
        todos: what to run; a judge model costs money, so asking one is left to the user.
        launcher: the launcher of trainings; None: none is run, and what waits for one is left out.

    Returns:
        The commands that failed; the others are run all the same.
    """
    failed: list[str] = []
    for number, todo in enumerate(todos, 1):
        if todo.program == "judge" or (todo.program == "train.py" and launcher is None):
            continue
        if todo.waits_for is not None and not todo.waits_for.is_dir():
            print(f"left out, for {todo.waits_for} is not there: {todo.command}", file=sys.stderr, flush=True)
            continue
        print(f"{number}/{len(todos)} row {todo.label}: {todo.command}", file=sys.stderr, flush=True)
        if not run_one(todo, launcher):
            failed.append(todo.command)
    return failed


def run_one(todo: Todo, launcher: str | None) -> bool:
    """Runs one command; whether it succeeded.

    Evaluations run in this process, so that the model stays loaded for the next one, unless they ask for several.
    """
    root = config_dir().parent
    if todo.program == "train.py":
        return _process([str(root / "train.py"), *todo.words, f"launcher={launcher}"])
    if todo.program == "bench":
        return _process(["-m", "vzip", "bench", *todo.words])
    if todo.config["launcher"]["num_processes"] not in (None, 1):
        return _process([str(root / "eval.py"), *todo.words])
    try:
        evaluate_words(todo.words)
    except VzipError as error:
        log.tell_error(error)
        return False
    return True


def _process(words: Sequence[str]) -> bool:
    from vzip.train.launch import LaunchError, run_command  # only here: it takes its time

    try:
        run_command([sys.executable, *words])
    except LaunchError:  # its own message is above
        return False
    return True


def print_table(table: PaperTable, planned: Mapping[str, Planned], found: Results, form: str | None) -> None:
    """Prints the table in a format, or for the terminal."""
    runs = {label: runs_of(entry, found.runs) for label, entry in planned.items()}
    trainings = {label: entry.training_directory for label, entry in planned.items()}
    rows = fill(table, runs, found.benches, {label: path for label, path in trainings.items() if path is not None})
    if form == "csv":
        print(to_csv(table, rows), end="")
        return
    _print_layout(lay_out(table, rows), form)


def _print_layout(layout: Layout, form: str | None) -> None:
    if form is None:
        print_layout(layout, Console())
    else:
        print({"markdown": to_markdown, "latex": to_latex}[form](layout), end="")
