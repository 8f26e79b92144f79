"""Figures 6 and 14: why few patches win, and feature misalignment: a patch attends to proxies that lie elsewhere.

Counted: how far it is from a patch to the patch that it attends to most, against what even attention would give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vzip.analysis.attention import chance_distance, distances, each_layer, softmax_slope
from vzip.progress import Progress

from .attention import (
    SOURCE,
    Mean,
    Subject,
    color_bar,
    curve,
    map_rows,
    mark,
    short,
    show_image,
    show_map,
    table,
    what_was_seen,
)
from .drawing import Drawing

KEYS = ("part", "image", "layer", "row", "column", "z", "softmax", "slope", "from", "to", "value", "low", "high")
SHOWN = {6: 1, 14: 4}  # images, the first ones
NUM_PROXIES = 3  # marked on a map
DISTANCE, SPREAD, ITSELF, NUM_DISTINCT = "distance_to_proxy", "mean_distance", "is_its_own_proxy", "num_proxies"
SLOPE = (0.0, 14.0, 281)  # of z: from, to, points


@dataclass
class Misaligned:
    """Of the images of a set.

    Attributes:
        maps: name, picture and the chosen patch's distribution ``[P]`` of the shown ones, at the select layer.
        values: by measure and layer, a value an image: its mean over all patches.
        bins: how many patches of all images have their proxy at a distance, rounded down: float64 ``[bins]``.
    """

    maps: list[tuple[str, Image.Image, Tensor]] = field(default_factory=list)
    values: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    bins: Tensor = field(default_factory=lambda: torch.zeros(0))
    num_images: int = 0


def measure(subject: Subject, progress: Progress) -> Misaligned:
    """Reads the images one by one, a layer at a time; figure 6 looks at the select layer alone."""
    tower, at = subject.tower.tower, subject.tower.select_layer
    assert subject.patch is not None
    chosen = torch.tensor([subject.patch[0] * subject.grid[1] + subject.patch[1]])
    found = Misaligned(bins=torch.zeros(int(distances(subject.grid).max()) + 1))
    layers = range(1, tower.geometry.num_layers + 1) if subject.number == 14 else (at,)
    for name, pixels, picture in subject.images:
        for attention in each_layer(tower, pixels, layers):
            proxies = attention.proxies()
            own = torch.arange(proxies.index.shape[1], device=proxies.index.device)
            for measured, value in (
                (DISTANCE, proxies.distance.mean()),
                (SPREAD, proxies.mean_distance.mean()),
                (ITSELF, (proxies.index == own).double().mean()),
                (NUM_DISTINCT, len(proxies.index.unique())),
            ):
                found.values.setdefault((measured, attention.layer), []).append(float(value))
            if attention.layer == at:
                found.bins += torch.bincount(proxies.distance.flatten().long().cpu(), minlength=len(found.bins))
                if found.num_images < SHOWN[subject.number]:
                    found.maps.append((name, picture, attention.of_patches(chosen)[0, 0].cpu()))
        found.num_images += 1
        progress.advance()
    return found


def chance_bins(grid: tuple[int, int]) -> Tensor:
    """The same bins, as shares, if every patch's proxy were any patch with equal probability: float64."""
    between = distances(grid).flatten()
    return torch.bincount(between.long()).double() / len(between)


