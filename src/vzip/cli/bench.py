"""Measures what visual tokens cost: vanilla, vzip and the published way (eager_maps) side by side.

  python -m vzip bench                                        the shipped model
  python -m vzip bench model=clip_l_336 num_crops=5           the vision tower of LLaVA alone
  python -m vzip bench model=llava15_7b budget=64tok          the true 7B shape with random weights (a GPU)
  python -m vzip bench model=qwen2_5_vl_3b num_crops=8        a video of 8 temporal steps
  python -m vzip bench model=video_llava_7b num_crops=80      a video of 80 frames (methods=vzip: vanilla has no room)
  python -m vzip bench model=mini_gemini_7b                   with its second vision tower and mining
  python -m vzip bench model=DIR weights=pretrained           a checkpoint directory
  python -m vzip bench --train model=llava15_7b               training steps at 576 and 64 tokens, with projected hours
  python -m vzip bench --memory model=llava15_7b              peaks of training and answering beside their estimates
  python -m vzip bench --curves                               cost against visual tokens, crops, prompts at once, frames

Needs torch and transformers alone; the plot needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vzip.bench import settings
from vzip.bench.settings import CURVES, MEMORY, PASSES, TRAIN
from vzip.errors import MissingPackageError, RunExistsError
from vzip.json_files import read_json
from vzip.keys import describe
from vzip.progress import Progress
from vzip.results.files import check_writable
from vzip.results.owner import owning

if TYPE_CHECKING:
    from vzip.bench.curves import CurvesResult
    from vzip.bench.run import BenchResult
    from vzip.bench.training import SideResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the ``key=value`` words and the three other ways of measuring."""
    other = parser.add_mutually_exclusive_group()
    words: dict[str, Any] = {"action": "store_const", "dest": "mode", "default": PASSES}
    other.add_argument("--train", const=TRAIN, help="training steps of the projector, methods in turn", **words)
    other.add_argument(
        "--memory", const=MEMORY, help="peaks of training and answering, estimated and measured", **words
    )
    other.add_argument(
        "--curves",
        const=CURVES,
        help="time, memory and operations against visual tokens, crops, prompts (to batch_size), frames (to num_crops)",
        **words,
    )
    keys = "\n".join(describe(settings.KEYS, defaults=settings.shown_defaults()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    parser.epilog = f"keys [default]:\n{keys}\n\n" + "\n".join(_mode_words(mode) for mode in (TRAIN, MEMORY, CURVES))


def _mode_words(mode: settings.Mode) -> str:
    defaults = settings.shown_defaults(mode)
    own = ", ".join(f"{key}={defaults[key]}" for key in mode.defaults)
    return f"with {mode.flag}: {own}; without {', '.join(mode.unused)}"


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes ``bench.json`` and ``bench.png`` (or ``train.json``, ``memory.json``).

    Raises:
        VzipError: for anything the user can mend, before anything is built or written.
    """
    mode: settings.Mode = args.mode
    chosen = settings.parse(args.overrides, mode)
    directory = chosen.out_directory(mode)
    path = directory / f"{mode.name}.json"
    if path.exists() and not chosen.overwrite:
        raise RunExistsError(
            f"{directory} already holds a {path.name}; give another one as out=DIR, or overwrite=true to replace it"
        )
    check_writable(directory)
    with owning(directory, "out=DIR"):
        return _run(chosen, mode, path)


def _run(chosen: settings.BenchSettings, mode: settings.Mode, path: Path) -> int:
    from vzip.bench import report
    from vzip.bench.curves import CurvesResult
    from vzip.bench.run import BenchResult

    console, directory = Console(), path.parent
    with Progress("measuring", "passes" if mode in (PASSES, CURVES) else "steps") as progress:
        result = _measure_of(mode)(
            chosen,
            log=lambda line: console.print(line, highlight=False),
            on_step=progress.update,
        )
    if isinstance(result, CurvesResult):
        return _write_curves(result, path, console)
    report.print_result(result, console)
    result.write(path)
    console.print(f"wrote {path}", highlight=False)
    if not isinstance(result, BenchResult):
        return 0
    try:
        report.write_plot(result, directory / "bench.png")
    except MissingPackageError as error:
        console.print(f"no plot: {error}", highlight=False)
    else:
        console.print(f"wrote {directory / 'bench.png'}", highlight=False)
    return 0


def _write_curves(result: CurvesResult, path: Path, console: Console) -> int:
    """The record, its table, and a figure of each axis where matplotlib is installed."""
    result.write(path)
    from vzip.report.curves import tables
    from vzip.report.figures.curves import draw
    from vzip.report.figures.drawing import write_drawing

    record = read_json(path)
    console.print(tables(record), highlight=False, markup=False, soft_wrap=True)
    written = [path]
    try:
        for axis, drawing in draw(record).items():
            written += write_drawing(drawing, path.parent, f"curves_{axis}")
    except MissingPackageError as error:
        console.print(f"no figures: {error}", highlight=False)
    console.print(f"wrote {', '.join(map(str, written))}", highlight=False)
    return 0


def _measure_of(mode: settings.Mode) -> Callable[..., BenchResult | SideResult | CurvesResult]:
    if mode is CURVES:
        from vzip.bench.curves import measure_curves

        return measure_curves
    if mode is TRAIN:
        from vzip.bench.training import measure_training_steps  # only here: they load the training

        return measure_training_steps
    if mode is MEMORY:
        from vzip.bench.peaks import measure_peaks

        return measure_peaks
    from vzip.bench.run import measure

    return measure
