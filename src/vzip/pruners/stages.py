"""Several cuts with a number of kept tokens each: the arguments of such pruners and what follows from them."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor

from vzip.errors import ConfigError
from vzip.keys import check_value, optional, whole_number

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


def check_budget(budget: Any) -> list[str]:
    """What is wrong with a pruner's budget, in at most one message."""
    return check_value("pruner.budget", budget, optional(whole_number(1)))


def nearest_count(budget: int, num_visual: int, num_full: int, num_layers: int, least: int = 1) -> int:
    """Visual tokens of an image that go on after one cut, so that the average over layers is nearest to a budget.

    FastV's formula: ``num_full`` layers attend to all, the others to what goes on.

    Raises:
        ConfigError: it would have to be fewer than ``least``.
    """
    if num_visual <= budget:
        return num_visual
    num_after = num_layers - num_full
    count = (2 * (budget * num_layers - num_full * num_visual) + num_after) // (2 * num_after)  # rounded
    if count < least:
        smallest = (num_full * num_visual + num_after * least) / num_layers
        raise out_of_reach(budget, smallest, num_full, num_visual, num_layers)
    return count


def shrinking_counts(budget: int, num_visual: int, cuts: Sequence[int], num_layers: int) -> list[int]:
    """The same after several cuts: x, x * x, x * x * x ... of the image's tokens, rounded down, one at least.

    x has four decimals, as published ones have.

    Raises:
        ConfigError: one token after each cut is more on average.
    """
    if num_visual <= budget:
        return [num_visual] * len(cuts)
    wanted = budget * num_layers

    def counts(x: int) -> list[int]:
        return [max(1, num_visual * x**power // 10_000**power) for power in range(1, len(cuts) + 1)]

    def total(x: int) -> int:
        return sum(by_layer(cuts, counts(x), num_visual, num_layers))

    if wanted < total(1):
        raise out_of_reach(budget, total(1) / num_layers, cuts[0], num_visual, num_layers)
    above = bisect.bisect_left(range(10_001), wanted, key=total)
    return counts(min((above - 1, above), key=lambda x: abs(total(x) - wanted)))


def out_of_reach(budget: int, smallest: float, num_full: int, num_visual: int, num_layers: int) -> ConfigError:
    """What is said of a budget below the smallest average that a method can have."""
    return ConfigError(
        f"budget={budget}tok with compressor=none is a pruner's average over the {num_layers} layers, and the first"
        f" {num_full} see all {num_visual} visual tokens: it cannot be below {smallest:.1f}. Set a larger budget, or"
        " let fewer layers see everything (pruner.K, pruner.layers)."
    )


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
