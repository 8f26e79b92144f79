"""SCOPE: patches that CLS attends to and that cover the others (github.com/kinredon/SCOPE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vzip.errors import ConfigError
from vzip.keys import number
from vzip.ops.attention import at_least_float32
from vzip.ops.select import cosine_matrix, gather_rows

from .base import ChosenUnits
from .vision import Signal, VisionOutput


@dataclass(frozen=True)
class Scope(ChosenUnits):
    """Keeps, one after the other, the patch that adds most to how well the kept ones cover all patches.

    A patch is covered by its greatest cosine (of the tower's rows) with a kept one, at least 0. What a candidate adds
    is the sum over all patches by which their cover would grow, times the candidate's CLS attention to the power
    ``alpha``; ties to the lower index. CLS is dropped, nothing is merged.

    Attributes:
        budget: tokens per crop.
        alpha: exponent of the attention: 0 heeds coverage alone.

    Raises:
        ConfigError: ``alpha`` is no number, or below 0.
    """

    uses_valid: ClassVar[bool] = True

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(0).allows(self.alpha):
            raise ConfigError(f"compressor.alpha={self.alpha!r}: must be {number(0).text}.")

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        cosine, valid = cosine_matrix(vision.read_patches(Signal("hidden"))), vision.valid_patches
        weight = at_least_float32(vision.read_patches(Signal("attention"))).to(cosine.dtype) ** self.alpha
        out = torch.zeros_like(weight)  # added to a score: what may not be kept any more, or only at the end
        if valid is not None:
            cosine = cosine * valid[:, :, None]  # what shows nothing need not be covered
            out = out.masked_fill(~valid, -1.0)
        cover, kept = torch.zeros_like(weight), []
        for _ in range(num_tokens):
            gain = (cosine - cover[:, :, None]).clamp(min=0).sum(dim=1)
            score = torch.where(out < 0, out, gain * weight)
            kept.append(score.argmax(dim=1, keepdim=True))
            out = out.scatter(1, kept[-1], -torch.inf)
            cover = torch.maximum(cover, gather_rows(cosine.transpose(1, 2), kept[-1])[:, 0])
        return torch.cat(kept, dim=1).sort(dim=1).values + int(vision.has_cls)
