"""VisPruner: patches of high CLS attention, of the others those unlike each other (github.com/Theia-4869/VisPruner)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vzip.errors import ConfigError
from vzip.keys import SHARE
from vzip.ops.attention import at_least_float32
from vzip.ops.select import cosine_matrix, gather_rows

from .base import ChosenUnits
from .budget import part_of
from .vision import Signal, VisionOutput

REMOVED_AT_ONCE = 8


@dataclass(frozen=True)
class VisPruner(ChosenUnits):
    """Keeps important patches by CLS attention, and diverse ones by removing what has a likeness, eight at a time.

    The patches that are not important stand in order of attention. In each round every second one, the first included,
    is compared (cosine of the tower's rows) with those between; of these, up to eight whose nearest is nearest are
    removed, and the others go, most alike first, before those that they were compared with. CLS is dropped. A round
    of an odd number of patches, at which the published code fails, has one more to compare.

    Attributes:
        budget: tokens per crop.
        important_ratio: the part of the budget, rounded down, that goes to important patches.

    Raises:
        ConfigError: ``important_ratio`` is not within 0..1.
    """

    important_ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not SHARE.allows(self.important_ratio):
            raise ConfigError(f"compressor.important_ratio={self.important_ratio!r}: must be {SHARE.text}.")

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        num_important = part_of(self.important_ratio, num_tokens)
        num_diverse = num_tokens - num_important
        attention = at_least_float32(vision.read_patches(Signal("attention")))
        order = torch.sort(attention, dim=1, descending=True, stable=True).indices
        important, rest = order[:, :num_important], order[:, num_important:]
        cosine = cosine_matrix(vision.read_patches(Signal("hidden")))
        if num_diverse == 0:
            rest = rest[:, :0]
        while rest.shape[1] > num_diverse:
            compared, others = rest[:, ::2], rest[:, 1::2]
            num_removed = min(REMOVED_AT_ONCE, rest.shape[1] - num_diverse, compared.shape[1])
            to_others = gather_rows(cosine, compared).gather(2, others[:, None].expand(-1, compared.shape[1], -1))
            alike = torch.sort(to_others.amax(dim=2), dim=1, descending=True, stable=True).indices
            rest = torch.cat([compared.gather(1, alike[:, num_removed:]), others], dim=1)
        return torch.cat([important, rest], dim=1).sort(dim=1).values + int(vision.has_cls)
