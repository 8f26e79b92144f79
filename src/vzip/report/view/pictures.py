"""Images of the page: thumbnails of bounded size, each there once, and kept patches as numbers over them."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vzip.errors import VzipError
from vzip.progress import Progress

if TYPE_CHECKING:
    from vzip.analysis.overlay import Crop

SIDE = 384  # pixels of a thumbnail's longer side at most
MOST_IMAGES = 4  # of a question; the page says how many more there are
_QUALITY = 82
# Which questions get their images first, where not all do.
_ORDER = ("lost", "gained", "wrong", "right", "")
Row = Mapping[str, Any]
# A question's images; VzipError or OSError where they are not to be had.
Source = Callable[[Row], Sequence[Image.Image]]
# What a run keeps of an image, asked that question; None where it keeps all of it.
Keeper = Callable[[Image.Image, str], "Crop | None"]


class Gallery:
    """Thumbnails by number; an image that is there already gets the number it has."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}

    def add(self, image: Image.Image) -> int:
        """Its number, of a thumbnail of at most ``SIDE`` pixels a side."""
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        digest = hashlib.sha256(repr(small.size).encode() + small.tobytes()).hexdigest()
        if digest not in self._numbers:
            self._numbers[digest] = len(self.images)
            file = io.BytesIO()
            small.save(file, "JPEG", quality=_QUALITY)
            text = base64.b64encode(file.getvalue()).decode("ascii")
            self.images.append({"src": f"data:image/jpeg;base64,{text}", "width": small.width, "height": small.height})
        return self._numbers[digest]


def add_pictures(
    content: dict[str, Any], rows: Sequence[Row], source: Source, keepers: Sequence[Keeper | None], limit: int
) -> int:
    """Puts images and what is kept of them into the page's content.

    Args:
        content: from ``build_content``.
        rows: of each of its samples the run's row.
        source: opens images.
        keepers: of each run, or None.
        limit: questions whose images are opened; those first that only one run answers rightly.

    Returns:
        how many questions have an image.
    """
    gallery, samples = Gallery(), content["samples"]
    order = sorted(range(len(samples)), key=lambda number: _ORDER.index(samples[number]["outcome"]))
    known: dict[Any, tuple[dict[str, Any], str]] = {}
    num_shown = 0
    with Progress("opening images", "questions", min(limit, len(order))) as progress:
        for number in progress.track(order[:limit]):
            sample, row = samples[number], rows[number]
            try:
                images = source(row)
            except (VzipError, OSError) as error:
                sample["note"] = f"The image is not at hand: {error}"
                continue
            notes = [f"The first {MOST_IMAGES} of {len(images)} images."] if len(images) > MOST_IMAGES else []
            for image in images[:MOST_IMAGES]:
                view, problem = _view(image, sample["question"], gallery, keepers, known)
                sample["views"].append(view)
                notes += [problem] if problem else []
            sample["note"] = " ".join(dict.fromkeys(notes))
            num_shown += bool(images)
    for number in order[limit:]:
        samples[number]["note"] = f"The image was left out: --limit {limit}."
    content["images"] = gallery.images
    return num_shown


def _view(
    image: Image.Image, question: str, gallery: Gallery, keepers: Sequence[Keeper | None], known: dict[Any, Any]
) -> tuple[dict[str, Any], str]:
    """An image and, for each run, what it keeps of it, the image as its tower sees it; and why that is not known."""
    reads_text = any(getattr(keeper, "reads_text", False) for keeper in keepers)
    pixels = image.convert("RGB")
    key = (hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).digest(), question if reads_text else "")
    if key not in known:
        kept, problem = [], ""
        for keeper in keepers:
            try:
                own = None if keeper is None else keeper(pixels, question)
            except VzipError as error:
                own, problem = None, f"Kept patches are not drawn: {error}"
            kept.append(None if own is None else _kept_entry(own, gallery))
        known[key] = {"image": gallery.add(pixels), "kept": kept}, problem
    return known[key]


def _kept_entry(kept: Crop, gallery: Gallery) -> dict[str, Any]:
    group = kept.group.flatten()
    return {
        "image": gallery.add(kept.image),
        "grid": list(kept.kept.shape),
        "kept": np.flatnonzero(kept.kept).tolist(),
        "groups": [[target, np.flatnonzero(group == number).tolist()] for number, target in enumerate(kept.targets)],
    }
