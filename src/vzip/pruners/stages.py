"""Several cuts with a number of kept tokens each: the arguments of such pruners and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from vzip.keys import whole_number

from .base import PromptState


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A list of a configuration, or one value alone."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def check_layers(layers: tuple[Any, ...], first: int) -> list[str]:
    """What is wrong with ``layers``, in at most one message; ``first`` is the lowest that can stand there."""
    if layers and all(whole_number(first).allows(layer) for layer in layers) and list(layers) == sorted(set(layers)):
        return []
    return [
        f"pruner.layers={list(layers)}: must be whole numbers, {first} or more, in ascending order, as [{first + 1},"
        f" {first + 5}]."
    ]


def check_keep(keep: tuple[Any, ...], layers: tuple[Any, ...]) -> list[str]:
    """What is wrong with ``keep``, a number for each of ``layers``."""
    problems = []
    counted = all(whole_number(1).allows(value) for value in keep)
    if not counted and not all(isinstance(value, float) and 0 < value <= 1 for value in keep):
        problems.append(
            f"pruner.keep={list(keep)}: must be whole numbers of visual tokens an image, 1 or more, or the fractions of"
            " them that are kept, above 0 and at most 1.0 (with a decimal point); all of one kind."
        )
    elif list(keep) != sorted(keep, reverse=True):
        problems.append(f"pruner.keep={list(keep)}: must not rise, for what was dropped does not come back.")
    if len(keep) != len(layers):
        problems.append(
            f"pruner.keep={list(keep)}: must be as many numbers as pruner.layers={list(layers)} has, one for each"
            " layer."
        )
    return problems


def num_kept(keep: float, num_entered: int) -> int:
    """A count, or a fraction of an image's visual tokens at layer 0, rounded down: exactly, as 0.29 of 100 is 29."""
    return min(keep, num_entered) if isinstance(keep, int) else math.floor(Fraction(str(keep)) * num_entered)


def num_entered(state: PromptState, image: Tensor) -> int:
    """How many visual tokens the image of these positions had at layer 0."""
    return int((state.embeds_visual_index == state.visual_index[image[0]]).sum())


def by_layer(cuts: Sequence[int], counts: Sequence[int], num_visual: int, num_layers: int) -> list[int]:
    """Visual tokens of each layer: all of them, then from each cut on its count."""
    starts, values = [*cuts, num_layers], [num_visual, *counts]
    return [value for begin, end, value in zip([0, *cuts], starts, values, strict=True) for _ in range(begin, end)]
