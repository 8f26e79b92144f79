"""How fast this machine is at the matrix products of a stage, with nothing around them: what a stage can reach at most.

The products of every shape that a stage multiplies rows by weights in are timed bare, in turn with the measurement's
passes, so that both see the same machine. A stage's limit is the time that all its operations, attention included,
would take at the rate of these products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch.nn import functional

from vzip.bench.hooks import Shape
from vzip.bench.timing import StageTimes, Stopwatch, Timing

LIMITED = ("tower", "prefill")
LEAST_SHARE = 0.01  # of a stage's operations: shapes that are less of it are left out
MOST_REPEATS = 64
# Operations that one timing takes at least, so that it is not the start of a kernel that is timed.
CPU_OPERATIONS, OPERATIONS = 2e9, 2e12


def operations_of(shape: Shape) -> int:
    """Of one product; a multiply-add is two."""
    return 2 * math.prod(shape)


def main_shapes(products: Mapping[Shape, int]) -> dict[Shape, int]:
    """Those of a stage's products that are most of its operations."""
    total = sum(count * operations_of(shape) for shape, count in products.items())
    return {s: count for s, count in products.items() if count * operations_of(s) >= LEAST_SHARE * total}


def name_of(shape: Shape) -> str:
    """``m x k x n``, as in a record."""
    return " x ".join(map(str, shape))


class BareProducts:
    """Rows and weights of some shapes, to be multiplied with a bias as a linear layer does.

    Args:
        shapes: of the products.
        device, dtype: as of the model.
    """

    def __init__(self, shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self._operands = {
            shape: (
                torch.randn(shape[0], shape[1], device=device, dtype=dtype),
                torch.randn(shape[2], shape[1], device=device, dtype=dtype),
                torch.randn(shape[2], device=device, dtype=dtype),
            )
            for shape in shapes
        }

    @classmethod
    def of(
        cls, passes: Iterable[Mapping[str, Mapping[Shape, int]]], device: torch.device, dtype: torch.dtype
    ) -> BareProducts:
        """Of the limited stages of several passes, each stage -> how often a product of each shape runs."""
        stages = [products for one in passes for stage, products in one.items() if stage in LIMITED]
        return cls({shape: None for products in stages for shape in main_shapes(products)}, device, dtype)

    @torch.inference_mode()
    def run(self) -> StageTimes:
        """Milliseconds of one product of each shape, by its name."""
        watch = Stopwatch(self.device)
        least = CPU_OPERATIONS if self.device.type == "cpu" else OPERATIONS
        for shape, operands in self._operands.items():
            repeats = min(MOST_REPEATS, max(1, math.ceil(least / operations_of(shape))))
            with watch.stage(name_of(shape), divide_by=repeats):
                for _ in range(repeats):
                    functional.linear(*operands)
        return watch.times_ms


def rates(products: Mapping[str, Mapping[Shape, int]], timings: Mapping[str, Timing]) -> dict[str, float]:
    """Operations a second of each limited stage's products: all of them over their medians' sum."""
    found = {}
    for stage in LIMITED:
        if shapes := main_shapes(products.get(stage, {})):
            milliseconds = sum(count * timings[name_of(shape)].median_ms for shape, count in shapes.items())
            found[stage] = 1e3 * sum(count * operations_of(shape) for shape, count in shapes.items()) / milliseconds
    return found
