"""``python -m vzip COMMAND``: one table of commands, each living in its own module.

A module offers ``add_arguments(parser)`` and ``main(args) -> int`` and is imported only when its command is chosen, so
that ``bench`` runs where lmms-eval, datasets or Hydra are not installed. ``eval`` and ``train`` are the programs
``eval.py`` and ``train.py`` themselves, which a wheel brings along.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vzip import log, starting
from vzip.errors import ConfigError, VzipError, nearest
from vzip.installed import checkout, optional_packages
from vzip.log import USER_ERROR
from vzip.paths import naming_impossible_paths


@dataclass(frozen=True)
class Command:
    """Where a command lives and what it is for; ``extra`` holds the optional packages that it uses."""

    module: str
    help: str
    extra: str | None = None


PROGRAMS: Mapping[str, str] = {
    "eval": "evaluate: what `python eval.py` does, from any folder",
    "train": "train: what `python train.py` does, from any folder",
}

COMMANDS: Mapping[str, Command] = {
    "list": Command("vzip.cli.listing", "recipes and the options of every group, for eval and train"),
    "runs": Command("vzip.cli.runs", "the evaluations in runs/, with their primary scores"),
    "compare": Command("vzip.cli.compare", "a run against its recipe's expected numbers, or against another run"),
    "table": Command(
        "vzip.sweep.table", "a table of the paper with our runs beside it; --run evaluates what is missing"
    ),
    "judge": Command("vzip.cli.judge", "a judge model's scores of answers: videos, MM-Vet, LLaVA-Bench", "eval"),
    "demo": Command("vzip.cli.demo", "the built-in model on its benchmark: every method and budget in one table"),
    "demo serve": Command("vzip.cli.page", "a page: vanilla and compressed answers side by side", "demo"),
    "ask": Command("vzip.cli.ask", "a question about an image file"),
    "chat": Command("vzip.cli.chat", "a dialogue about images in the terminal"),
    "serve": Command("vzip.cli.serve", "an OpenAI-compatible server: vLLM with compression"),
    "embed": Command("vzip.cli.embed", "visual tokens as a file, which vLLM takes in place of an image"),
    "bench": Command("vzip.cli.bench", "what compression costs and saves: time by stage, memory, FLOPs"),
    "bench serve": Command("vzip.cli.bench_serve", "what serving gains: requests a second, latencies, cache blocks"),
    "fidelity": Command("vzip.cli.fidelity", "compressed against vanilla on a folder of images, without labels"),
    "figure": Command("vzip.cli.figure", "a figure of the paper, with the numbers behind it"),
    "agreement": Command("vzip.cli.agreement", "runs against vanilla: same answers, hard and easy questions"),
    "view": Command("vzip.cli.view", "a page of a run's answers, or of two runs' beside each other: what broke"),
    "overlap": Command("vzip.cli.overlap", "which patches methods keep in common on a folder of images"),
    "leaderboard": Command("vzip.cli.leaderboard", "methods beside each other: retention, noise, time, memory", "eval"),
    "memory": Command("vzip.cli.memory", "what a training or an inference needs on each device, and for what"),
    "prefetch": Command("vzip.cli.prefetch", "what runs need from the hub, fetched for machines without a network"),
    "merge": Command("vzip.cli.merge", "a plain Hugging Face checkpoint with the tuned projector in it"),
    "push": Command("vzip.cli.push", "tuned weights to the hub, with a model card"),
    "data": Command("vzip.cli.data", "fetch and check training data; what a part of it consists of", "train"),
    "scenes": Command("vzip.demo.benchmark", "write or check the built-in benchmark's data"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, the command's own, 2: a user's error, 130: interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    log.setup()
    try:
        starting.over()
        if not words or words[0] in ("-h", "--help"):
            print(usage(), flush=True)
            return 0 if words else USER_ERROR
        if words[0] not in PROGRAMS:
            code = run(words[0], words[1:])
            sys.stdout.flush()  # here, where a reader that has gone is no traceback
            return code
        script = str(checkout() / f"{words[0]}.py")
    except VzipError as error:
        return log.tell_error(error)
    except KeyboardInterrupt as error:
        return log.tell_interruption(error)
    except OSError as error:
        return log.output_failed(error)
    sys.argv = [script, *words[1:]]
    try:
        with optional_packages(f"`vzip {words[0]}`"):
            runpy.run_path(script, run_name="__main__")  # tells of errors itself
    except VzipError as error:
        return log.tell_error(error)
    except KeyboardInterrupt as error:  # while it was being imported
        return log.tell_interruption(error)
    return 0


def run(name: str, words: Sequence[str]) -> int:
    """Imports the command's module, reads its arguments and runs it.

    Raises:
        ConfigError: there is no such command.
        MissingPackageError: the command needs a package that is not installed.
    """
    if words and f"{name} {words[0]}" in COMMANDS:  # a command of two words
        name, words = f"{name} {words[0]}", words[1:]
    if name not in COMMANDS:
        known = [*COMMANDS, *PROGRAMS]
        raise ConfigError(f"'{name}': no such command{nearest(name, known)}; commands: {', '.join(known)}.")
    command = COMMANDS[name]
    with optional_packages(f"`{name}`", command.extra):
        module = importlib.import_module(command.module)
        parser = argparse.ArgumentParser(
            prog=f"python -m vzip {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        with naming_impossible_paths():
            return int(module.main(_parse(parser, list(words))))


def _parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """Options may stand before, between and after the words (``--model NAME budget=32tok``)."""
    try:
        return parser.parse_intermixed_args(words)
    except TypeError:  # argparse cannot, for a command that has commands of its own
        return parser.parse_args(words)


def usage() -> str:
    """The list of commands."""
    helps = {**PROGRAMS, **{name: command.help for name, command in COMMANDS.items()}}
    first = "usage: python -m vzip COMMAND [...]   (COMMAND --help for more)"
    return "\n".join([first, "", *(f"  {name:<11} {text}" for name, text in helps.items())])
