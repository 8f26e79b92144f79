"""What every figure is: a drawing, the numbers behind it, and a caption; four files of one name."""

from __future__ import annotations

import csv
import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import RunExistsError
from vzip.results.files import make_folder, replace_file, written_aside

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = ("png", "svg", "csv", "txt")


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        figure: what matplotlib saves.
        rows: the numbers behind it; all have the keys of the first.
        caption: what was measured, on what, and how.
    """

    figure: Figure
    rows: Sequence[Mapping[str, Any]]
    caption: str


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], most_columns: int) -> None:
    """A legend under a figure, in as many columns as its longest name lets into the width; long names are broken."""
    width = int(10 * figure.get_figwidth())  # characters, about
    shown = [textwrap.fill(label, max(20, width - 10), break_long_words=False) for label in labels]
    longest = max(len(line) for label in shown for line in label.splitlines())
    figure.legend(
        handles,
        shown,
        loc="outside lower center",
        ncols=max(1, min(most_columns, len(shown), width // (longest + 8))),
        frameon=False,
    )


def check_free(folder: Path, name: str, overwrite: bool) -> None:
    """Raises RunExistsError where one of a figure's files is there and not to be replaced."""
    there = [f"{name}.{ending}" for ending in ENDINGS if (folder / f"{name}.{ending}").exists()]
    if there and not overwrite:
        raise RunExistsError(
            f"{folder} already holds {', '.join(there)}; give another --out DIR, or --overwrite to replace them."
        )


def write_drawing(drawing: Drawing, folder: Path, name: str) -> list[Path]:
    """Writes PNG, SVG, CSV and caption; returns their paths."""
    import matplotlib

    make_folder(folder)
    paths = [folder / f"{name}.{ending}" for ending in ENDINGS]
    with (
        matplotlib.rc_context({"svg.hashsalt": name}),  # the same numbers give the same file
        warnings.catch_warnings(),
    ):
        # A file's name may be in a script that the font lacks; boxes are drawn then.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        for path, metadata in zip(paths[:2], ({}, {"Date": None}), strict=True):
            with written_aside(path) as aside:
                drawing.figure.savefig(aside, dpi=150, metadata=metadata)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(drawing.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(drawing.rows)
    replace_file(paths[2], text.getvalue())
    replace_file(paths[3], drawing.caption + "\n")
    return paths
