"""DivPrune: the subset whose members are farthest apart (arXiv 2503.02175), with or without Cen's correction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vzip.errors import ConfigError
from vzip.ops.attention import at_least_float32
from vzip.ops.select import cosine_matrix, farthest_first

from .base import ChosenUnits
from .vision import Signal, VisionOutput


@dataclass(frozen=True)
class DivPrune(ChosenUnits):
    """Keeps the projected rows of a whole image that are most unlike each other, by greedy max-min cosine distance.

    The first is the row whose nearest other is farthest away; each next one has the greatest distance to the nearest
    kept one, ties to the lower index. Of LLaVA-NeXT the newline tokens are candidates like others, as published. Rows
    already kept are left out, which the published code forgets (it matters where rows are equal).

    Attributes:
        budget: tokens per crop; an image has the budgets of all its crops, whichever of them its tokens come from.
        centered: Cen's correction: distances of mean-centred rows, times how unlike the other rows each row is (the
            negated mean cosine, as it was, scaled to 0..1 over the image). By its description; no code is published.

    Raises:
        ConfigError: ``centered`` is no bool.
    """

    scope: ClassVar[Literal["crop", "image"]] = "image"
    space: ClassVar[Literal["tower", "projected"]] = "projected"

    centered: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.centered, bool):
            raise ConfigError(f"compressor.centered={self.centered!r}: must be true or false.")

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        first = int(vision.has_cls)
        rows = at_least_float32(vision.read_patches(Signal("projected")))
        cosine = cosine_matrix(rows)
        distance = 1 - (cosine_matrix(rows - rows.mean(dim=1, keepdim=True)) if self.centered else cosine)
        weight = _distinctiveness(cosine) if self.centered else torch.ones_like(cosine[:, 0])
        # A row's own distance to itself is the smallest of its column, its nearest other's the second-smallest.
        nearest_other = distance.topk(min(2, distance.shape[1]), dim=1, largest=False).values[:, -1]
        return farthest_first(distance, nearest_other.argmax(dim=1), num_tokens, weight) + first


def _distinctiveness(cosine: Tensor) -> Tensor:
    """``[N, U]``, 0..1: 1 for the row least like the others of its image."""
    num_others = max(cosine.shape[1] - 1, 1)
    others = -(cosine.sum(dim=2) - cosine.diagonal(dim1=1, dim2=2)) / num_others
    low, high = others.amin(dim=1, keepdim=True), others.amax(dim=1, keepdim=True)
    return (others - low) / (high - low).clamp(min=torch.finfo(others.dtype).tiny)
