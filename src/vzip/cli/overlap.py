"""Which patches methods keep in common, on any folder of images: no labels and no answers are needed.

python -m vzip overlap photos
python -m vzip overlap photos compressor=visionzip,divprune,random budget=64tok model=llava15_7b
python -m vzip overlap photos compressor=visionzip budget=64tok,192tok
python -m vzip overlap photos compressor=mmtok,visionzip --question "What is on the table?"

For each two methods the patches kept by both, as a share of those kept by either (Jaccard): the mean over images with a
95 % bootstrap interval over images, beside what two choices at random of as many patches would share. Patches that are
merged into others, CLS and contextual tokens are not counted.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from vzip.cli.fidelity import CACHE_GIB, NUM_RESAMPLES, SEED, image_files
from vzip.config.method_grid import MethodGrid, method_grid
from vzip.errors import ConfigError, ImageError, MissingPackageError
from vzip.keys import raise_all
from vzip.media.images import load_image
from vzip.progress import Progress
from vzip.results.layout import Layout, Piece, print_layout
from vzip.results.stats import mean_interval

logger = logging.getLogger(__name__)

DEFAULT = ("compressor=visionzip,divprune,random", "budget=64tok")
NO_PRUNER = "overlap compares what is kept before the language model, and a pruner drops inside it"
HEAD = ("method", "kept", "method", "kept", "in common, % of either [95 %]", "by chance, %")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="a folder; images in folders inside it count too")
    parser.add_argument("--question", help="about every image, for text-aware methods; others look at none")
    words = f"as for eval.py -m: compressor=a,b budget=64tok,32tok model=NAME ... (default: {' '.join(DEFAULT)})"
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=words)


def main(arguments: argparse.Namespace) -> int:
    """Measures and prints; what can be wrong is checked before the model is loaded."""

    problems: list[str] = []
    paths: list[Path] = []
    grid: MethodGrid | None = None
    try:
        paths = image_files(arguments.images)
    except ImageError as error:
        problems.append(str(error))
    try:
        given = {word.split("=", 1)[0] for word in arguments.settings}
        defaults = [word for word in DEFAULT if word.split("=", 1)[0] not in given]
        grid = method_grid([*defaults, *arguments.settings], NO_PRUNER)
    except ConfigError as error:
        problems.append(str(error))
    if grid is not None and len(grid.methods) < 2:
        problems.append("one method has nothing to be compared with: give two, as compressor=visionzip,divprune.")
    if grid is not None and not (arguments.question or "").strip():
        names = [method.method for method in grid.methods if method.compressor.reads_text]
        if names:
            problems.append(f"{', '.join(dict.fromkeys(names))}: text-aware, so give --question, asked of each image.")
    raise_all(problems)
    assert grid is not None
    print_layout(lay_out(grid, *measure(grid, paths, arguments.question)), Console())
    return 0


def measure(
    grid: MethodGrid, paths: Sequence[Path], question: str | None = None
) -> tuple[list[list[set[int]]], list[int], int]:
    """For each image the patches that each method keeps; how many each image has; how many images were left out."""
    import vzip
    from vzip.analysis.kept_patches import kept_patches
    from vzip.models.towers.cache import TowerCache

    vlm = vzip.load_vlm(**grid.model, compressor=grid.methods[0].compressor)
    for method in grid.methods:
        vlm.compressor = method.compressor  # a budget that does not fit is refused here
    kept: list[list[set[int]]] = []
    totals: list[int] = []
    num_damaged = 0
    with Progress(f"what {len(grid.methods)} methods keep", "images", len(paths)) as progress:
        for path in progress.track(paths):
            vlm.adapter.tower_cache = TowerCache(CACHE_GIB)
            try:
                image = load_image(path)
                found = [kept_patches(vlm, image, method.compressor, question) for method in grid.methods]
            except (ImageError, MissingPackageError) as error:
                logger.warning("left out: %s", error)
                num_damaged += 1
                continue
            kept.append([patches for patches, _ in found])
            totals.append(found[0][1])
    vlm.adapter.tower_cache = None
    if not kept:
        raise ImageError(f"none of {len(paths)} images can be used.")
    return kept, totals, num_damaged


def lay_out(grid: MethodGrid, kept: Sequence[Sequence[set[int]]], totals: Sequence[int], num_damaged: int) -> Layout:
    """A line for each two methods."""
    lines = []
    for a, b in itertools.combinations(range(len(grid.methods)), 2):
        pairs = [(own[a], own[b]) for own in kept]
        values = 100 * np.array([len(x & y) / max(1, len(x | y)) for x, y in pairs])
        by_chance = 100 * np.mean([expected(len(x), len(y), n) for (x, y), n in zip(pairs, totals, strict=True)])
        interval = ""
        if len(values) > 1:
            low, high = mean_interval(values, NUM_RESAMPLES, SEED)
            interval = f" [{low:.1f}, {high:.1f}]"
        names = [f"{grid.methods[m].method} {grid.methods[m].budget}" for m in (a, b)]
        counts = [f"{np.mean([len(own[m]) for own in kept]):g}" for m in (a, b)]
        texts = (names[0], counts[0], names[1], counts[1], f"{values.mean():.1f}{interval}", f"{by_chance:.1f}")
        lines.append(tuple(map(Piece, texts)))
    title = f"patches kept in common, {grid.model_name}; images: {len(kept)}, patches an image: {np.mean(totals):g}"
    remarks = [f"Images that cannot be used, left out: {num_damaged}."] if num_damaged else []
    return Layout(title, HEAD, (tuple(lines),), tuple(remarks), left=frozenset({0, 2}))


def expected(num_a: int, num_b: int, num_patches: int) -> float:
    """What two choices at random share of what either has, by the mean of what they share."""
    shared = num_a * num_b / num_patches
    return shared / max(1.0, num_a + num_b - shared)
