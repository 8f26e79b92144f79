"""What the figures of attention have in common: images that are looked at, means with intervals, maps over images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from vzip.analysis.seeing import SeeingTower
from vzip.results.stats import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

SCALE = (0.1, 100.0)  # of the maps' colours: times what a patch would have if all had the same
SOURCE = "arXiv 2412.04467"


@dataclass(frozen=True)
class Subject:
    """What a figure is made of.

    Attributes:
        number: the figure's.
        tower: that looks.
        images: of each its name, ``[1, 3, h, w]`` for the tower, and the same to look at; read once.
        where: what they are, in words.
        patch: (row, column) of the patch that was chosen, for the figures of one.
    """

    number: int
    tower: SeeingTower
    images: Iterable[tuple[str, Tensor, Image.Image]]
    where: str
    patch: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of patches."""
        return self.tower.tower.geometry.grid

    @property
    def num_patches(self) -> int:
        return self.tower.tower.geometry.num_patches


@dataclass(frozen=True)
class Mean:
    """A mean over images and its 95 % bootstrap interval; of one image the value itself."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        array = np.asarray(values, dtype=np.float64)
        low, high = mean_interval(array) if len(array) > 1 else (float(array[0]), float(array[0]))
        return cls(float(array.mean()), low, high)

    def text(self, factor: float = 1.0, unit: str = "") -> str:
        """As ``12.3 % [11.0, 13.6]``."""
        return f"{factor * self.value:.1f}{unit} [{factor * self.low:.1f}, {factor * self.high:.1f}]"


def table(keys: Sequence[str]) -> Callable[..., dict[str, Any]]:
    """What makes a line of numbers with all these keys, those not given empty."""

    def line(**values: Any) -> dict[str, Any]:
        assert set(values) <= set(keys), set(values) - set(keys)
        return {key: values.get(key, "") for key in keys}

    return line


def map_rows(line: Callable[..., dict[str, Any]], weights: Tensor, grid: tuple[int, int], **of_map: Any) -> list[Any]:
    """A line a patch: its row, its column and its share of the attention."""
    values = weights.double().reshape(grid).tolist()
    return [
        line(part="map", row=row, column=column, value=value, **of_map)
        for row, own in enumerate(values)
        for column, value in enumerate(own)
    ]


def show_image(axes: Axes, image: Image.Image, grid: tuple[int, int], title: str = "") -> None:
    """The image with patches as coordinates: patch (row, column) has its middle there."""
    rows, cols = grid
    axes.imshow(image, extent=(-0.5, cols - 0.5, rows - 0.5, -0.5))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=9, parse_math=False)  # names of files are no formulas


def show_map(axes: Axes, image: Image.Image, weights: Tensor, grid: tuple[int, int], title: str = "") -> AxesImage:
    """Shares of the attention as colours over the image, in grey: how many times as much as if all had the same.

    One scale for all maps, so that images and layers can be compared; returns what ``color_bar`` takes.
    """
    from matplotlib.colors import LogNorm

    pale = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.4)
    show_image(axes, pale, grid, title)
    values = weights.numel() * weights.double().cpu().reshape(grid).numpy()
    norm = LogNorm(*SCALE, clip=True)
    return axes.imshow(values, cmap="inferno", alpha=0.7, norm=norm, interpolation="nearest")


def color_bar(figure: Figure | SubFigure, shown: AxesImage, axes: Any) -> None:
    """The scale of ``show_map`` beside some panels."""
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, aspect=30, extend="both")
    bar.set_label("times the even share", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def mark(axes: Axes, patch: tuple[int, int], color: str, label: str | None = None) -> None:
    """A ring around a patch."""
    row, column = patch
    look: Mapping[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 2}
    axes.plot([column], [row], linestyle="", markeredgecolor=color, label=label, **look)


def curve(axes: Axes, layers: Sequence[int], means: Sequence[Mean], label: str, color: str) -> None:
    """A line over layers with its interval as a band."""
    axes.plot(layers, [mean.value for mean in means], marker="o", markersize=3, color=color, label=label)
    axes.fill_between(layers, [mean.low for mean in means], [mean.high for mean in means], color=color, alpha=0.2)


def what_was_seen(subject: Subject, num_images: int) -> str:
    """For captions: model, images, patches."""
    rows, cols = subject.grid
    return (
        f"Vision tower of {subject.tower.name} ({rows} x {cols} patches,"
        f" {subject.tower.tower.geometry.num_layers} layers); {num_images} image{'s' * (num_images != 1)} of"
        f" {subject.where}"
    )


def short(name: str) -> str:
    """A name that fits over a small image."""
    text = name.rsplit("/", 1)[-1]
    return text if len(text) <= 24 else f"...{text[-21:]}"
