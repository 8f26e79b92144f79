"""PruneSID: of patches in groups by principal component the best ones (github.com/ZhengyaoFang/PruneSID)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from vzip.ops.attention import at_least_float32
from vzip.ops.select import cosine_matrix

from .base import ChosenUnits
from .vision import Signal, VisionOutput


@dataclass(frozen=True)
class PruneSid(ChosenUnits):
    """Groups patches by the principal component that each loads most on; every group keeps its best, unlike first.

    There are K // 4 groups, K being the budget, one at least: components over patches of the sigmoid of the tower's
    rows, each less its mean over features. By CLS attention, a patch of a group is a winner unless one before it is
    more like it (cosine of rows) than K / 32 times the mean of all pairs. A group keeps one patch and a part of the
    rest of the budget by its winners, at most 5 * ceil(K / 64) and no more than its winners; these limits are raised by
    one for all until they hold K. What limits cut off goes to the groups of most winners. Of a group, winners are kept
    first, then the others. CLS, where there is one, is kept and counts as one of K.

    Components are exact (an eigendecomposition in float64, for which a GPU waits), where the published code draws them
    at random without a seed. Groups of equally many winners are topped up in order. Patches never load on a component
    without variance, and of anyres crops each row stands at its own place, which the published code scrambles.
    """

    keeps_cls: ClassVar[bool] = True

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("attention")})

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        rows = at_least_float32(vision.read_patches(Signal("hidden")))
        attention = at_least_float32(vision.read_patches(Signal("attention")))
        order = torch.sort(attention, dim=1, descending=True, stable=True).indices
        num_groups = max(num_tokens // 4, 1)
        group = _groups(rows, num_groups).gather(1, order)  # patches stand by attention from here on
        is_winner = _winners(cosine_matrix(rows), group, order, num_tokens / 32)
        members = functional.one_hot(group, num_groups)
        sizes, winners = members.sum(dim=1), (members * is_winner[..., None]).sum(dim=1)
        quota = quotas(sizes, winners, num_tokens, num_tokens - int(vision.has_cls))
        by_group = torch.sort(2 * group + (~is_winner).long(), dim=1, stable=True)
        first = sizes.cumsum(dim=1) - sizes
        rank = torch.arange(rows.shape[1], device=rows.device) - first.gather(1, by_group.values // 2)
        is_kept = rank < quota.gather(1, by_group.values // 2)
        kept = torch.zeros_like(is_kept).scatter(1, order.gather(1, by_group.indices), is_kept)
        patches = torch.sort(~kept, dim=1, stable=True).indices[:, : num_tokens - int(vision.has_cls)]
        return functional.pad(patches + 1, (1, 0)) if vision.has_cls else patches


def _groups(rows: Tensor, num_groups: int) -> Tensor:
    """The principal component that each patch loads most on: int64 ``[N, P]``."""
    values = torch.sigmoid(rows).double()
    values = values - values.mean(dim=2, keepdim=True)
    variance, loadings = torch.linalg.eigh(values @ values.transpose(1, 2))  # the lowest variance first
    tiny = variance[:, -1:] * (torch.finfo(variance.dtype).eps * variance.shape[1])
    loadings = loadings.abs() * (variance > tiny)[:, None]
    return loadings.flip(2)[:, :, :num_groups].argmax(dim=2)


def _winners(cosine: Tensor, group: Tensor, order: Tensor, factor: float) -> Tensor:
    """Bool ``[N, P]`` in the order of ``order``: those that no winner of their group before them is too much like."""
    num_patches = order.shape[1]
    above = cosine.triu(diagonal=1).sum(dim=(1, 2), dtype=torch.float64)
    limit = factor * above / max(num_patches * (num_patches - 1) // 2, 1)
    square = order[:, :, None].expand_as(cosine)
    cosine = cosine.gather(1, square).gather(2, square.transpose(1, 2))
    beats = ((cosine > limit[:, None, None]) & (group[:, :, None] == group[:, None])).triu(diagonal=1)
    is_winner = torch.ones_like(group, dtype=torch.bool)
    for number in range(num_patches):
        is_winner = is_winner & ~(beats[:, number] & is_winner[:, number, None])
    return is_winner


def quotas(sizes: Tensor, winners: Tensor, num_tokens: int, num_patches_kept: int) -> Tensor:
    """How many patches each group keeps, int64 ``[N, G]``, of ``sizes`` and ``winners``."""
    if num_patches_kept == 0:
        return torch.zeros_like(sizes)
    limit = torch.minimum(sizes, winners).clamp(max=5 * math.ceil(num_tokens / 64))
    raised = torch.arange(num_tokens + 1, device=sizes.device)[:, None] + limit[:, None]  # [N, by how much, G]
    held = torch.minimum(raised, sizes[:, None]).sum(dim=2)
    by = (held < sizes.sum(dim=1, keepdim=True).clamp(max=num_tokens)).sum(dim=1, keepdim=True)
    limit = torch.minimum(limit + by, sizes)
    least = sizes.clamp(max=1)
    others = num_patches_kept - least.sum(dim=1, keepdim=True)
    parts = (winners.float() / winners.sum(dim=1, keepdim=True)).double().cumsum(dim=1).float() * others
    quota = torch.minimum(least + parts.round().long().diff(dim=1, prepend=torch.zeros_like(others)), limit)
    fullest = torch.sort(winners, dim=1, descending=True, stable=True).indices
    room = (limit - quota).gather(1, fullest)
    left = num_patches_kept - quota.sum(dim=1, keepdim=True) - (room.cumsum(dim=1) - room)
    return quota.scatter_add(1, fullest, torch.minimum(left.clamp(min=0), room))
