"""Which questions are answered together, and in which order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

from vzip.errors import ConfigError

if TYPE_CHECKING:
    import torch

AUTO: Literal["auto"] = "auto"
BatchSize = int | Literal["auto"]
# What ``auto`` tries first. On a GPU memory that does not suffice is an error that halves the batch; on a CPU the
# system ends the process instead, so nothing large is tried there.
AUTO_ON_GPU, AUTO_ON_CPU = 64, 8
VISUAL_CACHE_GIB = 1.0
# Of a section whose images are asked about several times: enough for questions of like length, and few enough that
# several processes have about as much to do each.
_BATCHES, _PASSES = 4, 2


def check_batch_size(value: object) -> BatchSize:
    """Returns the value.

    Raises:
        ConfigError: it is neither a whole number of at least 1 nor ``auto``.
    """
    if value == AUTO:
        return AUTO
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"batch_size={value!r}: must be a whole number, 1 or more, or auto.")
    return value


def planned_size(batch_size: BatchSize, device: torch.device) -> int:
    """Questions in a planned batch: what was asked for, or what ``auto`` tries first on this kind of device.

    The longest questions come first, so ``auto`` halves at the beginning if at all, and stays with what fits.
    """
    if batch_size != AUTO:
        return batch_size
    return AUTO_ON_CPU if device.type == "cpu" else AUTO_ON_GPU


def plan_sections(
    lengths: Sequence[int], groups: Sequence[Hashable], images: Sequence[Hashable], batch_size: int
) -> list[list[list[int]]]:
    """Puts questions into batches, the longest first, and batches into sections that have their images in common.

    In a batch are questions of like length, which spares padding, and what does not fit the memory shows at the
    beginning. The questions about an image are in one section (of one that very many are about, in several), so that
    it need be encoded once only. The plan depends on nothing but its arguments: an interrupted run, and each of several
    processes, cuts the questions into the very sections and batches of one process in one go, encodes and answers
    the very same ones together, and so computes the very numbers.

    Args:
        lengths: of each question, in any unit.
        groups: of each question; only questions of one group may share a section.
        images: of each question what tells its images and videos from others'.
        batch_size: questions in a batch, at most.

    Returns:
        for each section its batches, for each batch the positions of its questions; equal lengths keep their order.
        Where no image is asked about twice a section is a batch.
    """
    of_group: dict[Hashable, dict[Hashable, list[int]]] = {}
    for position, (group, image) in enumerate(zip(groups, images, strict=True)):
        of_group.setdefault(group, {}).setdefault(image, []).append(position)
    sections = []
    for of_image in of_group.values():
        units = [part for unit in of_image.values() for part in cut(unit, _BATCHES * batch_size)]
        units.sort(key=lambda unit: -max(lengths[position] for position in unit))
        start = 0
        while start < len(units):
            sizes = [len(unit) for unit in units[start : start + _PASSES * batch_size]]
            stop = start + _images_of_section(sizes, batch_size)
            ordered = sorted(itertools.chain(*units[start:stop]), key=lambda position: (-lengths[position], position))
            sections.append(cut(ordered, batch_size))
            start = stop
    return sections


def _images_of_section(sizes: Sequence[int], batch_size: int) -> int:
    """How many of the next images, that so many questions are about each, are a section's.

    As many as a few passes of the vision tower take, or as fill a few batches: of several such numbers the one that
    leaves the least of its last batch empty.
    """
    if max(sizes) == 1:
        return min(len(sizes), batch_size)
    best, least = 1, math.inf
    num_questions = 0
    for count, size in enumerate(sizes, 1):
        num_questions += size
        if count > 1 and num_questions > _BATCHES * batch_size:
            break
        wasted = -num_questions % batch_size / num_questions
        is_short = num_questions * 2 < _BATCHES * batch_size and count < len(sizes)
        if not is_short and wasted <= least:
            best, least = count, wasted
    return best


def cut(positions: Sequence[int], size: int) -> list[list[int]]:
    """A sequence in pieces of ``size``; the last may be smaller."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
