"""HoloV: every stretch of the image keeps a share by its attention (github.com/obananas/HoloV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from vzip.ops.attention import at_least_float32

from .base import ChosenUnits
from .vision import Signal, VisionOutput

NUM_CHUNKS = 16


@dataclass(frozen=True)
class HoloV(ChosenUnits):
    """Cuts a whole image into 16 stretches in reading order; each keeps its patches of highest CLS attention.

    A stretch's share of the budget is its mean attention's share of the sum over stretches, rounded down; what rounding
    leaves goes, one each, to the stretches of largest share. What a stretch has no patches for goes on to the next one,
    after the last to the first; the published code fills up with zeros instead. Of LLaVA-NeXT the base crop and the
    tiles without padding follow one another, newlines are left out. CLS is dropped, nothing is merged.

    The published score adds the variance of a patch's similarities to its attention, scaled in each stretch to a
    constant part of the attention's mean. It enters shares alone, and there it cancels out, so that it is not computed.

    Attributes:
        budget: tokens per crop; an image has the budgets of all its crops.
    """

    scope: ClassVar[Literal["crop", "image"]] = "image"
    space: ClassVar[Literal["tower", "projected"]] = "projected"
    uses_valid: ClassVar[bool] = True

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        attention, valid = at_least_float32(vision.read_patches(Signal("attention"))), vision.valid_patches
        chunk = _chunks(torch.ones_like(attention, dtype=torch.bool) if valid is None else valid)
        members = functional.one_hot(chunk, NUM_CHUNKS + 1).to(attention.dtype)  # [N, P, chunks and what shows nothing]
        room = members.sum(dim=1).long()
        mean = (attention[:, None] @ members)[:, 0, :NUM_CHUNKS] / room[:, :NUM_CHUNKS].clamp(min=1)
        share = mean / mean.sum(dim=1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny)
        quota = (share * num_tokens).floor().long()
        left = num_tokens - quota.sum(dim=1, keepdim=True)
        quota = quota + (torch.sort(share, dim=1, descending=True, stable=True).indices.argsort(dim=1) < left)
        quota = _fitted(functional.pad(quota, (0, 1)), room, num_tokens)
        order = torch.sort(attention, dim=1, descending=True, stable=True).indices
        by_chunk = torch.sort(chunk.gather(1, order), dim=1, stable=True)
        first = room.cumsum(dim=1) - room
        rank = torch.arange(chunk.shape[1], device=chunk.device) - first.gather(1, by_chunk.values)
        is_kept = rank < quota.gather(1, by_chunk.values)
        kept = torch.zeros_like(is_kept).scatter(1, order.gather(1, by_chunk.indices), is_kept)
        return torch.sort(~kept, dim=1, stable=True).indices[:, :num_tokens] + int(vision.has_cls)


def _chunks(valid: Tensor) -> Tensor:
    """Bool ``[N, P]`` -> each patch's stretch ``[N, P]``, the first ones longer by one; 16 for what shows nothing."""
    number, count = valid.long().cumsum(dim=1) - 1, valid.sum(dim=1, keepdim=True)
    size, num_longer = count // NUM_CHUNKS, count % NUM_CHUNKS
    in_shorter = num_longer + (number - num_longer * (size + 1)) // size.clamp(min=1)
    return torch.where(number < num_longer * (size + 1), number // (size + 1), in_shorter).masked_fill(
        ~valid, NUM_CHUNKS
    )


def _fitted(quota: Tensor, room: Tensor, num_tokens: int) -> Tensor:
    """Quotas ``[N, 17]`` that no stretch is too small for: the surplus goes on to the next one, then around again."""
    fitted, surplus = list(quota.unbind(dim=1)), num_tokens - quota.sum(dim=1)
    for chunk in (*range(NUM_CHUNKS), *range(NUM_CHUNKS), NUM_CHUNKS):
        wanted = fitted[chunk] + surplus
        fitted[chunk] = torch.minimum(wanted, room[:, chunk])
        surplus = wanted - fitted[chunk]
    return torch.stack(fitted, dim=1)
