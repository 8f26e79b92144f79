"""Measures what visual tokens cost: vanilla, vzip and the published way (eager_maps) side by side.

  python -m vzip bench                                        the shipped model
  python -m vzip bench model=clip_l_336 num_crops=5           the vision tower of LLaVA alone
  python -m vzip bench model=llava15_7b budget=64tok          the true 7B shape with random weights (a GPU)
  python -m vzip bench model=video_llava_7b num_crops=80      a video of 80 frames (methods=vzip: vanilla has no room)
  python -m vzip bench model=mini_gemini_7b                   with its second vision tower and mining
  python -m vzip bench model=DIR weights=pretrained           a checkpoint directory

Needs torch and transformers alone; the plot needs matplotlib.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import Progress

from vzip.bench import report, settings, shapes
from vzip.bench.run import measure
from vzip.errors import MissingPackageError, RunExistsError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the ``key=value`` words."""
    keys = "\n".join(f"  {key:<15} {text} [{settings.default_word(key)}]" for key, text in settings.HELP.items())
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, see below")
    parser.epilog = f"keys [default]:\n{keys}"


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes ``bench.json`` and ``bench.png``.

    Raises:
        VzipError: for anything the user can mend, before anything is built or written.
    """
    chosen = settings.parse(args.overrides)
    directory = chosen.out_directory(shapes.resolve(chosen.model))
    if (directory / "bench.json").exists() and not chosen.overwrite:
        raise RunExistsError(
            f"{directory} already holds a bench.json; give another one as out=DIR, or overwrite=true to replace it"
        )
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("passes", total=None)
        result = measure(
            chosen,
            log=lambda line: console.print(line, highlight=False),
            on_step=lambda done, total: progress.update(task, completed=done, total=total),
        )
    report.print_result(result, console)
    report.write_json(result, directory / "bench.json")
    console.print(f"wrote {directory / 'bench.json'}", highlight=False)
    try:
        report.write_plot(result, directory / "bench.png")
    except MissingPackageError as error:
        console.print(f"no plot: {error}", highlight=False)
    else:
        console.print(f"wrote {directory / 'bench.png'}", highlight=False)
    return 0
