"""The evaluations below a folder: what each was and its primary scores.

  python -m vzip runs                          every record in runs/
  python -m vzip runs gqa 64tok                only those with all of these words in path, recipe, model, method or task
  python -m vzip runs OTHER_FOLDER --json      for programs

`python -m vzip compare RUN` and `compare RUN OTHER` take what stands under "run".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vzip.errors import ConfigError
from vzip.results.layout import Layout, Piece, print_layout
from vzip.results.record import Run, find_runs, primary_scores, visual_tokens_of

_HEAD = ("recipe or model", "method", "tokens", "task", "score", "± s.e.", "questions", "date", "run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m vzip runs`."""
    parser.add_argument(
        "words", nargs="*", metavar="[DIR] WORD", help="a folder (runs), then words that a run must have, all of them"
    )
    parser.add_argument("--json", action="store_true", help="a list of objects instead of a table")


def main(args: argparse.Namespace) -> int:
    """Prints the records. Returns 1 if a record could not be read."""
    words = list(args.words)
    folder = Path(words.pop(0)) if words and Path(words[0]).is_dir() else Path("runs")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder. Name the folder that eval.py wrote to (paths.runs_dir).")
    unreadable: list[str] = []
    entries = [entry_of(run, folder) for run in find_runs(folder, unreadable=unreadable)]
    entries = sorted((entry for entry in entries if matches(entry, words)), key=lambda entry: str(entry["date"]))
    if args.json:
        print(json.dumps(entries, indent=1))
    elif entries:
        print_layout(lay_out_runs(entries, folder), Console())
    else:
        print(f"no record in {folder}" + (f" with {' and '.join(words)}" if words else ""))
    for message in unreadable:
        print(f"not read: {message}", file=sys.stderr)
    return 1 if unreadable else 0


def entry_of(run: Run, folder: Path) -> dict[str, Any]:
    """A record in short; scores in each benchmark's own unit."""
    record, config = run.record, run.record.get("config") or {}
    tokens, pruner = record["visual_tokens"], (config.get("pruner") or {}).get("name", "none")
    method = (config.get("compressor") or {}).get("name") or record["compressor"]["name"]
    return {
        "run": str(run.path.parent.relative_to(folder)),
        "recipe": config.get("recipe"),
        "model": (config.get("model") or {}).get("name") or record["model"].get("name_or_path"),
        "compressor": record["compressor"].get("settings", record["compressor"]["name"]),
        "pruner": (record.get("pruner") or {}).get("settings"),
        "method": method if pruner == "none" else f"{method}+{pruner}",
        "budget": (config.get("budget") or {}).get("name") or tokens["budget_per_crop"],
        "visual_tokens": list(visual_tokens_of(record)),
        "tasks": {
            task: {
                "metric": record["tasks"][task]["primary_metric"],
                "value": score.value,
                "standard_error": score.standard_error,
                "unit": record["tasks"][task]["unit"],
                "num_samples": score.num_samples,
            }
            for task, score in primary_scores(record).items()
        },
        "provisional": record["provisional"],
        "provisional_reasons": list(record.get("provisional_reasons", ())),
        "date": record.get("created"),
    }


def matches(entry: Mapping[str, Any], words: Sequence[str]) -> bool:
    """Whether every word stands somewhere in what names the run; upper and lower case are the same."""
    named = [entry[key] for key in ("run", "recipe", "model", "compressor", "method", "budget")]
    text = " ".join(str(name) for name in [*named, *entry["tasks"]]).casefold()
    return all(word.casefold() in text for word in words)


def lay_out_runs(entries: Sequence[Mapping[str, Any]], folder: Path) -> Layout:
    """One block a run, one line a task."""
    remarks = ["score: each benchmark's primary metric in its own unit"]
    if any(entry["provisional"] for entry in entries):
        remarks.append("*: provisional (a limit, or code that is not committed); --json says why")
    return Layout(
        f"runs in {folder}: {len(entries)}",
        _HEAD,
        tuple(_block(entry) for entry in entries),
        tuple(remarks),
        left=frozenset({0, 1, 3, 8}),
    )


def _block(entry: Mapping[str, Any]) -> tuple[tuple[Piece, ...], ...]:
    fewest, most = entry["visual_tokens"]
    tokens = "" if fewest is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
    method = f"{entry['method']}-{entry['budget']}"
    scores = [
        (
            task,
            f"{score['value']:.4g}" + ("*" if entry["provisional"] else ""),
            "" if score["standard_error"] is None else f"{score['standard_error']:.2g}",
            str(score["num_samples"]),
        )
        for task, score in entry["tasks"].items()
    ] or [("", "", "", "")]
    lines = []
    for number, score in enumerate(scores):
        own = (entry["recipe"] or entry["model"], method, tokens) if number == 0 else ("", "", "")
        where = ((entry["date"] or "")[:10], entry["run"]) if number == 0 else ("", "")
        lines.append(tuple(Piece(str(text)) for text in (*own, *score, *where)))
    return tuple(lines)