def draw(subject: Subject, found: Misaligned) -> Drawing:
    """6: slope, the chosen patch and its map, distances at the select layer; 14: several images, distances by layer."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    assert subject.patch is not None
    if subject.number == 6:
        figure = Figure(figsize=(11, 9), layout="constrained")
        panels = figure.subplots(2, 2, height_ratios=[3.4, 5])
        _draw_slope(panels[0, 0], subject.num_patches)
        _draw_bins(panels[0, 1], subject, found)
        shown = _draw_chosen(panels[1, 0], panels[1, 1], subject, *found.maps[0])
        color_bar(figure, shown, panels[1, 1])
        handles = panels[1, 0].get_legend_handles_labels()
    else:
        num = len(found.maps)
        width = max(9.0, 2.7 * num)
        figure = Figure(figsize=(width, 9.2), layout="constrained")
        upper, lower = figure.subfigures(2, 1, height_ratios=[5.7, 3.5], squeeze=False)[:, 0]
        panels = upper.subplots(2, num, squeeze=False)
        for own, of_image in zip(panels.T, found.maps, strict=True):
            shown = _draw_chosen(own[0], own[1], subject, *of_image)
        color_bar(upper, shown, panels)
        handles = panels[0, 0].get_legend_handles_labels()
        _draw_layers(lower.subplots(1, 2), subject, found)
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    at, (row, column) = subject.tower.select_layer, subject.patch
    figure.suptitle(
        f"{subject.tower.name}: where patch {row},{column} attends to in layer {at} of the vision tower",
        parse_math=False,
    )
    return Drawing(figure, _rows(subject, found), _caption(subject, found))


def _draw_chosen(left, right, subject: Subject, name: str, picture: Image.Image, weights: Tensor):  # type: ignore[no-untyped-def]
    grid, patch = subject.grid, subject.patch
    assert patch is not None
    show_image(left, picture, grid, short(name))
    mark(left, patch, "red", f"chosen patch {patch[0]},{patch[1]}")
    number = patch[0] * grid[1] + patch[1]
    top = weights.argmax().item()
    far = float(distances(grid)[number, int(top)])
    shown = show_map(
        right,
        picture,
        weights,
        grid,
        f"its attention: its proxy, {far:.1f}\npatches away, has {100 * float(weights.max()):.1f} %",
    )
    mark(right, patch, "red")
    for place, proxy in enumerate(weights.topk(NUM_PROXIES).indices.tolist()):
        where = divmod(proxy, grid[1])
        mark(left, where, "cyan", None if place else f"the {NUM_PROXIES} patches that it attends to most")
        mark(right, where, "cyan")
    return shown


def _draw_slope(axes, num_patches: int) -> None:  # type: ignore[no-untyped-def]
    z = torch.linspace(SLOPE[0], SLOPE[1], SLOPE[2], dtype=torch.float64)
    share, slope = softmax_slope(z, num_patches)
    axes.plot(z.tolist(), share.tolist(), color="0.5", linestyle="--", label="softmax s")
    axes.plot(z.tolist(), slope.tolist(), color="C3", label="slope ds/dz = s (1 - s)")
    axes.set_xlabel(f"logit z of one of {num_patches} patches, the others' being 0")
    axes.set_title("(a) softmax and its slope", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3)


def _draw_bins(axes, subject: Subject, found: Misaligned) -> None:  # type: ignore[no-untyped-def]
    edges = list(range(len(found.bins) + 1))
    mean = Mean.of(found.values[DISTANCE, subject.tower.select_layer])
    shares = (100 * found.bins / found.bins.sum()).tolist()
    axes.stairs(shares, edges, fill=True, color="C0", alpha=0.6, label=f"measured, mean {mean.text()}")
    even = chance_distance(subject.grid)
    by_chance = (100 * chance_bins(subject.grid)).tolist()
    axes.stairs(by_chance, edges, color="0.3", linestyle="--", label=f"by chance, mean {even:.1f}")
    axes.set_xlabel("from a patch to its proxy, patches")
    axes.set_ylabel("patches, %")
    axes.set_title(f"(b) distances in layer {subject.tower.select_layer}, all patches of all images", fontsize=10)
    axes.legend(fontsize=8, frameon=False)


def _draw_layers(panels, subject: Subject, found: Misaligned) -> None:  # type: ignore[no-untyped-def]
    layers = sorted({layer for _, layer in found.values})
    first, second = panels
    for measured, label, color in (
        (DISTANCE, "to the patch attended to most (proxy)", "C0"),
        (SPREAD, "to all patches, by attention", "C1"),
    ):
        curve(first, layers, [Mean.of(found.values[measured, layer]) for layer in layers], label, color)
    first.axhline(chance_distance(subject.grid), color="0.4", linestyle="--", linewidth=1, label="by chance")
    first.set_ylim(bottom=0)
    first.set_ylabel("mean distance, patches")
    curve(second, layers, [Mean.of(found.values[NUM_DISTINCT, layer]) for layer in layers], "", "C2")
    second.set_yscale("log", base=2)
    second.yaxis.set_major_formatter("{x:g}")
    second.set_ylim(bottom=1)
    second.set_ylabel(f"different proxies of {subject.num_patches} patches")
    for axes in (first, second):
        axes.axvline(subject.tower.select_layer, color="0.8", linewidth=4, zorder=0)
        axes.set_xticks([layer for layer in layers if len(layers) <= 14 or layer % 2 == 0])
        axes.set_xlabel(f"layer of the vision tower (grey: {subject.tower.layer_is})")
        axes.grid(alpha=0.3)
    first.legend(fontsize=8, frameon=False)


def _rows(subject: Subject, found: Misaligned) -> list[dict[str, object]]:
    line, at = table(KEYS), subject.tower.select_layer
    rows = []
    for (measured, layer), values in found.values.items():
        mean = Mean.of(values)
        rows.append(line(part=measured, layer=layer, value=mean.value, low=mean.low, high=mean.high))
    rows.append(line(part="distance_by_chance", value=chance_distance(subject.grid)))
    for part, bins in (("histogram", found.bins / found.bins.sum()), ("by_chance", chance_bins(subject.grid))):
        for start, value in enumerate(bins.tolist()):
            of_bin = {"from": start, "to": start + 1}
            rows.append(line(part=part, layer=at if part == "histogram" else "", value=value, **of_bin))
    if subject.number == 6:
        z = torch.linspace(SLOPE[0], SLOPE[1], SLOPE[2], dtype=torch.float64)
        for each, share, slope in zip(*(v.tolist() for v in (z, *softmax_slope(z, subject.num_patches))), strict=True):
            rows.append(line(part="slope", z=each, softmax=share, slope=slope))
    for name, _, weights in found.maps:
        rows += map_rows(line, weights, subject.grid, image=name, layer=at)
    return rows


def _caption(subject: Subject, found: Misaligned) -> str:
    assert subject.patch is not None
    at, (row, column), even = subject.tower.select_layer, subject.patch, chance_distance(subject.grid)
    of = {measured: Mean.of(found.values[measured, at]) for measured in (DISTANCE, SPREAD, ITSELF, NUM_DISTINCT)}
    text = f"Figure {subject.number} of {SOURCE}, measured: {what_was_seen(subject, found.num_images)}. "
    if subject.number == 6:
        text += (
            f"(a) Analytic: the softmax s of one of {subject.num_patches} patches with logit z, the others' being 0,"
            " and its slope s (1 - s): up to s = 1/2 a patch gains the more of a higher logit, the more it has already."
            " (b) How far it is from each patch to its proxy, the patch that it attends to most by"
            " the mean over heads. "
        )
    text += (
        f"Maps: the attention of patch {row},{column} (row, column, from 0; red) in layer {at}, the"
        f" {subject.tower.layer_is}, mean over heads, of what goes to patches; cyan: the {NUM_PROXIES} patches that it"
        " attends to most. Distances between middles of patches. Chance is the mean distance from a patch to where even"
        " attention would go, itself too, exact. 95 %: bootstrap over images, each the mean over its patches."
    )
    return (
        f"{text}\nLayer {at}: from a patch to its proxy {of[DISTANCE].text()} patches, by attention to all"
        f" {of[SPREAD].text()}, by chance {even:.1f}; {of[ITSELF].text(100, ' %')} of patches are their own proxy;"
        f" {subject.num_patches} patches have {of[NUM_DISTINCT].text()} different proxies."
    )
