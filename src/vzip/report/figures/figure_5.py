"""Figures 5, 12 and 13: attention layer by layer, on an image and counted: entropy, and what the top tenth has."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from vzip.analysis.attention import CLS, RECEIVED, each_layer, entropy, num_top, top_mass
from vzip.progress import Progress

from .attention import (
    SOURCE,
    Mean,
    Subject,
    color_bar,
    curve,
    map_rows,
    short,
    show_image,
    show_map,
    table,
    what_was_seen,
)
from .drawing import Drawing
from .figure_2 import COLORS, LABELS

KEYS = ("part", "score", "image", "layer", "row", "column", "value", "low", "high")
SHOWN = {5: 0, 12: 1, 13: 2}  # the image whose maps are drawn
MEASURES = ("entropy_nats", "top_10_percent")
MOST_COLUMNS = 10


@dataclass
class Layers:
    """By score and layer.

    Attributes:
        name, picture: of the shown image; None before it comes.
        maps: its distributions ``[P]``, by layer.
        values: by score, measure and layer, a value an image.
    """

    name: str = ""
    picture: Image.Image | None = None
    maps: dict[int, Tensor] = field(default_factory=dict)
    values: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    num_images: int = 0

    @property
    def scores(self) -> list[str]:
        return list(dict.fromkeys(score for score, _, _ in self.values))


def measure(subject: Subject, progress: Progress) -> Layers:
    """Reads the images one by one, a layer at a time."""
    found, tower = Layers(), subject.tower.tower
    for name, pixels, picture in subject.images:
        is_shown = found.num_images == SHOWN[subject.number]
        if is_shown:
            found.name, found.picture = name, picture
        for attention in each_layer(tower, pixels, range(1, tower.geometry.num_layers + 1)):
            maps = attention.maps()
            for score, weights in maps.items():
                for measured, value in zip(MEASURES, (entropy(weights), top_mass(weights, 0.10)), strict=True):
                    found.values.setdefault((score, measured, attention.layer), []).append(float(value))
            if is_shown:
                found.maps[attention.layer] = maps[CLS if CLS in maps else RECEIVED][0].cpu()
        found.num_images += 1
        progress.advance()
    return found


def draw(subject: Subject, found: Layers) -> Drawing:
    """The image and a map a layer, and below them a curve a score."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    assert found.picture is not None
    layers = sorted(found.maps)
    num_rows = math.ceil((1 + len(layers)) / MOST_COLUMNS)
    num_columns = math.ceil((1 + len(layers)) / num_rows)
    width, height = max(8.0, 1.6 * num_columns), 1.8 * num_rows
    figure = Figure(figsize=(width, height + 3.9), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[height, 3.5], squeeze=False)[:, 0]
    panels = upper.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in panels[1 + len(layers) :]:
        axes.set_axis_off()
    show_image(panels[0], found.picture, subject.grid, short(found.name))
    for axes, layer in zip(panels[1:], layers, strict=False):
        is_selected = f", {subject.tower.layer_is.split()[0]}" if layer == subject.tower.select_layer else ""
        tenth = 100 * float(top_mass(found.maps[layer], 0.10))
        shown = show_map(
            axes, found.picture, found.maps[layer], subject.grid, f"layer {layer}{is_selected}\n{tenth:.0f} %"
        )
    color_bar(upper, shown, panels)
    first, second = lower.subplots(1, 2)
    for score in found.scores:
        of_score = {m: [Mean.of(found.values[score, m, layer]) for layer in layers] for m in MEASURES}
        curve(first, layers, of_score["entropy_nats"], LABELS[score], COLORS[score])
        tenths = [Mean(*(100 * end for end in (m.value, m.low, m.high))) for m in of_score["top_10_percent"]]
        curve(second, layers, tenths, LABELS[score], COLORS[score])
    count = num_top(subject.num_patches, 0.10)
    first.axhline(math.log(subject.num_patches), color="0.4", linestyle="--", linewidth=1, label="if all had the same")
    second.axhline(100 * count / subject.num_patches, color="0.4", linestyle="--", linewidth=1)
    first.set_ylabel("entropy, nats")
    second.set_ylabel(f"in the top 10 % of patches ({count}), %")
    second.set_ylim(0, 102)
    for axes in (first, second):
        axes.axvline(subject.tower.select_layer, color="0.8", linewidth=4, zorder=0)
        axes.set_xticks([layer for layer in layers if len(layers) <= 14 or layer % 2 == 0])
        axes.set_xlabel(f"layer of the vision tower (grey: {subject.tower.layer_is})")
        axes.grid(alpha=0.3)
    lower.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.suptitle(
        f"{subject.tower.name}: {LABELS[CLS if CLS in found.scores else RECEIVED]}, layer by layer", parse_math=False
    )
    return Drawing(figure, _rows(subject, found), _caption(subject, found))


def _rows(subject: Subject, found: Layers) -> list[dict[str, object]]:
    line = table(KEYS)
    rows = []
    for (score, measured, layer), values in found.values.items():
        mean = Mean.of(values)
        of_mean = {"value": mean.value, "low": mean.low, "high": mean.high}
        rows.append(line(part=measured, score=score, layer=layer, **of_mean))
    score = CLS if CLS in found.scores else RECEIVED
    for layer, weights in found.maps.items():
        rows += map_rows(line, weights, subject.grid, score=score, image=found.name, layer=layer)
    return rows


def _caption(subject: Subject, found: Layers) -> str:
    lines = [
        f"Figure {subject.number} of {SOURCE}, measured: {what_was_seen(subject, found.num_images)}. Attention of each"
        " layer, mean over heads, as each patch's share of what goes to patches; maps of one image with what the top"
        f" tenth of patches ({num_top(subject.num_patches, 0.10)}) has; colours say how many times as much a patch has"
        " as if all had the same. Curves: means over all images with 95 % bootstrap intervals over images; received is"
        " the mean over all tokens. Dashed: if all patches had the same."
    ]
    for score in found.scores:
        layers = sorted(found.maps)
        tenths = {layer: Mean.of(found.values[score, "top_10_percent", layer]) for layer in layers}
        most = max(layers, key=lambda layer: tenths[layer].value)
        at = subject.tower.select_layer
        lines.append(
            f"{LABELS[score]}: the top tenth has {tenths[layers[0]].text(100)} % in layer 1, most in layer {most}"
            f" ({tenths[most].text(100)} %), {tenths[at].text(100)} % in layer {at}, the {subject.tower.layer_is}."
        )
    return "\n".join(lines)
