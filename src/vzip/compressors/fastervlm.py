"""FasterVLM: the patches that the CLS token attends to most (arXiv 2412.01818)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import TopScores
from .vision import Signal, VisionOutput


@dataclass(frozen=True)
class FasterVLM(TopScores):
    """Keeps the ``budget.num_tokens`` patches of highest CLS attention; CLS itself is dropped, nothing is merged."""

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def score(self, vision: VisionOutput) -> Tensor:
        return vision.read(Signal("attention"))
