"""The figures of a vision tower's attention: which tower, which images, which patch; see ``vzip.cli.figure``."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vzip.cli.fidelity import image_files
from vzip.config.build import load_arguments
from vzip.config.options import config_dir, options
from vzip.errors import ConfigError, ImageError, MissingPackageError
from vzip.keys import raise_all
from vzip.media.images import load_image
from vzip.paths import expanded, is_folder
from vzip.progress import Progress
from vzip.report.figures.drawing import Drawing

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Named = tuple[str, Image.Image]

NUMBERS = (2, 5, 6, 9, 10, 11, 12, 13, 14)
OF_A_PATCH = (6, 14)
NUM_IMAGES = 32  # looked at by default; by figure 2 more of the built-in benchmark, and of any other set all
OF_HISTOGRAM = 100
LAST_SHOWN = {9: 4, 10: 8, 11: 12}  # those whose images are all that there is to see
USUAL_TASK = "textvqa_val"  # the paper's, for models whose weights are not built in
SET_HERE = ("compressor", "budget", "pruner")


def options_of(number: int) -> frozenset[str]:
    """The options of a figure beside the common ones."""
    return frozenset({"images", "limit", "layer"} | ({"patch", "pixel"} if number in OF_A_PATCH else set()))


def figure(number: int, configured: Callable[[Sequence[str]], dict[str, Any]], args: argparse.Namespace) -> Drawing:
    """Draws one of ``NUMBERS``.

    Args:
        number: of the figure.
        configured: composes and checks words of the command line.
        args: of the command.

    Raises:
        ConfigError and what finding the images and loading the model raise.
    """
    problems: list[str] = []
    if args.limit is not None and args.limit < 1:
        problems.append(f"--limit={args.limit}: must be 1 or more.")
    if taken := [word for word in args.settings if word.split("=", 1)[0].split(".")[0] in SET_HERE]:
        problems.append(f"{' '.join(taken)}: figure {number} shows the vision tower, before anything is compressed.")
    places: dict[str, tuple[int, int] | None] = {}
    for name, form in (("patch", "ROW,COLUMN"), ("pixel", "X,Y")):
        try:
            places[name] = _pair(getattr(args, name), f"--{name}", form)
        except ConfigError as error:
            problems.append(str(error))
    if args.patch is not None and args.pixel is not None:
        problems.append("--patch and --pixel say the same twice: give one.")
    paths: list[Path] = []
    if args.images is not None:
        try:
            paths = image_files(args.images)
        except ImageError as error:
            problems.append(str(error))
    raise_all(problems)
    bare, words = _bare(args.settings)
    config = configured(words)

    from vzip.analysis import seeing  # slow to import

    source = None if bare is None else seeing.check_bare(bare)
    is_built_in = bare is None and config["model"]["name"] == "tiny"
    names_tasks = any(word.split("=", 1)[0].split(".")[0] == "eval" for word in words)
    if args.images is not None:
        total: int | None = len(paths)
        images, where = _of_files(paths), f"the folder {expanded(args.images).name}"
    else:
        tasks = config["eval"]["tasks"] if is_built_in or names_tasks else [USUAL_TASK]
        images, where, total = _of_tasks(list(tasks), config["eval"]["include_path"])
    usual = (OF_HISTOGRAM if is_built_in else None) if number == 2 else LAST_SHOWN.get(number, NUM_IMAGES)
    limit = args.limit or usual
    if limit is not None:
        images, total = itertools.islice(images, limit), limit if total is None else min(limit, total)
    tower = _load(source, config).with_layer(args.layer)
    return _draw(number, tower, images, where, total, places)


def _draw(
    number: int,
    tower: Any,
    images: Iterator[Named],
    where: str,
    total: int | None,
    places: Mapping[str, tuple[int, int] | None],
) -> Drawing:
    from vzip.report.figures import figure_2, figure_5, figure_6
    from vzip.report.figures.attention import Subject

    kind: Any = figure_6 if number in OF_A_PATCH else figure_5 if number in figure_5.SHOWN else figure_2
    patch = _patch(tower.tower.geometry, places) if number in OF_A_PATCH else None
    with Progress("looking", "images", total) as progress:
        subject = Subject(number, tower, _seen(tower, images), where, patch)
        found = kind.measure(subject, progress)
    if found.num_images == 0:
        raise ImageError(f"{where}: none of its images can be used.")
    if not (found.maps or found.picture if kind is figure_5 else found.maps):
        raise ConfigError(
            f"figure {number} shows images after the first {found.num_images} that {where} has (or --limit lets in):"
            " give a folder with more of them, or a lower figure."
        )
    drawing: Drawing = kind.draw(subject, found)
    return drawing


def _seen(tower: Any, images: Iterator[Named]) -> Iterator[tuple[str, Tensor, Image.Image]]:
    """Each image as the tower takes it and as it looks so; those that cannot be used are named."""
    for name, image in images:
        try:
            pixels, picture = tower.see(image)
        except ImageError as error:
            logger.warning("left out: %s: %s", name, error)
            continue
        yield name, pixels, picture


def _pair(given: str | None, option: str, form: str) -> tuple[int, int] | None:
    if given is None:
        return None
    parts = given.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"{option} {given}: must be {form}, two whole numbers from 0, as {option} 4,7.")
    return int(parts[0]), int(parts[1])


def _patch(geometry: Any, places: Mapping[str, tuple[int, int] | None]) -> tuple[int, int]:
    """The chosen patch; the middle one by default."""
    rows, cols = geometry.grid
    patch = rows // 2, cols // 2
    if (pixel := places["pixel"]) is not None:
        x, y = pixel
        # Without the edge that belongs to no patch (of SigLIP's 384 pixels six), as the figure shows it.
        width, height = cols * geometry.patch_size, rows * geometry.patch_size
        if x >= width or y >= height:
            raise ConfigError(
                f"--pixel {x},{y}: outside. The vision tower's patches cover {width} x {height} pixels of each image;"
                f" the figure shows these, so 0 to {width - 1},0 to {height - 1} are allowed."
            )
        patch = y // geometry.patch_size, x // geometry.patch_size
    if (chosen := places["patch"]) is not None:
        patch = chosen
        if chosen[0] >= rows or chosen[1] >= cols:
            raise ConfigError(f"--patch {chosen[0]},{chosen[1]}: the tower has {rows} rows and {cols} columns, from 0.")
    return patch


def _bare(settings: Sequence[str]) -> tuple[str | None, list[str]]:
    """The directory or hub id of ``model=``, where it names no option, and the other words."""
    known = options(config_dir(), "model")
    bare, words = None, []
    for word in settings:
        key, _, value = word.partition("=")
        if key == "model" and value not in known and ("/" in value or is_folder(expanded(value))):
            bare = value
        else:
            words.append(word)
    if bare is not None and (left := [word for word in words if word.startswith("model.")]):
        raise ConfigError(f"{' '.join(left)}: model={bare} is a bare vision tower, which has no such settings.")
    return bare, words


def _load(source: Path | str | None, config: Mapping[str, Any]) -> Any:
    from vzip.analysis import seeing

    if source is not None:
        return seeing.load_bare(source)
    import vzip

    arguments = load_arguments({**config["model"], "projector": None})  # what is behind the tower changes nothing
    return seeing.of_vlm(vzip.load_vlm(**arguments), str(config["model"]["name"]))


def _of_files(paths: Sequence[Path]) -> Iterator[Named]:
    for path in paths:
        try:
            yield path.name, load_image(path)
        except (ImageError, MissingPackageError) as error:
            logger.warning("left out: %s", error)


def _of_tasks(tasks: list[str], include_path: str | None) -> tuple[Iterator[Named], str, int | None]:
    """The images of tasks, what they are, and how many there are (None: not known); those built in need no package."""
    from vzip.demo import benchmark

    if include_path == "built-in" and set(tasks) <= set(benchmark.TASK_NAMES):
        paths = sorted((benchmark.prepare() / "images").glob("*.png"))
        return _of_files(paths), "the built-in benchmark", len(paths)
    if include_path == "video":
        raise ConfigError(f"eval.tasks={tasks}: videos. Give a task of images, or a folder by --images DIR.")
    from vzip.evaluation.task_images import open_tasks

    folder = str(benchmark.prepare()) if include_path == "built-in" else include_path
    return open_tasks(tasks, folder), ", ".join(tasks), None
