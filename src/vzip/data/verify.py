"""Whether every image and video that a data set names is there and can be decoded.

Each of them is looked at once, however many samples name it. Memory grows by some 20 bytes an image named.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from vzip.errors import ImageError, VideoError
from vzip.media.images import load_image
from vzip.media.video import load_video

from .llava_json import LlavaJson

Kind = Literal["missing", "empty", "damaged"]
# Endings under which an image saved by another script may lie (OCR-VQA's come as .gif and .png too).
_OTHER_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".JPG", ".PNG")
# Tasks waiting for a thread: enough to keep all of them busy, too few to matter for memory.
_QUEUED_PER_WORKER = 16
_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class NamedImage:
    """An image (or video) as the data set first names it; ``name`` is the file's word, ``path`` where it must lie."""

    name: str
    path: Path
    sample_id: str
    source: str
    is_video: bool = False


@dataclass(frozen=True)
class ImageProblem:
    """An image that cannot be used, and why."""

    image: NamedImage
    kind: Kind
    reason: str


def distinct_images(
    data: LlavaJson, indices: Sequence[int] | np.ndarray | None = None
) -> tuple[int, Iterator[NamedImage]]:
    """Each image that the samples (all, or those at ``indices``) name, once, in their order; and how many."""
    wanted = np.arange(len(data)) if indices is None else np.asarray(indices, dtype=np.int64)
    wanted = wanted[data.num_images[wanted] > 0]
    hashes = np.fromiter(
        (_hash(name) for i in wanted for name in data.record(int(i)).files),
        dtype=np.uint64,
        count=int(data.num_images[wanted].sum()),
    )
    is_first = np.zeros(len(hashes), dtype=bool)
    is_first[np.unique(hashes, return_index=True)[1]] = True

    def images() -> Iterator[NamedImage]:
        number = itertools.count()
        for i in map(int, wanted):
            record = data.record(i)
            for place, name in enumerate(record.files):
                if is_first[next(number)]:
                    is_video = place >= len(record.images)
                    yield NamedImage(name, data.image_root / name, record.label(i), data.source_of(i), is_video)

    return int(is_first.sum()), images()


def check_image(image: NamedImage, decode: bool = True) -> ImageProblem | None:
    """Looks at one image.

    Args:
        image: which one.
        decode: decode it to the last row; without, only whether it is there and not empty.

    Returns:
        the problem, or None.
    """
    try:
        num_bytes = image.path.stat().st_size
    except OSError:
        return ImageProblem(image, "missing", f"no such file: {image.path}{_other_name(image.path)}")
    if num_bytes == 0:
        return ImageProblem(image, "empty", f"0 bytes: {image.path}")
    if decode:
        try:
            if image.is_video:
                load_video(image.path, num_frames=1)  # which counts all frames, and so sees a file that is cut off
            else:
                load_image(image.path)
        except (ImageError, VideoError) as error:
            return ImageProblem(image, "damaged", str(error))
    return None


def find_problems(
    data: LlavaJson,
    indices: Sequence[int] | np.ndarray | None = None,
    *,
    decode: bool = True,
    num_workers: int | None = None,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[ImageProblem]:
    """Checks every image of the data set, or of the samples at ``indices``.

    Args:
        data: the data set.
        indices: samples to look at.
        decode: see ``check_image``.
        num_workers: threads (Pillow decodes outside Python's lock); by default one a core.
        on_image: called after each image with the number done and the number of all.

    Yields:
        the problems, as they are found.
    """

    def check(image: NamedImage) -> ImageProblem | None:
        return check_image(image, decode)

    total, images = distinct_images(data, indices)
    found = _map_unordered(check, images, num_workers or os.cpu_count() or 1)
    for done, problem in enumerate(found, start=1):
        on_image(done, total)
        if problem is not None:
            yield problem


def _map_unordered(function: Callable[[_Task], _Result], tasks: Iterator[_Task], num_workers: int) -> Iterator[_Result]:
    """``map`` in threads, results as they come; takes tasks only as fast as they are worked off."""
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: set[Future[_Result]] = set()
        while True:
            room = num_workers * _QUEUED_PER_WORKER - len(waiting)
            waiting |= {pool.submit(function, task) for task in itertools.islice(tasks, room)}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def _other_name(path: Path) -> str:
    """A hint where the image lies there under another ending."""
    found = next((other for ending in _OTHER_ENDINGS if (other := path.with_suffix(ending)).is_file()), None)
    return f" (but {found.name} is there: the data set names it {path.name})" if found else ""


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")
