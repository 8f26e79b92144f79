"""PruMerge and PruMerge+: patches of high attention, each joined by its nearest ones (arXiv 2403.15388)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vzip.ops.attention import at_least_float32
from vzip.ops.select import cosine_matrix, gather_rows, remaining_rows, top_indices, uniform_indices

from .base import Budgeted, Selection
from .vision import Signal, VisionOutput

NUM_NEIGHBORS = 32


@dataclass(frozen=True)
class PruMerge(Budgeted):
    """Keeps the ``budget.num_tokens - 1`` patches of highest attention, and one token that is all others' sum.

    To each kept patch its 32 nearest patches (cosine of keys), kept ones among them, are added, each times its own
    attention; to the last token all patches that are dropped, likewise. Weights are not normalised. Attention and keys
    are those of one head that is not divided, of the layer ``layer``; the softmax row is CLS's, or without a CLS the
    mean that is received. CLS is dropped. A budget that holds all patches leaves them as they are.

    The count is fixed by a rule of ours: the published one counts outliers of the attention, over the whole batch at
    once. The published code forgets one patch at some grids, has kept patches by attention and not in reading order,
    and in its form for training leaves some dropped patches out; ours does none of this.

    Attributes:
        budget: tokens per crop, the last one included.
        layer: the layer of attention and keys (-1: the last), see ``Signal.layer``.

    Raises:
        ConfigError: a layer that is no whole number.
    """

    layer: int | None = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        Signal("undivided_keys", self.layer)

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("undivided_attention", self.layer), Signal("undivided_keys", self.layer)})

    def select(self, vision: VisionOutput) -> Selection:
        first, num_tokens = int(vision.has_cls), self.num_tokens(vision.shape)
        attention = at_least_float32(vision.read_patches(Signal("undivided_attention", self.layer)))
        if num_tokens == vision.num_patches:
            patches = torch.arange(first, vision.num_rows, device=attention.device)
            return Selection(patches.expand(len(attention), -1))
        kept = self._kept(attention, num_tokens - 1)
        weights = merge_weights(attention, vision.read_patches(Signal("undivided_keys", self.layer)), kept)
        is_kept = torch.zeros_like(attention, dtype=torch.bool).scatter(1, kept, True)
        best_dropped = attention.masked_fill(is_kept, -1.0).argmax(dim=1, keepdim=True)  # the last token's place
        merge_index = torch.full_like(is_kept, num_tokens - 1, dtype=torch.int64).masked_fill(is_kept, -1)
        return Selection(
            torch.cat([kept, best_dropped], dim=1) + first,
            functional.pad(merge_index.scatter(1, best_dropped, -1), (first, 0), value=-1),
            num_contextual=1,
            weights=functional.pad(weights, (first, 0)),
        )

    def _kept(self, attention: Tensor, num_kept: int) -> Tensor:
        """Patches kept, ascending: int64 ``[N, num_kept]``."""
        return top_indices(attention, num_kept)


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge, but only half of the patches kept, rounded down, are those of highest attention.

    The rest is spread evenly, in reading order, over the patches that are left: again a rule of ours, since the
    published grid keeps all, fails or leaves the end of the image out, depending on the data.
    """

    def _kept(self, attention: Tensor, num_kept: int) -> Tensor:
        best = top_indices(attention, num_kept // 2)
        left = remaining_rows(best, attention.shape[1])
        spread = left.index_select(1, uniform_indices(num_kept - best.shape[1], left.shape[1], left.device))
        return torch.cat([best, spread], dim=1).sort(dim=1).values


def merge_weights(attention: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
    """What each token is made of: a row for each kept patch, and one of all patches that are dropped.

    Args:
        attention: ``[N, P]``.
        keys: ``[N, P, d]``.
        kept: int64 ``[N, K]``.

    Returns:
        ``[N, K + 1, P]``.
    """
    own = kept[:, :, None]
    to_kept = gather_rows(cosine_matrix(keys), kept).scatter(2, own, -torch.inf)
    nearest = torch.sort(to_kept, dim=2, descending=True, stable=True).indices[:, :, :NUM_NEIGHBORS]
    each = attention[:, None].expand(to_kept.shape)
    of_kept = torch.zeros_like(each).scatter(2, nearest, each.gather(2, nearest)).scatter(2, own, 1.0)
    return torch.cat([of_kept, attention.scatter(1, kept, 0.0)[:, None]], dim=1)
