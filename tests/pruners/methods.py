"""All pruners, and each as plain loops over a whole language model: no hooks, no cache, all anew at every step.

A row is named by the column of its token in the whole sequence; a merged one by (layer, image, number).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

import vzip
from vzip.pruners import Pruner


@dataclass
class View:
    """What a rule may look at: ``names`` and ``owner`` (-1 text) of the rows at a cut, and what layers make of them."""

    layer: int
    names: list[Any]
    owner: list[int]
    last: int  # the row of the prompt's last token
    places: list[int]  # position ids
    hidden: torch.Tensor
    before: torch.Tensor  # attention [H, L, L] of the layer before
    own: torch.Tensor  # of the layer that is cut
    keys: torch.Tensor  # [L, G * d] of the layer before
    normed: torch.Tensor
    embeds: torch.Tensor  # input of layer 0
    embeds_owner: list[int]
    num_prompt: int
    turns: torch.Tensor | None = None  # [L, 2 d], cosines and sines where positions have several axes

    def rows(self, image: int) -> list[int]:
        return [row for row, owner in enumerate(self.owner) if owner == image]

    def text_after(self, image: int) -> list[int]:
        return [
            row
            for row, owner in enumerate(self.owner)
            if owner == -1 and row > self.rows(image)[-1] and row <= self.last
        ]

    def entered(self, image: int) -> int:
        return self.embeds_owner.count(image)


def best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(sorted(scores, key=lambda row: -scores[row])[:count])


def count_of(keep: float, view: View, image: int) -> int:
    return min(keep, view.entered(image)) if isinstance(keep, int) else math.floor(keep * view.entered(image))


def fastv(pruner: Any, view: View, images: list[int]) -> dict[int, Any]:
    scores = {row: float(view.before[:, view.last, row].mean()) for image in images for row in view.rows(image)}
    found = {}
    for group in [images] if pruner.pooled else [[image] for image in images]:
        mine = {row: score for row, score in scores.items() if view.owner[row] in group}
        keep = pruner.keep
        kept = best(mine, round(len(mine) * keep) if isinstance(keep, float) else min(keep, len(mine)))
        found |= {image: ([row for row in kept if view.owner[row] == image], []) for image in group}
    return found


def pyramiddrop(pruner: Any, view: View, images: list[int]) -> dict[int, Any]:
    keep = pruner.keep[pruner.layers.index(view.layer)]
    found = {}
    for image in images:
        scores = {row: float(view.own[:, view.last, row].mean()) for row in view.rows(image)}
        found[image] = (best(scores, count_of(keep, view, image)), [])
    return found


def dart(pruner: Any, view: View, images: list[int]) -> dict[int, Any]:
    norm = [float(row.abs().sum()) for row in view.keys]
    found = {}
    for image in images:
        kept = best({row: norm[row] for row in view.rows(image)}, pruner.num_image_pivots)
        words = best({row: norm[row] for row in view.text_after(image)}, pruner.num_text_pivots)
        pivots = sorted([*kept, *words], key=lambda row: -norm[row])
        claims = [0] * len(pivots)
        each = pruner.num_claimed // (pruner.num_image_pivots + pruner.num_text_pivots)
        for number in range(each * (pruner.num_image_pivots + pruner.num_text_pivots)):
            claims[number % len(pivots)] += 1
        for pivot, number in zip(pivots, claims, strict=True):
            left = [row for row in view.rows(image) if row not in kept]
            likeness = {
                row: float(view.normed[row] @ view.normed[pivot] / view.normed[row].norm() / view.normed[pivot].norm())
                for row in left
            }
            kept = sorted([*kept, *sorted(left, key=lambda row: likeness[row])[:number]])
        found[image] = (kept, [])
    return found


def raters(view: View, image: int) -> list[int]:
    visual = [place for place, owner in enumerate(view.embeds_owner) if owner == image]
    words = [p for p, owner in enumerate(view.embeds_owner) if visual[-1] < p < view.num_prompt and owner == -1]
    relevance = [0.0] * len(words)
    for token in visual:
        products = [float(view.embeds[token] @ view.embeds[word]) for word in words]
        total = sum(math.exp(product - max(products)) for product in products)
        for number, product in enumerate(products):
            relevance[number] += math.exp(product - max(products)) / total / len(visual)
    chosen = [word for word, value in zip(words, relevance, strict=True) if value > sum(relevance) / len(words)]
    return [view.names.index(word) for word in chosen or words]


def sparsevlm(pruner: Any, view: View, images: list[int]) -> dict[int, Any]:
    stage, found = pruner.layers.index(view.layer - 1), {}
    for image in images:
        mine, rated_by = view.rows(image), raters(view, image)
        attention = torch.tensor([[float(view.before[:, word, row].mean()) for row in mine] for word in rated_by])
        scores = {row: float(attention[:, number].mean()) for number, row in enumerate(mine)}
        if isinstance(pruner, vzip.SparseVLM):
            count = min(count_of(pruner.keep[stage], view, image), len(mine) - 1)
        else:
            rank = int(torch.linalg.matrix_rank(attention))
            count = len(mine) if rank == len(mine) else min(int(rank * pruner.scale + pruner.bias), len(mine) - 1)
        kept = best(scores, count)
        dropped = sorted((row for row in mine if row not in kept), key=lambda row: -scores[row])
        dropped = dropped[: int(0.3 * len(dropped)) + 1] if dropped else []
        groups = clusters(view.hidden[dropped], pruner.noise(len(dropped)).tolist()) if dropped else []
        found[image] = (kept, [[dropped[member] for member in group] for group in groups])
    return found


def sparsevlm_plus(pruner: Any, view: View, images: list[int]) -> dict[int, Any]:
    found, width, heads = {}, view.keys.shape[1] // 2, range(len(view.before))  # two groups of keys in these models
    for image in images:
        mine, rated_by = view.rows(image), raters(view, image)
        corrected = {}
        for word in rated_by:
            for row in mine:
                apart = view.places[word] - view.places[row]
                turn = 2 * sum(math.cos(apart * 10000 ** (-2 * i / width)) for i in range(width // 2))
                if view.turns is not None:
                    turn = float(view.turns[word] @ view.turns[row])
                bias = turn / math.sqrt(width)
                for head in heads:
                    corrected[head, word, row] = float(view.before[head, word, row]) / bias
        sums = {head: sum(corrected[head, word, row] for word in rated_by for row in mine) for head in heads}
        strongest = best(sums, pruner.num_heads)
        scores = {row: sum(corrected[head, word, row] for head in strongest for word in rated_by) for row in mine}
        found[image] = (best(scores, count_of(pruner.keep[pruner.layers.index(view.layer - 1)], view, image)), [])
    return found


def clusters(rows: torch.Tensor, noise: list[float]) -> list[list[int]]:
    """Members of each cluster, the most central cluster first."""
    number, count = len(rows), len(rows) // 10 + 1
    distance = [[math.dist(a, b) / math.sqrt(len(a)) for b in rows.tolist()] for a in rows.tolist()]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in distance]
    density = [value + 1e-6 * more for value, more in zip(density, noise, strict=True)]
    peak = []
    for i in range(number):
        denser = [distance[i][j] for j in range(number) if density[j] > density[i]]
        peak.append(density[i] * (min(denser) if denser else max(map(max, distance))))
    centres = sorted(range(number), key=lambda i: -peak[i])[:count]
    groups: list[list[int]] = [[] for _ in centres]
    for i in range(number):
        at = centres.index(i) if i in centres else min(range(count), key=lambda c: distance[centres[c]][i])
        groups[at].append(i)
    return groups


RULES = {
    vzip.FastV: fastv,
    vzip.PyramidDrop: pyramiddrop,
    vzip.VScanStage2: pyramiddrop,
    vzip.DART: dart,
    vzip.SparseVLM: sparsevlm,
    vzip.SparseVLMByRank: sparsevlm,
    vzip.SparseVLMPlus: sparsevlm_plus,
}
# Each kind of count, of cut and of position; for models of at least four layers.
PRUNERS = [
    vzip.FastV(2, 5),
    vzip.FastV(1, 0.25),
    vzip.FastV(3, 0.5, pooled=True),
    vzip.PyramidDrop([1, 3], [9, 4]),
    vzip.PyramidDrop([1, 2, 3], [0.55, 0.3, 0.1]),
    vzip.VScanStage2(3, 5),
    vzip.DART(2, 6, num_image_pivots=2, num_text_pivots=1),
    vzip.SparseVLM([0, 2], [5, 3]),
    vzip.SparseVLMByRank([0, 1, 2], 1.5, 1.0),
    vzip.SparseVLMPlus([0, 2], [0.55, 0.25], num_heads=2),
]
REPACKED = (vzip.PyramidDrop, vzip.SparseVLM, vzip.SparseVLMByRank)


class PlainLoops:
    """A pruner over a copy of a wrapper's language model.

    Attributes:
        chosen: by layer and image the rows that go on, and the groups of rows that are merged; by name.
        num_tokens, after: tokens in all, and by layer the names of all rows behind its cut, of the last run.
        ids: of the prompt where positions have several axes, ``[3, T]``: every row keeps those of its token, a merged
            one those of the token before it.
        planes: ``[layers, T, d]``, what is added to the rows that are left behind each of the first layers.
    """

    def __init__(
        self, vlm: vzip.CompressedVlm, pruner: Pruner, ids: torch.Tensor | None = None, planes: Any = ()
    ) -> None:
        self.ids, self.planes, self.place_of = ids, planes, dict[Any, int]()
        model: Any = copy.deepcopy(vlm.model)
        model.set_attn_implementation("eager")
        self.pruner, self.text, self.head = pruner, model.model.language_model, model.lm_head
        self.chosen: dict[tuple[int, int], tuple[list[Any], list[list[Any]]]] = {}
        self.after: dict[int, list[Any]] = {}
        self.num_tokens = 0

    @torch.no_grad()
    def logits(self, embeds: torch.Tensor, embeds_owner: list[int], num_prompt: int) -> torch.Tensor:
        """Of the prompt's last token and what follows it; all of ``embeds`` ``[T, d]`` before is the prompt."""
        self.num_tokens = len(embeds)
        names: list[Any] = list(range(self.num_tokens))
        owner, hidden, before, keys = list(embeds_owner), embeds, torch.empty(0), torch.empty(0)
        places, repacked = list(names), False
        for number, layer in enumerate(self.text.layers):
            if number in self.pruner.cuts:
                own = self._attention(layer, hidden, places)[0]
                rest = (before, own, keys, self.text.norm(hidden), embeds, embeds_owner, num_prompt)
                turns = None if self.ids is None else torch.cat(self._rotary(hidden, places), dim=-1)[0]
                view = View(number, names, owner, names.index(num_prompt - 1), places, hidden, *rest, turns)
                images = [i for i in sorted({*owner} - {-1}) if (number, i) not in self.chosen]
                for image, (kept, groups) in RULES[type(self.pruner)](self.pruner, view, images).items():
                    named = [[names[row] for row in group] for group in groups]
                    self.chosen[number, image] = ([names[row] for row in kept], named)
                names, owner, hidden = self._take(number, names, owner, hidden)
                self.after[number] = names
                repacked |= isinstance(self.pruner, REPACKED)
                places = list(range(len(names))) if repacked and self.ids is None else self._kept_places(names)
            before, keys = self._attention(layer, hidden, places)
            embeddings = self._rotary(hidden, places)
            hidden = layer(hidden[None], attention_mask=self._causal(len(hidden)), position_embeddings=embeddings)[0]
            if number < len(self.planes):
                added = [self.planes[number][name] if name < num_prompt else 0 * hidden[0] for name in names]
                hidden = hidden + torch.stack(added)
        return torch.nn.functional.linear(self.text.norm(hidden), self.head.weight)[names.index(num_prompt - 1) :]

    def _take(self, layer: int, names: list[Any], owner: list[int], hidden: torch.Tensor) -> tuple[Any, ...]:
        found: list[tuple[Any, int, torch.Tensor]] = []
        for row, (name, image) in enumerate(zip(names, owner, strict=True)):
            kept, groups = ([name], []) if image == -1 else self.chosen[layer, image]
            if name in kept:
                found.append((name, image, hidden[row]))
            if image != -1 and image not in owner[row + 1 :]:
                for number, group in enumerate(groups):
                    mean = torch.stack([hidden[names.index(member)] for member in group]).mean(dim=0)
                    found.append(((layer, image, number), image, mean))
        return [one[0] for one in found], [one[1] for one in found], torch.stack([one[2] for one in found])

    def _kept_places(self, names: list[Any]) -> list[int]:
        """The column of each row's token, of a merged one that of the row before it when it was made."""
        places: list[int] = []
        for name in names:
            places.append(name if isinstance(name, int) else self.place_of.setdefault(name, places[-1]))
        return places

    def _rotary(self, hidden: torch.Tensor, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([places])
        if self.ids is not None:
            # What is told after the prompt stands behind its last token, on every axis.
            num_prompt = self.ids.shape[1]
            told = self.ids[:, -1:] + torch.arange(1, 1 + max(0, max(places) + 1 - num_prompt))
            ids = torch.cat([self.ids, told], dim=1)[:, None, places]
        return self.text.rotary_emb(hidden[None], ids)

    @staticmethod
    def _causal(size: int) -> torch.Tensor:
        return torch.full((size, size), torch.finfo(torch.float32).min).triu(1)[None, None]

    def _attention(self, layer: Any, hidden: torch.Tensor, places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(hidden, places)
        normed = layer.input_layernorm(hidden[None])
        weights = layer.self_attn(normed, position_embeddings=(cos, sin), attention_mask=self._causal(len(hidden)))[1][
            0
        ]
        keys = layer.self_attn.k_proj(normed)[0].unflatten(-1, (-1, cos.shape[-1]))  # [L, G, d]
        if hasattr(layer.self_attn, "k_norm"):
            keys = layer.self_attn.k_norm(keys)
        half = cos.shape[-1] // 2
        turned = torch.cat([-keys[..., half:], keys[..., :half]], dim=-1)
        return weights, (keys * cos[0][:, None] + turned * sin[0][:, None]).flatten(1)
