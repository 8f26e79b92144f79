"""Finished runs against their vanilla run, answer by answer.

  python -m vzip agreement RUN OTHER                        share of answers that are vanilla's, with 95 % intervals
  python -m vzip agreement RUN OTHER --easy-from CONTROL    and the share right on hard and on easy questions
  python -m vzip agreement RUN --vanilla OTHER              against a run that is named

Hard are the questions that CONTROL answers wrongly, easy all others; CONTROL is usually a run on a down-scaled image
(compressor=resized): what it answers needs few tokens, and says little of a method. RUN is a run directory or its
run.json (python -m vzip runs); the vanilla run is looked for in the runs tree.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from vzip.cli.compare import find_vanilla
from vzip.errors import ManifestError
from vzip.results.agreement import Group, agreement, by_difficulty
from vzip.results.averages import Share
from vzip.results.layout import Layout, Piece, print_layout
from vzip.results.record import Run, metrics_of, read_record, read_samples, record_path, title_of

HEAD = ("run", "task", "questions", "as vanilla, % [95 %]")
HEAD_SPLIT = ("hard", "right, % [95 %]", "easy", "right, % [95 %]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories, or their run.json")
    parser.add_argument("--vanilla", type=Path, metavar="RUN", help="by default searched in the runs tree of the first")
    parser.add_argument("--easy-from", type=Path, metavar="RUN", help="splits questions by whether this run is right")


def main(args: argparse.Namespace) -> int:
    """Prints the table; every run is read and checked before anything is printed."""
    runs = [_run(path) for path in args.runs]
    vanilla_path = args.vanilla or find_vanilla(runs[0].record, args.runs[0])
    if vanilla_path is None:
        raise ManifestError(
            f"{args.runs[0]}: no run of its model without compression on the same questions is in its runs folder."
            " Make one (eval.py compressor=none budget=full), or name it: --vanilla RUN."
        )
    vanilla, control = _run(vanilla_path), None if args.easy_from is None else _run(args.easy_from)
    paths = {run.path.resolve() for run in runs}
    runs = runs if vanilla.path.resolve() in paths else [vanilla, *runs]
    print_layout(lay_out(runs, vanilla, control), Console())
    return 0


def _run(path: Path) -> Run:
    return Run(record_path(path), read_record(path))


def lay_out(runs: list[Run], vanilla: Run, control: Run | None) -> Layout:
    """One block a run, one line a task that all involved have."""
    blocks = tuple(tuple(_lines(run, vanilla, control)) for run in runs)
    remarks = [f"vanilla: {vanilla.path}"]
    if control is not None:
        remarks += [
            f"hard: questions that {title_of(control.record)} answers wrongly, easy: all others ({control.path})",
            "right: share answered rightly, whatever the task's own metric; empty where answers are not right or wrong",
        ]
    if any(run.record["provisional"] for run in runs):
        remarks.append("(provisional): a limit, or code that is not committed")
    head = HEAD if control is None else HEAD + HEAD_SPLIT
    return Layout("answers beside vanilla's", head, blocks, tuple(remarks), left=frozenset({0, 1}))


def _lines(run: Run, vanilla: Run, control: Run | None) -> Iterator[tuple[Piece, ...]]:
    answers, others = read_samples(run.path), read_samples(vanilla.path)
    controls = None if control is None else read_samples(control.path)
    shared = [task for task in answers if task in others and (controls is None or task in controls)]
    if not shared:
        raise ManifestError(
            f"{run.path}: no task with answers in common with {vanilla.path}"
            + (f" and {control.path}" if control is not None else "")
            + f"; it has {', '.join(answers)}."
        )
    for number, task in enumerate(shared):
        texts = [title_of(run.record) if number == 0 else "", task, str(len(answers[task]))]
        texts.append(_cell(agreement(answers[task], others[task], task)))
        if controls is not None:
            groups = _split(run, answers[task], controls[task], task)
            texts += ["", "", "", ""] if groups is None else [text for group in groups for text in _of_group(group)]
        yield tuple(map(Piece, texts))


def _split(run: Run, rows: list[dict], controls: list[dict], task: str) -> tuple[Group, Group] | None:
    """By the first of the task's metrics whose answers are right or wrong."""
    found = (by_difficulty(rows, controls, task, metric) for metric in metrics_of(run.record, task))
    return next((groups for groups in found if groups is not None), None)


def _of_group(group: Group) -> tuple[str, str]:
    return str(group.num_questions), "" if group.right is None else _cell(group.right)


def _cell(share: Share) -> str:
    mean = f"{100 * share.point:.1f}"
    return (
        mean if share.low is None or share.high is None else f"{mean} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
    )
