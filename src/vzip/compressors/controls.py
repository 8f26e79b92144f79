"""Controls: what a method must beat, and its two halves alone. Compressors like any other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vzip.errors import ConfigError
from vzip.ops.grid import cells
from vzip.ops.merge import MergeRule, assign_to_targets, target_positions
from vzip.ops.select import random_indices, uniform_indices

from .base import Budgeted, ChosenUnits, Compressor, PresentPatches, Selection, TopScores, check_seed
from .plan import TowerPlan, TowerUse
from .vision import Signal, VisionOutput, VisionShape


@dataclass(frozen=True)
class Identity(Compressor):
    """No compression: exactly the rows the unmodified model passes to its projector, packed as it packs them."""

    scope: ClassVar[Literal["crop", "image"]] = "image"
    space: ClassVar[Literal["tower", "projected"]] = "projected"
    is_vanilla: ClassVar[bool] = True

    def num_tokens(self, shape: VisionShape) -> int:
        return shape.num_vanilla

    def select(self, vision: VisionOutput) -> Selection:
        rows = torch.arange(vision.first_stock_row, vision.num_rows, device=vision.hidden.device)
        return Selection(rows.expand(vision.hidden.shape[0], -1))


@dataclass(frozen=True)
class RandomTokens(ChosenUnits):
    """``budget.num_tokens`` patches chosen at random (never CLS), the rest dropped.

    One subset per seed and number of patches, the same for every crop: an image gets the same tokens alone, in any
    batch and on any device. Run several seeds to see the spread.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        patches = random_indices(num_tokens, vision.num_patches, self.seed, vision.hidden.device)
        return (patches + int(vision.has_cls)).expand(vision.hidden.shape[0], -1)


@dataclass(frozen=True)
class UniformTokens(ChosenUnits):
    """``budget.num_tokens`` patches evenly spaced in raster order (never CLS), the rest dropped."""

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        patches = uniform_indices(num_tokens, vision.num_patches, vision.hidden.device)
        return (patches + int(vision.has_cls)).expand(vision.hidden.shape[0], -1)


@dataclass(frozen=True)
class LeastAttended(TopScores):
    """Keeps the ``budget.num_tokens`` patches of lowest attention (of CLS, or received), drops the others and CLS.

    The first ablation of VisionZip's Table 5: 526 of 576 are all but the 50 that are attended to most.
    """

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def score(self, vision: VisionOutput) -> Tensor:
        return -vision.read(Signal("attention"))


@dataclass(frozen=True)
class Pooled(Budgeted):
    """The patch grid averaged to a smaller grid of ``budget.num_tokens`` cells; CLS is dropped.

    Of the grids with as many cells the one nearest to the patch grid's aspect (of a square one's two, the one with
    fewer rows). Every patch is in one cell; where a side is no multiple, cells differ by one patch in that side.
    """

    merge_rule: ClassVar[MergeRule] = "mean"  # type: ignore[misc]  # fixed here, an option elsewhere
    uses_grid: ClassVar[bool] = True

    def num_tokens(self, shape: VisionShape) -> int:
        num_tokens = super().num_tokens(shape)
        _grid_of(num_tokens, shape.grid, "pooling averages")
        return num_tokens

    def select(self, vision: VisionOutput) -> Selection:
        first, width, device = int(vision.has_cls), vision.grid[1], vision.hidden.device
        rows, cols = _grid_of(self.num_tokens(vision.shape), vision.grid, "pooling averages")
        row, middle_row = cells(vision.grid[0], rows, device)
        col, middle_col = cells(width, cols, device)
        places = (middle_row[:, None] * width + middle_col).flatten()
        cell = (row[:, None] * cols + col).flatten().scatter(0, places, -1)
        num_crops = len(vision.hidden)
        return Selection(
            (places + first).expand(num_crops, -1), functional.pad(cell, (first, 0), value=-1).expand(num_crops, -1)
        )


