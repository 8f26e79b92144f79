"""Methods beside each other on one model and one protocol, with floors, noise, time and memory.

python -m vzip leaderboard eval.limit=100 budgets=64,32
python -m vzip leaderboard model=llava15_7b eval=quick budgets=192,128,64
python -m vzip leaderboard methods=visionzip,divprune,fastv:K=3 budgets=192 eval.limit=100
python -m vzip leaderboard --merge DIR                      with a colleague's results of the same model and protocol

Every method takes the same budget: visual tokens that enter the language model, and of a method that drops inside it
the average over its layers. Vanilla and floors (random, uniform; without methods=... all that there are) always run.
Runs are eval.py's own and lie where it puts them: finished ones are taken, interrupted ones go on. Then all methods are
timed in turns on one prompt. Writes leaderboard.json, leaderboard.md, pareto.svg, pareto.png and the runs' records.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from rich.console import Console

from vzip.config.board import FLOORS, board
from vzip.errors import ConfigError
from vzip.paths import expanded
from vzip.results.files import check_writable
from vzip.results.layout import print_layout
from vzip.results.owner import owning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help="budgets=192,128,64,32 methods=NAME,NAME:KEY=VALUE and what eval.py takes: model=NAME eval=NAME ...",
    )
    parser.add_argument("--merge", nargs="+", default=[], metavar="DIR", help="folders that other leaderboards wrote")
    parser.add_argument("--out", metavar="DIR", help="for the results (default: runs/leaderboard/MODEL/EVAL)")


def main(arguments: argparse.Namespace) -> int:
    """Runs, compares, prints and writes; returns 1 if a run failed."""
    from vzip.report import leaderboard as report
    from vzip.report.leaderboard_folder import merge, read_folder

    planned = board(arguments.settings)
    others = [expanded(folder) for folder in arguments.merge]
    for folder in others:
        read_folder(folder)  # what cannot be read is better known before hours of work
    out = planned.runs_dir / "leaderboard" / planned.name if arguments.out is None else expanded(arguments.out)
    if any(folder.resolve() == out.resolve() for folder in others):
        raise ConfigError(f"--merge {out}: is the folder that this leaderboard writes; give another --out DIR.")
    check_writable(out)
    if planned.added:
        print(f"floors added: {', '.join(planned.added)}", file=sys.stderr)
    with owning(out, "--out DIR"):
        from vzip.sweep.leaderboard import earlier_entries, entries_of, run_cells

        earlier_entries(out)  # an unreadable one is better known before hours of work
        finished, missing, failed = run_cells(planned, others)
        anew = any(cell.plan is not None and cell.plan.evaluation["overwrite"] for cell in planned.cells)
        entries, said = entries_of(finished, out, anew)
        merged, more = merge(entries, others)
        lines, pairs = report.compare(merged)
        floors = [name for name in FLOORS if any(entry.method == name for entry in merged)]
        added = f" (added: {', '.join(planned.added)})" if planned.added else ""
        layout = report.lay_out(lines, pairs, missing, [f"floors: {', '.join(floors)}{added}", *said, *more])
        print_layout(layout, Console())
        command = shlex.join(["python", "-m", "vzip", "leaderboard", *arguments.settings])
        if others:
            command += " " + shlex.join(["--merge", *arguments.merge])
        names = report.write(out, lines, pairs, missing, layout, FLOORS, command)
    print(f"written to {out}/: {', '.join(names)}, runs/")
    for text in failed:
        print(f"failed: {text}", file=sys.stderr)
    return 1 if failed else 0
