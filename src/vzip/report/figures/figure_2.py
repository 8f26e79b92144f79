"""Figures 2, 9, 10 and 11: attention at the select layer over images; over a data set how few patches have most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vzip.analysis.attention import CLS, EDGES, TOP_SHARES, each_layer, histogram, num_top, top_mass
from vzip.progress import Progress

from .attention import SOURCE, Mean, Subject, color_bar, map_rows, short, show_image, show_map, table, what_was_seen
from .drawing import Drawing

KEYS = ("part", "score", "image", "row", "column", "from", "to", "num_patches", "value", "low", "high")
LABELS = {"CLS": "attention of the CLS token", "received": "attention received"}
COLORS = {"CLS": "C0", "received": "C1"}
# Which images of the set a figure shows; the paper's are four pages of them.
SHOWN = {2: slice(0, 2), 9: slice(0, 4), 10: slice(4, 8), 11: slice(8, 12)}


@dataclass
class Seen:
    """Of the images of a set: the maps of some, and of all what is counted.

    Attributes:
        maps: name, picture and distributions ``[P]`` by score.
        masses: by score, then by ``TOP_SHARES``, a value an image.
        bins: by score float64 ``[2, bins]``, see ``histogram``.
    """

    maps: list[tuple[str, Image.Image, dict[str, Tensor]]] = field(default_factory=list)
    masses: dict[str, list[list[float]]] = field(default_factory=dict)
    bins: dict[str, Tensor] = field(default_factory=dict)
    num_images: int = 0


def measure(subject: Subject, progress: Progress) -> Seen:
    """Reads the images one by one; nothing but the shown maps and the counts is kept."""
    seen, layer = Seen(), subject.tower.select_layer
    shown = SHOWN[subject.number]
    for name, pixels, picture in subject.images:
        (attention,) = each_layer(subject.tower.tower, pixels, {layer})
        maps = {score: weights[0].cpu() for score, weights in attention.maps().items()}
        if shown.start <= seen.num_images < shown.stop:
            seen.maps.append((name, picture, maps))
        for score, weights in maps.items():
            own = seen.masses.setdefault(score, [[] for _ in TOP_SHARES])
            for values, share in zip(own, TOP_SHARES, strict=True):
                values.append(float(top_mass(weights, share)))
            seen.bins[score] = seen.bins.get(score, torch.zeros(2, len(EDGES) - 1)) + histogram(weights)
        seen.num_images += 1
        progress.advance()
    return seen


def draw(subject: Subject, seen: Seen) -> Drawing:
    """Figure 2 has the histogram; the others only images."""
    from matplotlib.figure import Figure  # slow to import; only figures need it

    scores, num_shown = list(seen.masses), len(seen.maps)
    with_counts = subject.number == 2
    width = (2.4 if with_counts else 2.6) * (1 + len(scores)) if with_counts else 2.6 * num_shown
    height = 2.6 * num_shown if with_counts else 2.7 * (1 + len(scores))
    figure = Figure(figsize=(width + (5 if with_counts else 0.3), max(5.0, height) + 0.5), layout="constrained")
    left: Any = figure
    if with_counts:
        left, right = figure.subfigures(1, 2, width_ratios=[width, 5], squeeze=False)[0]
    shape = (num_shown, 1 + len(scores)) if with_counts else (1 + len(scores), num_shown)
    panels = left.subplots(*shape, squeeze=False)
    panels = panels if with_counts else panels.T  # a line an image, or a column
    for own, (name, picture, maps) in zip(panels, seen.maps, strict=True):
        show_image(own[0], picture, subject.grid, short(name))
        for axes, score in zip(own[1:], scores, strict=True):
            tenth = 100 * float(top_mass(maps[score], 0.10))
            shown = show_map(axes, picture, maps[score], subject.grid, f"{LABELS[score]}\ntop 10 % have {tenth:.0f} %")
    color_bar(left, shown, panels)
    if with_counts:
        upper, lower = right.subplots(2, 1)
        _draw_histogram(upper, seen, subject.num_patches)
        _draw_masses(lower, seen, subject.num_patches)
    figure.suptitle(
        f"{subject.tower.name}: attention in layer {subject.tower.select_layer} of the vision tower", parse_math=False
    )
    return Drawing(figure, _rows(subject, seen), _caption(subject, seen))


def _draw_histogram(axes, seen: Seen, num_patches: int) -> None:  # type: ignore[no-untyped-def]
    for score, (counts, _) in seen.bins.items():
        percent = (100 * counts / counts.sum()).tolist()
        look = {"color": COLORS[score], "alpha": 0.35, "label": LABELS[score]}
        axes.stairs(percent, EDGES.tolist(), fill=True, **look)
        axes.stairs(percent, EDGES.tolist(), color=COLORS[score])
    axes.axvline(1 / num_patches, color="0.4", linestyle="--", linewidth=1, label="if all had the same")
    axes.set_xscale("log")
    shares = torch.stack([counts / counts.sum() for counts, _ in seen.bins.values()])
    filled = (shares > 5e-4).any(dim=0).nonzero().flatten()
    axes.set_xlim(float(EDGES[int(filled[0])]) / 1.5, min(1.0, 1.5 * float(EDGES[int(filled[-1]) + 1])))
    axes.set_xlabel("a patch's share of the image's attention")
    axes.set_ylabel("patches, %")
    axes.legend(fontsize=8, frameon=False)


def _draw_masses(axes, seen: Seen, num_patches: int) -> None:  # type: ignore[no-untyped-def]
    width = 0.8 / len(seen.masses)
    for number, (score, own) in enumerate(seen.masses.items()):
        for place, values in enumerate(own):
            mean = Mean.of(values)
            spread = [[100 * (mean.value - mean.low)], [100 * (mean.high - mean.value)]]
            x = place + width * (number - (len(seen.masses) - 1) / 2)
            axes.bar(x, 100 * mean.value, width * 0.95, yerr=spread, color=COLORS[score], capsize=3)
            axes.annotate(
                f"{100 * mean.value:.0f}",
                (x, 100 * mean.high),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    for place, share in enumerate(TOP_SHARES):
        even = 100 * num_top(num_patches, share) / num_patches
        axes.plot([place - 0.45, place + 0.45], [even, even], color="0.4", linestyle="--", linewidth=1)
    axes.set_xticks(
        range(len(TOP_SHARES)),
        [f"top {100 * share:.0f} %\n({num_top(num_patches, share)} patches)" for share in TOP_SHARES],
    )
    axes.set_ylim(0, 105)
    axes.set_ylabel("of the attention, %")


def _rows(subject: Subject, seen: Seen) -> list[dict[str, object]]:
    line = table(KEYS)
    rows = []
    if subject.number == 2:
        for score, (counts, sums) in seen.bins.items():
            for number, (count, total) in enumerate(zip(counts.tolist(), sums.tolist(), strict=True)):
                ends = {"from": float(EDGES[number]) if number else 0.0, "to": float(EDGES[number + 1])}
                rows.append(line(part="histogram", score=score, num_patches=int(count), value=total, **ends))
    for score, own in seen.masses.items():
        for share, values in zip(TOP_SHARES, own, strict=True):
            count = num_top(subject.num_patches, share)
            mean = Mean.of(values)
            of_mean = {"value": mean.value, "low": mean.low, "high": mean.high}
            rows.append(line(part=f"top_{100 * share:.0f}_percent", score=score, num_patches=count, **of_mean))
    for name, _, maps in seen.maps:
        for score, weights in maps.items():
            rows += map_rows(line, weights, subject.grid, score=score, image=name)
    return rows


def _caption(subject: Subject, seen: Seen) -> str:
    layer, has_cls = subject.tower.select_layer, CLS in seen.masses
    lines = [
        f"Figure {subject.number} of {SOURCE}, measured: {what_was_seen(subject, seen.num_images)}. Attention in layer"
        f" {layer}, the {subject.tower.layer_is}, mean over heads, as each patch's share of what goes to patches:"
        + (" that of the CLS token, and" if has_cls else "")
        + " that received, the mean over all tokens"
        + ("." if has_cls else " (the tower has no CLS token).")
        + " Maps: colours say how many times as much a patch has as if"
        " all had the same. 95 %: bootstrap over images."
    ]
    if subject.number == 2:
        lines[0] += (
            " Histogram: patches of all images by their share, the first bin with all below; CSV: value is the sum of"
            " the shares in a bin. Dashed: if all patches had the same."
        )
    for score, own in seen.masses.items():
        parts = []
        for share, values in zip(TOP_SHARES, own, strict=True):
            count = num_top(subject.num_patches, share)
            parts.append(f"top {100 * share:.0f} % ({count} patches): {Mean.of(values).text(100)} %")
        lines.append(f"{LABELS[score]}: {'; '.join(parts)} of it.")
    return "\n".join(lines)
