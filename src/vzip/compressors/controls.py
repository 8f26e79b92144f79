"""Controls: what a method must beat, and its two halves alone. Compressors like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vzip.ops.merge import assign_to_targets, target_positions
from vzip.ops.select import random_indices, uniform_indices

from .base import Budgeted, ChosenUnits, Compressor, Selection, TopScores, check_seed
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
