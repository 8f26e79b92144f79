"""Attention in a vision tower, layer by layer: where it goes, how few patches get it, how far they are.

Only the queries and keys of one layer are held at a time, and never a whole map. Shapes: N images, P patches, L tokens
(with CLS where there is one).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from vzip.models.towers.structure import Tower
from vzip.models.towers.tap import record_output
from vzip.ops.attention import BLOCK_ELEMENTS, cls_attention, query_rows, received_attention

CLS, RECEIVED = "CLS", "received"
TOP_SHARES = (0.01, 0.05, 0.10)
# Edges of the bins for one patch's share of the attention, four a decade; what is below the first is in the first bin.
EDGES = 10.0 ** (torch.arange(-24, 1, dtype=torch.float64) / 4)


@dataclass(frozen=True)
class Proxies:
    """For each patch the patch that it attends to most, its proxy, by the mean over heads; may be itself.

    Attributes:
        index: int64 ``[N, P]``.
        distance: ``[N, P]`` from the patch to its proxy, in patches, between their middles.
        mean_distance: ``[N, P]``, the same on average over all patches by the attention that each gets.
    """

    index: Tensor
    distance: Tensor
    mean_distance: Tensor


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention, made of its projections; distributions are over patches and sum to 1.

    Attributes:
        layer: 1 for the first: its number among the tower's hidden states.
        queries, keys: ``[N, L, H * d]``, unscaled.
        num_heads, scale: of the layer.
        grid: (rows, cols) of patches.
        has_cls: whether row 0 is CLS.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    num_heads: int
    scale: float
    grid: tuple[int, int]
    has_cls: bool

    def maps(self) -> dict[str, Tensor]:
        """``[N, P]`` by name: attention of the CLS token, where there is one, and attention received from all tokens.

        Means over heads; what goes to CLS itself is left out.
        """
        found = {}
        if self.has_cls:
            found[CLS] = cls_attention(self.queries, self.keys, self.num_heads, self.scale)
        received = received_attention(self.queries, self.keys, self.num_heads, self.scale)
        found[RECEIVED] = received[:, int(self.has_cls) :]
        return {name: _to_one(weights) for name, weights in found.items()}

    def of_patches(self, patch_index: Tensor) -> Tensor:
        """``[N, Q, P]``: where the attention of patches int64 ``[Q]`` goes, mean over heads; CLS left out."""
        # Patches are counted without CLS, rows with it.
        rows = patch_index.to(self.queries.device) + int(self.has_cls)
        attended = query_rows(self.queries, self.keys, self.num_heads, self.scale, rows)
        return _to_one(attended[..., int(self.has_cls) :])

    def proxies(self) -> Proxies:
        """Of every patch, in blocks of them."""
        num_images, num_tokens = self.keys.shape[:2]
        size = max(1, BLOCK_ELEMENTS // (num_images * self.num_heads * num_tokens))
        between = distances(self.grid).to(self.keys.device)
        index, far = [], []
        for block in torch.arange(len(between)).split(size):
            rows = self.of_patches(block).double()
            index.append(rows.argmax(dim=-1))
            far.append((rows * between[block.to(between.device)]).sum(dim=-1))
        found = torch.cat(index, dim=1)
        to_proxy = between[torch.arange(len(between), device=found.device).expand_as(found), found]
        return Proxies(found, to_proxy, torch.cat(far, dim=1))


@torch.inference_mode()
def each_layer(tower: Tower, pixel_values: Tensor, layers: Collection[int]) -> Iterator[LayerAttention]:
    """Runs a tower and gives the attention of some layers in turn; later ones do not run.

    Args:
        tower: from ``find_tower``.
        pixel_values: ``[N, 3, h, w]``.
        layers: from 1 to ``tower.geometry.num_layers``.

    Raises:
        PromptError: pixels of a wrong shape.
    """
    hidden = tower.embed(pixel_values)
    for index in range(max(layers)):
        if index + 1 not in layers:
            hidden = tower.run_layer(index, hidden)
            continue
        query_projection, key_projection, scale = tower.attention_of(index)
        found: dict[str, Tensor] = {}
        with record_output(query_projection, "queries", found), record_output(key_projection, "keys", found):
            hidden = tower.run_layer(index, hidden)
        geometry = tower.geometry
        yield LayerAttention(
            index + 1, found["queries"], found["keys"], tower.num_heads, scale, geometry.grid, geometry.has_cls
        )


def _to_one(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def entropy(weights: Tensor) -> Tensor:
    """In nats, of distributions ``[..., P]`` that sum to 1: ``[...]`` float64; log P where all are equal."""
    return torch.special.entr(weights.double()).sum(dim=-1)


def num_top(num_patches: int, share: float) -> int:
    """Patches in the top ``share`` of so many, rounded up."""
    return math.ceil(round(num_patches * share, 9))


def top_mass(weights: Tensor, share: float) -> Tensor:
    """What the highest ``num_top`` of distributions ``[..., P]`` have together: ``[...]`` float64."""
    return weights.double().topk(num_top(weights.shape[-1], share), dim=-1).values.sum(dim=-1)


def histogram(weights: Tensor) -> Tensor:
    """How many of ``weights`` are in each bin of ``EDGES``, and their sum: float64 ``[2, bins]``."""
    values = weights.double().flatten().cpu()
    bins = torch.bucketize(values, EDGES[1:-1])
    counts = torch.bincount(bins, minlength=len(EDGES) - 1).double()
    return torch.stack([counts, torch.bincount(bins, values, minlength=len(EDGES) - 1)])


@cache
def distances(grid: tuple[int, int]) -> Tensor:
    """Between the middles of any two patches, in patches: float64 ``[P, P]``."""
    rows, cols = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    places = torch.stack([rows.flatten(), cols.flatten()], dim=1)
    between = places[:, None] - places
    return between.square().sum(dim=-1).sqrt()


def chance_distance(grid: tuple[int, int]) -> float:
    """Mean distance from a patch to where its attention would go if every patch got the same: exact.

    By displacement: (R - |r|) (C - |c|) of the R C places are so far apart.
    """
    rows, cols = grid
    total = sum(
        (rows - abs(r)) * (cols - abs(c)) * math.hypot(r, c)
        for r in range(1 - rows, rows)
        for c in range(1 - cols, cols)
    )
    return total / (rows * cols) ** 2


def softmax_slope(logits: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The softmax s of one token with logit z among others whose logits are 0, and its slope ds/dz = s (1 - s).

    Args:
        logits: z, any shape.
        num_tokens: it and the others.
    """
    share = torch.sigmoid(logits.double() - math.log(num_tokens - 1))
    return share, share * (1 - share)
