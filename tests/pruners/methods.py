"""Further methods as pruners, to try the contract by: several cuts, repacked positions, keys, embeddings, new rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vzip.ops.select import top_indices
from vzip.pruners import Cut, PromptState, Pruner


@dataclass(frozen=True)
class PyramidDrop(Pruner):
    """(arXiv 2410.17247) At several layers, by that layer's own attention of the last token; positions repacked."""

    counts: dict[int, int]

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(self.counts)

    def schedule(self, num_visual: int, num_layers: int) -> list[int]:
        kept = {0: num_visual} | self.counts
        return [min(num_visual, kept[max(cut for cut in kept if cut <= layer)]) for layer in range(num_layers)]

    def cut(self, state: PromptState) -> Cut:
        scores = state.attention_rows(state.layer, [-1]).mean(dim=0)
        count = self.counts[state.layer]
        kept = [g[top_indices(scores[:, g], min(count, len(g)))[0]] for g in state.images]
        return Cut(torch.cat([state.text, *kept]).sort().values, positions="repacked")


@dataclass(frozen=True)
class Dart(Pruner):
    """(arXiv 2502.11494) Pivots by the L1 norms of the keys of the layer before; each claims what is least like it."""

    budget: int
    order: list[int]  # of the pivots: the authors' own is a Python set's
    num_pivots: int = 4
    chosen: list[list[int]] = field(default_factory=list)

    @property
    def cuts(self) -> tuple[int, ...]:
        return (2,)

    def schedule(self, num_visual: int, num_layers: int) -> None:
        return None

    def cut(self, state: PromptState) -> Cut:
        norms = state.keys(state.layer - 1).abs().sum(dim=(0, 2))
        after = state.text[state.text > state.images[0].max()]
        for group in (state.images[0], after):
            self.chosen.append(group[top_indices(norms[None, group], self.num_pivots)[0]].tolist())
        normed = torch.nn.functional.normalize(state.decoder.norm(state.hidden), dim=-1)
        kept = self.chosen[0].copy()
        left = [place for place in state.images[0].tolist() if place not in kept]
        for pivot in self.order:
            likeness = normed[left] @ normed[pivot]
            claimed = likeness.topk(self.budget // (2 * self.num_pivots), largest=False).indices.tolist()
            kept += [left[place] for place in claimed]
            left = [place for place in left if place not in kept]
        return Cut(torch.cat([state.text, torch.tensor(kept)]).sort().values)


@dataclass(frozen=True)
class SparseVlm(Pruner):
    """(arXiv 2410.04417, v1.5) Rated by text; what is dropped is clustered, and the clusters' means go on."""

    counts: dict[int, int]
    noise: list[Tensor]

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(self.counts)

    def schedule(self, num_visual: int, num_layers: int) -> None:
        return None

    def cut(self, state: PromptState) -> Cut:
        visual, num_tokens = state.images[0], len(state.hidden)
        first = (state.embeds_visual_index >= 0).nonzero()[:, 0]
        text = state.embeds[first.max() + 1 :]
        relevance = (state.embeds[first] @ text.T).softmax(dim=1).mean(dim=0)
        raters = num_tokens - len(text) + (relevance > relevance.mean()).nonzero()[:, 0]
        scores = state.attention_rows(state.layer - 1, raters).mean(dim=0)[:, visual].mean(dim=0)
        is_kept = torch.zeros(len(visual), dtype=torch.bool)
        is_kept[top_indices(scores[None], min(self.counts[state.layer], len(visual) - 1))[0]] = True
        dropped = (~is_kept).nonzero()[:, 0]
        num_recycled = int(0.3 * len(dropped)) + 1
        order = dropped[scores[dropped].sort(descending=True, stable=True).indices]
        merged = self.merge(state.hidden[visual[order[:num_recycled]]], list(self.counts).index(state.layer))
        index = torch.cat(
            [
                torch.arange(int(visual[0])),
                visual[is_kept],
                -1 - torch.arange(len(merged)),
                torch.arange(int(visual[-1]) + 1, num_tokens),
            ]
        )
        return Cut(index, merged, torch.zeros(len(merged), dtype=torch.int64), "repacked")

    def merge(self, rows: Tensor, stage: int) -> Tensor:
        num_clusters = len(rows) // 10 + 1
        distance = torch.cdist(rows, rows) / rows.shape[1] ** 0.5
        nearest = distance.topk(num_clusters, largest=False).values
        density = (-(nearest**2).mean(dim=1)).exp() + self.noise[stage] * 1e-6
        denser = density[None] > density[:, None]
        apart = distance.masked_fill(~denser, float("inf")).min(dim=1).values
        apart = torch.where(apart.isinf(), distance.max(), apart)
        centres = (density * apart).topk(num_clusters).indices
        group = distance[centres].argmin(dim=0)
        group[centres] = torch.arange(num_clusters)
        return torch.stack([rows[group == cluster].mean(dim=0) for cluster in range(num_clusters)])