@cache
def _grid_of(
    num_cells: int, grid: tuple[int, int], what_happens: str, most_unlike: int | None = None
) -> tuple[int, int]:
    """(rows, cols) of so many cells within ``grid``, nearest to its aspect, ties to fewer rows.

    Args:
        num_cells: rows * cols.
        grid: of patches.
        what_happens: to the grid, for the message.
        most_unlike: how many times as wide or as tall as ``grid`` it may be at most; None: any.

    Raises:
        ConfigError: there are none.
    """

    def unlike(cells: tuple[int, int]) -> float:
        tall, wide = cells[0] * grid[1], cells[1] * grid[0]
        return max(tall, wide) / min(tall, wide)

    within = [(rows, cols) for rows in range(1, grid[0] + 1) for cols in range(1, grid[1] + 1)]
    allowed = [cells for cells in within if most_unlike is None or unlike(cells) <= most_unlike]
    fits = [cells for cells in allowed if cells[0] * cells[1] == num_cells]
    if not fits:
        counts = {rows * cols for rows, cols in allowed}
        near = [
            max((n for n in counts if n < num_cells), default=None),
            min((n for n in counts if n > num_cells), default=None),
        ]
        rule = "" if most_unlike is None else f" and at most {most_unlike} times as wide or as tall"
        raise ConfigError(
            f"budget.num_dominant + budget.num_contextual = {num_cells} visual tokens per crop: {what_happens} a grid"
            f" of {grid[0]} x {grid[1]} patches to rows x columns of cells, no more than those{rule}, and no such grid"
            f" has {num_cells}. The nearest that are allowed are {' and '.join(str(n) for n in near if n)}: change the"
            " budget, or use another method."
        )
    return min(fits, key=unlike)


@dataclass(frozen=True)
class Resized(PresentPatches):
    """The image made smaller: the vision tower runs on as many patches as there are visual tokens, CLS is dropped.

    Each crop is resized from the processor's pixels, bicubic and antialiased, to the most nearly square rows x columns
    of patches (rows the fewer) whose product is ``budget.num_tokens``: 64 = 8 x 8, 128 = 8 x 16, 192 = 12 x 16. More
    than twice as wide as tall it may not become, nor larger than it was. The tower's position embeddings are
    interpolated (bicubic, as Hugging Face does). A token stands where the middle of its patch was.
    """

    tower_use: ClassVar[TowerUse] = "resized"

    def num_tokens(self, shape: VisionShape) -> int:
        num_tokens = super().num_tokens(shape)
        self._grid(num_tokens, shape)
        return num_tokens

    def plan(self, shape: VisionShape) -> TowerPlan:
        return TowerPlan(grid=self._grid(self.num_tokens(shape), shape))

    @staticmethod
    def _grid(num_tokens: int, shape: VisionShape) -> tuple[int, int]:
        return _grid_of(num_tokens, shape.grid, "resizing the image shrinks", most_unlike=2)


@dataclass(frozen=True)
class ZeroImage(UniformTokens):
    """As ``UniformTokens``, of a blank image: zeros after normalisation, the processor's mean colour everywhere.

    What the language model answers without seeing, from as many visual tokens.
    """

    def view(self, pixel_values: Tensor) -> Tensor:
        return torch.zeros_like(pixel_values)


@dataclass(frozen=True)
class DominantOnly(TopScores):
    """VisionZip without the merge: ``budget.num_tokens`` dominant tokens (CLS among them), the rest dropped.

    The whole budget goes to dominant tokens, so that it compares with VisionZip at the same number of tokens.
    """

    keeps_cls: ClassVar[bool] = True

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def score(self, vision: VisionOutput) -> Tensor:
        return vision.read(Signal("attention"))


@dataclass(frozen=True)
class ContextualOnly(Budgeted):
    """VisionZip without the selection: all patches merged into ``budget.num_tokens`` contextual tokens (rule "sum").

    CLS is left out, as the unmodified model leaves it out: nothing is kept as it is, and CLS has no place in the grid.
    """

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("keys")})

    def select(self, vision: VisionOutput) -> Selection:
        first, num_tokens = int(vision.has_cls), self.num_tokens(vision.shape)
        keys = vision.read_patches(Signal("keys"))
        assignment = assign_to_targets(keys, num_tokens)
        targets = target_positions(keys.shape[1], num_tokens, keys.device).expand(keys.shape[0], -1)
        merge_index = functional.pad(assignment.scatter(1, targets, -1), (first, 0), value=-1)
        return Selection(targets + first, merge_index, num_contextual=num_tokens)
