"""Which patches a method kept and which it merged, drawn over the image for people to read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT_COLOR = "#c2185b"
GROUP_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by the colour-blind too
OTHER_COLOR = "#8c8c8c"  # of all smaller groups: more colours than these are noise
DIMMED = 0.25  # what is left of the grey image, the rest is white
TINT = 0.45  # how much of a group's colour lies over it
DPI = 110
MAX_CROPS = 16  # of a sheet; of a longer video these, evenly spread
_PANEL, _MARGIN, _GAP = 4.4, 0.15, 0.3  # inches
_MAX_LINES = 6  # of a question or an answer


@dataclass(frozen=True)
class Crop:
    """What a method made of one input of the vision tower.

    Attributes:
        image: as the tower saw it, RGB.
        kept: bool ``[rows, cols]``, patches that are tokens of their own.
        group: int64 ``[rows, cols]``, the group with which each patch merges, its target among them; -1: none.
        targets: of each group the patch that the others join, row by row; -1 where the method has not said.
    """

    image: Image.Image
    kept: np.ndarray
    group: np.ndarray
    targets: Sequence[int] = ()

    @cached_property
    def colors(self) -> list[str]:
        """Of each group: the largest have colours, in order of size."""
        sizes = np.bincount(self.group[self.group >= 0], minlength=len(self.targets))
        order = np.argsort(-sizes, kind="stable")
        named = dict(zip(order.tolist(), GROUP_COLORS, strict=False))
        return [named.get(group, OTHER_COLOR) for group in range(len(sizes))]

    def spread(self, cells: np.ndarray) -> np.ndarray:
        """``[rows, cols, ...]`` -> one value a pixel."""
        (height, width), (rows, cols) = (self.image.height, self.image.width), self.kept.shape
        y, x = (np.arange(height) * rows // height, np.arange(width) * cols // width)
        return cells[y[:, None], x[None, :]]


@dataclass(frozen=True)
class Sheet:
    """Crops that are shown together, in reading order.

    Attributes:
        name: what they are; empty where that needs no word.
        crops: of one size.
        num_columns: how many stand side by side.
    """

    name: str
    crops: Sequence[Crop]
    num_columns: int = 1


@dataclass(frozen=True)
class Words:
    """What is written above the drawing; empty parts are left out."""

    title: str
    tokens: str = ""
    question: str = ""
    answer: str = ""
    notes: Sequence[str] = field(default=())


def kept_pixels(crop: Crop) -> np.ndarray:
    """The crop, uint8 ``[height, width, 3]``: kept patches as they are, the others faded and without colour."""
    pixels = np.asarray(crop.image.convert("RGB"))
    return np.where(crop.spread(crop.kept)[..., None], pixels, _faded(pixels).round().astype(np.uint8))


def merged_pixels(crop: Crop) -> np.ndarray:
    """The same faded where patches merge, with the colours of the large groups over it; white elsewhere."""
    from matplotlib.colors import to_rgb

    faded = _faded(np.asarray(crop.image.convert("RGB")))
    rgb = 255 * np.array([to_rgb(color) for color in [*crop.colors, OTHER_COLOR]])
    share = np.array([0.0 if color == OTHER_COLOR else TINT for color in [*crop.colors, OTHER_COLOR]])
    group = crop.spread(crop.group)
    over = share[group][..., None]
    return np.where(group[..., None] >= 0, (1 - over) * faded + over * rgb[group], 255).round().astype(np.uint8)


def _faded(pixels: np.ndarray) -> np.ndarray:
    grey = pixels.astype(np.float64) @ (0.299, 0.587, 0.114)
    return np.repeat((DIMMED * grey + (1 - DIMMED) * 255)[..., None], 3, axis=-1)


def outline(mask: np.ndarray, inset: float = 0.0) -> np.ndarray:
    """Where a set of cells ends: lines ``[L, 2, 2]`` from (x, y) to (x, y), in cells, ``inset`` towards the inside."""
    around = np.pad(mask, 1)
    near, far = inset, 1 - inset
    sides = (  # the neighbour on that side, and where the side's line runs
        (around[:-2, 1:-1], (0, near), (1, near)),
        (around[2:, 1:-1], (0, far), (1, far)),
        (around[1:-1, :-2], (near, 0), (near, 1)),
        (around[1:-1, 2:], (far, 0), (far, 1)),
    )
    lines = []
    for neighbour, start, end in sides:
        y, x = np.nonzero(mask & ~neighbour)
        lines.append(np.stack([np.stack([x + start[0], y + start[1]], 1), np.stack([x + end[0], y + end[1]], 1)], 1))
    return np.concatenate(lines).astype(np.float64)


def draw_overlay(sheets: Sequence[Sheet], words: Words) -> Figure:
    """A row a sheet: left what is kept, right (where the method merges) which patches merge into which.

    Args:
        sheets: at least one.
        words: written above, broken to the width; read as plain text.
    """
    from matplotlib.figure import Figure  # slow to import; only figures need it
    from matplotlib.legend_handler import HandlerTuple

    merges = any((crop.group >= 0).any() for sheet in sheets for crop in sheet.crops)
    num_panels = 2 if merges else 1
    width = 2 * _MARGIN + num_panels * _PANEL + (num_panels - 1) * _GAP
    figure = Figure(figsize=(width, 1), dpi=DPI)
    lines = _lines(words, width - 2 * _MARGIN, figure)
    above = _MARGIN + sum(height for _, height, _ in lines)
    titles = 0.32
    heights = [_PANEL * (canvas := _mosaic(sheet, kept_pixels)).shape[0] / canvas.shape[1] for sheet in sheets]
    handles, labels = _legend(sheets)
    below = 0.1 + 0.27 * math.ceil(len(handles) / 2)
    total = above + sum(height + titles for height in heights) + below
    figure.set_size_inches(width, total)

    top = _MARGIN
    for text, height, look in lines:
        figure.text(_MARGIN / width, 1 - top / total, text, va="top", parse_math=False, **look)
        top += height
    for sheet, height in zip(sheets, heights, strict=True):
        top += titles + height
        for panel, draw in enumerate((_draw_kept, _draw_merged)[:num_panels]):
            left = _MARGIN + panel * (_PANEL + _GAP)
            axes = figure.add_axes((left / width, 1 - top / total, _PANEL / width, height / total))
            axes.set_axis_off()
            draw(axes, sheet)
    if not handles:
        return figure

    figure.legend(
        handles,
        labels,
        loc="lower center",
        bbox_to_anchor=(0.5, 0.02 / total),
        ncols=2,
        frameon=False,
        fontsize=11,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)},
        handlelength=3 if merges else 1.5,
        handletextpad=0.6,
        columnspacing=1.5,
    )
    return figure


def as_image(figure: Figure) -> Image.Image:
    """A figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():  # an answer may be in a script that the font lacks; boxes are drawn then
        warnings.filterwarnings("ignore", "Glyph .* missing")
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _lines(words: Words, width: float, figure: Figure) -> list[tuple[str, float, dict[str, Any]]]:
    """Text with its height in inches and its look, broken to ``width`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.font_manager import FontProperties

    renderer = FigureCanvasAgg(figure).get_renderer()
    parts: list[tuple[str, dict[str, Any]]] = [
        (words.title, {"fontsize": 16, "fontweight": "bold"}),
        (words.tokens, {"fontsize": 13}),
        *((note, {"fontsize": 11, "color": "0.35"}) for note in words.notes),
        (words.question and f"Question: {words.question}", {"fontsize": 13}),
        (words.answer and f"Answer: {words.answer}", {"fontsize": 13, "fontweight": "bold"}),
    ]
    found = []
    for text, look in parts:
        if not text:
            continue
        font = FontProperties(size=look["fontsize"], weight=look.get("fontweight"))

        def measure(line: str, font: FontProperties = font) -> float:
            return renderer.get_text_width_height_descent(line, font, False)[0] / DPI

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            broken = wrapped(text, width, measure)
        found.append(("\n".join(broken), len(broken) * look["fontsize"] * 1.25 / 72 + 0.04, look))
    return found


def wrapped(text: str, width: float, measure: Callable[[str], float], most: int = _MAX_LINES) -> list[str]:
    """Text broken into lines no wider than ``width`` by ``measure``, at spaces where there are any."""
    lines: list[str] = []
    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            if measure(f"{line} {word}".strip()) <= width:
                line = f"{line} {word}".strip()
                continue
            if line:
                lines.append(line)
            while measure(word) > width and len(word) > 1:  # no space to break at, as in Chinese
                fits = max(1, next(n for n in range(len(word), 0, -1) if n == 1 or measure(word[:n]) <= width))
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
        while measure(lines[-1]) > width and len(lines[-1]) > 4:
            lines[-1] = f"{lines[-1][:-5].rstrip()} ..."
    return lines


def _shown(sheet: Sheet) -> list[Crop]:
    """At most ``MAX_CROPS`` of a sheet, the first and the last among them."""
    if len(sheet.crops) <= MAX_CROPS:
        return list(sheet.crops)
    return [sheet.crops[n] for n in np.linspace(0, len(sheet.crops) - 1, MAX_CROPS, dtype=int)]


def _corners(sheet: Sheet) -> list[tuple[Crop, int, int]]:
    """Each crop with x and y of its upper left pixel in the mosaic."""
    crops, gap = _shown(sheet), max(2, sheet.crops[0].image.width // 40)
    width, height = crops[0].image.width + gap, crops[0].image.height + gap
    columns = min(sheet.num_columns, len(crops))
    return [(crop, n % columns * width, n // columns * height) for n, crop in enumerate(crops)]


def _mosaic(sheet: Sheet, pixels: Callable[[Crop], np.ndarray]) -> np.ndarray:
    corners = _corners(sheet)
    right, bottom = (
        max(c) for c in zip(*((x + c.image.width, y + c.image.height) for c, x, y in corners), strict=True)
    )
    canvas = np.full((bottom, right, 3), 255, np.uint8)
    for crop, x, y in corners:
        canvas[y : y + crop.image.height, x : x + crop.image.width] = pixels(crop)
    return canvas


def _draw_kept(axes: Axes, sheet: Sheet) -> None:
    axes.imshow(_mosaic(sheet, kept_pixels))
    for crop, x, y in _corners(sheet):
        if not crop.kept.all():
            _add_outline(axes, crop, crop.kept, (x, y), KEPT_COLOR, 1.4, 0.0)
    num_kept, num_patches = (sum(int(n) for n in counts) for counts in zip(*_counts(sheet), strict=True))
    words = (
        f"all {num_patches} patches are kept"
        if num_kept == num_patches
        else f"{num_kept} of {num_patches} patches kept"
    )
    axes.set_title(_titled(sheet, words), fontsize=12, loc="left", pad=3)


def _draw_merged(axes: Axes, sheet: Sheet) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(_mosaic(sheet, merged_pixels))
    num_merged = num_groups = 0
    for crop, x, y in _corners(sheet):
        width, height = crop.image.width / crop.group.shape[1], crop.image.height / crop.group.shape[0]
        for group, (target, color) in enumerate(zip(crop.targets, crop.colors, strict=True)):
            own = crop.group == group
            if not own.any():
                continue
            if color != OTHER_COLOR:
                _add_outline(axes, crop, own, (x, y), color, 1.3, 0.07)
            if target >= 0:
                row, col = divmod(target, crop.group.shape[1])
                corner = (x + col * width - 0.5, y + row * height - 0.5)
                axes.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor="black", lw=1.2, zorder=3))
    for crop in sheet.crops:
        groups = np.unique(crop.group[crop.group >= 0])
        num_groups += len(groups)
        # A target that is kept is not merged itself: others are added to it.
        num_merged += int(((crop.group >= 0) & ~crop.kept).sum())
    axes.set_title(
        _titled(sheet, f"{num_merged} patches merge into {num_groups} tokens"), fontsize=12, loc="left", pad=3
    )
    axes.add_patch(  # where all around is white the panel would have no edge
        Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor="0.8", lw=0.8, clip_on=False)
    )


def _titled(sheet: Sheet, words: str) -> str:
    shown = f" ({MAX_CROPS} of {len(sheet.crops)} drawn)" if len(sheet.crops) > MAX_CROPS else ""
    return f"{sheet.name}{shown}: {words}" if sheet.name else words


def _counts(sheet: Sheet) -> list[tuple[int, int]]:
    return [(int(crop.kept.sum()), crop.kept.size) for crop in sheet.crops]


def _add_outline(
    axes: Axes, crop: Crop, mask: np.ndarray, corner: tuple[int, int], color: str, width: float, inset: float
) -> None:
    from matplotlib.collections import LineCollection

    scale = np.array([crop.image.width / mask.shape[1], crop.image.height / mask.shape[0]])
    lines = outline(mask, inset) * scale + np.array(corner) - 0.5
    axes.add_collection(LineCollection(list(lines), colors=color, linewidths=width, capstyle="projecting"))


def _legend(sheets: Sequence[Sheet]) -> tuple[list[Any], list[str]]:
    """Of what is drawn; nothing where all is kept."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def square(color: str) -> Line2D:
        return Line2D([], [], linestyle="", marker="s", markersize=7, color=color, markeredgecolor="black")

    crops = [crop for sheet in sheets for crop in sheet.crops]
    if all(crop.kept.all() for crop in crops):
        return [], []
    found: list[tuple[Any, str]] = [
        (Patch(facecolor="white", edgecolor=KEPT_COLOR, lw=1.4), "kept: a token of its own"),
        (Patch(facecolor="0.85"), "faded: not kept"),
    ]
    colors = {color for crop in crops for color in crop.colors}
    if colors:
        of_each = " of each" if len(crops) > 1 else ""
        large = tuple(square(color) for color in GROUP_COLORS if color in colors)
        found.append((large, f"largest groups{of_each}: target, what joins it"))
        if OTHER_COLOR in colors:
            found.append((square(OTHER_COLOR), "target of a smaller group (white: no group)"))
    return [handle for handle, _ in found], [label for _, label in found]
