"""Which questions are answered together, and in which order."""

from __future__ import annotations

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


def plan_batches(lengths: Sequence[int], groups: Sequence[Hashable], batch_size: int) -> list[list[int]]:
    """Puts the questions of each group into batches, the longest first.

    So questions of like length share a batch, which spares padding, and what does not fit the memory shows at the
    beginning. The plan depends on nothing but its arguments: an interrupted run, and each of several processes, cuts
    the questions into the very batches of one process in one go, and so computes the very numbers.

    Args:
        lengths: of each question, in any unit.
        groups: of each question; only questions of one group may share a batch.
        batch_size: questions in a batch, at most.

    Returns:
        for each batch the positions of its questions; equal lengths keep their order.
    """
    of_group: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        of_group.setdefault(group, []).append(position)
    batches = []
    for positions in of_group.values():
        ordered = sorted(positions, key=lambda position: -lengths[position])
        batches += cut(ordered, batch_size)
    return batches


def cut(positions: Sequence[int], size: int) -> list[list[int]]:
    """A sequence in pieces of ``size``; the last may be smaller."""
    return [list(positions[start : start + size]) for start in range(0, len(positions), size)]
