"""SparseVLM: visual tokens rated by the words of the prompt that look at the image; what is dropped is merged."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vzip.errors import ConfigError
from vzip.keys import SEED, check_value, number, raise_all, whole_number
from vzip.ops.attention import at_least_float32
from vzip.ops.select import top_indices

from .base import Cut, PromptState, Pruner
from .stages import as_tuple, by_layer, check_budget, check_keep, check_layers, num_entered, num_kept

TEXT = -1
PUBLISHED_FOR = 576  # visual tokens of an image


class RatedByText(Pruner):
    """What all versions share: which words rate an image.

    Raters are the text tokens after the image to which its visual tokens, as they enter layer 0, are more similar than
    on average: mean over visual tokens of the softmax over text of the dot products. Where none is above the average,
    as when there is one word alone, all are (published code divides by zero).

    A budget is one of the published ones, each with the arguments published for it, of 576 visual tokens.

    Attributes:
        published: by budget, what the arguments of ``set_by_budget`` are.
    """

    layers: Sequence[int]
    published: ClassVar[Mapping[int, Any]]

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.layers)

    def check(self) -> list[str]:
        """Makes ``layers`` a tuple; what is wrong with them."""
        object.__setattr__(self, "layers", as_tuple(self.layers))
        problems = check_layers(tuple(self.layers), 0) + check_budget(self.budget)
        if self.budget is None or problems:
            return problems
        keys = ", ".join(f"pruner.{key}" for key in self.set_by_budget)
        if self.budget not in self.published:
            known = ", ".join(f"{budget}tok" for budget in self.published)
            problems.append(
                f"budget={self.budget}tok with compressor=none: {type(self).__name__} has published settings for"
                f" {known} alone. Set one of these, or budget=full and {keys}."
            )
        usual = tuple(type(self).layers)
        if self.layers != usual:
            problems.append(
                f"pruner.layers={list(self.layers)}: budgets are published for {list(usual)}. Set budget=full and"
                f" {keys}."
            )
        return problems

    def of_budget(self, num_visual: int) -> Any:
        """What is published for the budget; ConfigError for an image of another number of visual tokens."""
        assert self.budget is not None
        if num_visual != PUBLISHED_FOR:
            keys = ", ".join(f"pruner.{key}" for key in self.set_by_budget)
            raise ConfigError(
                f"budget={self.budget}tok with compressor=none: {type(self).__name__}'s settings are published for"
                f" images of {PUBLISHED_FOR} visual tokens, this model's have {num_visual}. Set budget=full and {keys}."
            )
        return self.published[self.budget]

    def keeps_all(self, num_visual: int) -> bool:
        """Whether an image has no more visual tokens than the budget."""
        return self.budget is not None and num_visual <= self.budget

    def raters(self, state: PromptState, image: Tensor) -> Tensor:
        """Positions of the words that rate an image."""
        own = state.embeds_visual_index == state.visual_index[image[0]]
        is_after = own.flip(0).cumsum(dim=0).flip(0) == 0
        text = at_least_float32(state.embeds[is_after & (state.embeds_visual_index == TEXT)])
        relevance = (at_least_float32(state.embeds[own]) @ text.T).softmax(dim=1).mean(dim=0)
        is_rater = relevance > relevance.mean()
        return state.text[-len(text) :][is_rater | ~is_rater.any()]


class Recycling(RatedByText):
    """Versions that merge the best of what they drop: density peaks, the clusters' plain means go on.

    The best 30 % of what is dropped, and one more, are clustered, ten to a cluster. The means follow the image's kept
    tokens; position ids are then numbered anew.
    """

    makes_rows = True
    seed: int

    def check(self) -> list[str]:
        return super().check() + check_value("pruner.seed", self.seed, SEED)

    @abstractmethod
    def num_kept_of(self, state: PromptState, image: Tensor, attention: Tensor) -> int:
        """Visual tokens of an image that go on as they are; ``attention`` is ``[raters, visual tokens]``."""

    def cut(self, state: PromptState) -> Cut:
        kept, rows = [], []
        for image in state.images:
            rows_of_raters = state.attention_rows(state.layer - 1, self.raters(state, image))
            attention = rows_of_raters.mean(dim=0)[:, image]
            scores = attention.mean(dim=0)
            chosen = top_indices(scores[None], self.num_kept_of(state, image, attention))[0]
            is_dropped = torch.ones_like(image, dtype=torch.bool).index_fill(0, chosen, False)
            num_best = num_recycled(len(image) - len(chosen))
            order = scores.masked_fill(~is_dropped, -torch.inf).sort(descending=True, stable=True).indices
            best = at_least_float32(state.hidden[image[order[:num_best]]])
            kept.append(image[chosen])
            rows.append(cluster_means(best, num_clusters(num_best), self.noise(num_best).to(best)))
        old = torch.cat([state.text, *kept])
        ends = torch.cat([image[-1:].expand(len(new)) for image, new in zip(state.images, rows, strict=True)])
        if not len(ends):
            return Cut(old.sort().values)
        names = torch.cat([old, -1 - torch.arange(len(ends), device=old.device)])
        order = torch.cat([2 * old, 2 * ends + 1]).sort(stable=True).indices
        return Cut(names[order], torch.cat(rows), state.visual_index[ends], "repacked")

    def noise(self, num_tokens: int) -> Tensor:
        """Uniform numbers that set equal densities apart: on the CPU, so that devices agree; the same for any image."""
        return torch.rand(num_tokens, generator=torch.Generator().manual_seed(self.seed))


@dataclass(frozen=True, repr=False)
class SparseVLM(Recycling):
    """SparseVLM v1.5 (arXiv 2410.04417): drops in steps what the text's raters attend to least, and merges its best.

    The rule is that of the authors' code (``Gumpest/SparseVLMs``, main): some layers run in full, then those visual
    tokens of largest attention, averaged over heads and raters, go on. At least one is dropped at each step, whatever
    ``keep`` says. Published for 192, 128, 96 and 64 of 576: [300, 200, 110], [303, 110, 36], [238, 48, 26] and
    [66, 30, 17]. These count a layer as pruned that still sees everything: what 32 layers attend to on average, and
    the schedule says, is 206.5, 145.4, 114.1 and 82.3.

    Deviations: everything is computed in float32, so that the clusters' noise does not vanish in half precision; it
    is drawn from ``seed``. Images are pruned one by one, each by the text after it; batches are served.

    Attributes:
        layers: those after which tokens are dropped (0: the first).
        keep: for each of them the visual tokens of an image that go on as they are: whole numbers, or fractions of
            those that entered layer 0; merged ones come on top.
        seed: of the noise that sets equal densities apart.
        budget: one of the four above: ``keep`` is then what is published for it.

    Raises:
        ConfigError: a value that cannot be.
    """

    layers: Sequence[int] = (2, 6, 15)
    keep: Sequence[int | float] = (66, 30, 17)
    seed: int = 0
    budget: int | None = None
    set_by_budget = ("keep",)
    published = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}  # noqa: RUF012

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", as_tuple(self.keep))
        own = [] if self.budget is not None else check_keep(tuple(self.keep), as_tuple(self.layers))
        raise_all(self.check() + own)

    def schedule(self, num_visual: int, num_layers: int) -> list[int]:
        if self.keeps_all(num_visual):
            return [num_visual] * num_layers
        counts = [num_visual]
        for keep in self.keep if self.budget is None else self.of_budget(num_visual):
            num_chosen = min(num_kept(keep, num_visual), counts[-1] - 1)
            counts.append(num_chosen + num_clusters(num_recycled(counts[-1] - num_chosen)))
        return by_layer(self.cuts, counts[1:], num_visual, num_layers)

    def num_kept_of(self, state: PromptState, image: Tensor, attention: Tensor) -> int:
        entered = num_entered(state, image)
        if self.keeps_all(entered):
            return len(image)
        keep = (self.keep if self.budget is None else self.of_budget(entered))[self.cuts.index(state.layer)]
        return min(num_kept(keep, entered), len(image) - 1)


@dataclass(frozen=True, repr=False)
class SparseVLMByRank(Recycling):
    """SparseVLM v1.0 (arXiv 2410.04417): as v1.5, but the attention's rank says how many go on.

    The rule is that of the authors' code of 2024-10 (``Gumpest/SparseVLMs`` b72c5d6), probably the one behind
    VisionZip's tables: of an image ``int(rank * scale + bias)`` visual tokens go on, at most all but one; rank is that
    of the raters' attention, averaged over heads. Where it is the number of visual tokens, nothing is dropped. How many
    go on depends on the data, so there is no schedule. Published for 192, 128 and 64 of 576: scale and bias 13.5 and
    0, 9 and 6, 0.8 and 0.

    Deviations: as of ``SparseVLM``.

    Attributes:
        layers: those after which tokens are dropped.
        scale: visual tokens that go on as they are for each rank.
        bias: and so many more.
        seed: of the noise that sets equal densities apart.
        budget: one of the three above: ``scale`` and ``bias`` are then what is published for it.

    Raises:
        ConfigError: a value that cannot be.
    """

    layers: Sequence[int] = (2, 6, 15, 19)
    scale: float = 0.8
    bias: float = 0.0
    seed: int = 0
    budget: int | None = None
    set_by_budget = ("scale", "bias")
    published = {192: (13.5, 0.0), 128: (9.0, 6.0), 64: (0.8, 0.0)}  # noqa: RUF012

    def __post_init__(self) -> None:
        problems = self.check()
        rule = number(0)
        problems += [
            f"pruner.{name}={value!r}: must be {rule.text}."
            for name, value in (("scale", self.scale), ("bias", self.bias))
            if not rule.allows(value)
        ]
        raise_all(problems)

    def schedule(self, num_visual: int, num_layers: int) -> None:
        if self.budget is not None and not self.keeps_all(num_visual):
            self.of_budget(num_visual)  # that there is one

    def num_kept_of(self, state: PromptState, image: Tensor, attention: Tensor) -> int:
        entered = num_entered(state, image)
        if self.keeps_all(entered):
            return len(image)
        scale, bias = (self.scale, self.bias) if self.budget is None else self.of_budget(entered)
        rank = int(torch.linalg.matrix_rank(attention))
        return len(image) if rank == len(image) else min(int(rank * scale + bias), len(image) - 1)


@dataclass(frozen=True, repr=False)
class SparseVLMPlus(RatedByText):
    """SparseVLM v2.0, SparseVLM+ (arXiv 2410.04417): as v1.5 without merging, and with the attention corrected.

    The rule is that of the authors' code (``Gumpest/SparseVLMs``, main, version 2_0): attention is divided by what
    the rotary embedding alone would give, ``cos(position difference * frequency)`` summed over frequencies, times
    2 / sqrt(head width); then averaged over those heads whose raters attend to visual tokens most, and over raters.
    Nothing is merged, and position ids are kept. Published for 192, 128, 96 and 64 of 576: [300, 200, 118],
    [238, 108, 60], [246, 54, 28] and [66, 34, 20], as of ``SparseVLM``; on average 206.8, 144.1, 113.9 and 81.8.

    Deviations: an image that has no more than ``keep`` keeps all, where at least one is dropped there. Images are
    pruned one by one, each by the text after it; batches are served. No outputs of the authors' code are at hand.

    Attributes:
        layers: those after which tokens are dropped (0: the first).
        keep: for each of them the visual tokens of an image that go on: whole numbers, or fractions of those that
            entered layer 0.
        num_heads: heads that are averaged over, all where there are no more.
        budget: one of the four above: ``keep`` is then what is published for it.

    Raises:
        ConfigError: a value that cannot be.
    """

    layers: Sequence[int] = (2, 6, 15)
    keep: Sequence[int | float] = (66, 34, 20)
    num_heads: int = 14
    budget: int | None = None
    set_by_budget = ("keep",)
    published = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}  # noqa: RUF012

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", as_tuple(self.keep))
        problems = self.check()
        problems += [] if self.budget is not None else check_keep(tuple(self.keep), as_tuple(self.layers))
        raise_all(problems + check_value("pruner.num_heads", self.num_heads, whole_number(1)))

    def counts(self, num_visual: int) -> list[int]:
        """Visual tokens that go on after each cut of ``num_visual``."""
        if self.keeps_all(num_visual):
            return [num_visual] * len(self.cuts)
        keeps = self.keep if self.budget is None else self.of_budget(num_visual)
        return [num_kept(keep, num_visual) for keep in keeps]

    def schedule(self, num_visual: int, num_layers: int) -> list[int]:
        return by_layer(self.cuts, self.counts(num_visual), num_visual, num_layers)

    def cut(self, state: PromptState) -> Cut:
        kept = [image[self._chosen(state, image)] for image in state.images]
        return Cut(torch.cat([state.text, *kept]).sort().values)

    def _chosen(self, state: PromptState, image: Tensor) -> Tensor:
        """Which visual tokens of an image go on, as positions in ``image``."""
        cos, sin = map(at_least_float32, state.position_embeddings(state.layer - 1))
        raters = self.raters(state, image)
        by_place = (cos[raters] @ cos[image].T + sin[raters] @ sin[image].T) / cos.shape[-1] ** 0.5
        attention = state.attention_rows(state.layer - 1, raters)[..., image] / by_place  # [H, raters, visual tokens]
        heads = top_indices(attention.sum(dim=(1, 2))[None], min(self.num_heads, len(attention)))[0]
        count = self.counts(num_entered(state, image))[self.cuts.index(state.layer)]
        return top_indices(attention[heads].mean(dim=(0, 1))[None], count)[0]


def num_recycled(num_dropped: int) -> int:
    """Of the dropped tokens of an image so many are merged."""
    return int(0.3 * num_dropped) + 1 if num_dropped else 0


def num_clusters(num_merged: int) -> int:
    """Into so many."""
    return num_merged // 10 + 1 if num_merged else 0


def cluster_means(rows: Tensor, num_clusters: int, noise: Tensor) -> Tensor:
    """Means of clusters around density peaks, by the k nearest neighbours with k the number of clusters.

    Args:
        rows: float32 ``[m, d]``.
        num_clusters: c <= m.
        noise: ``[m]``, from 0 to 1: sets equal densities apart.

    Returns:
        ``[c, d]``, the most central cluster first.
    """
    if num_clusters == 0:
        return rows
    distance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / rows.shape[1] ** 0.5
    nearest = distance.sort(dim=1).values[:, :num_clusters]
    density = (-nearest.square().mean(dim=1)).exp() + noise * 1e-6
    to_denser = distance.masked_fill(density[None] <= density[:, None], torch.inf).amin(dim=1)
    apart = torch.where(to_denser.isinf(), distance.max(), to_denser)
    centres = (density * apart).sort(descending=True, stable=True).indices[:num_clusters]
    group = distance[centres].argmin(dim=0)
    group[centres] = torch.arange(num_clusters, device=rows.device)
    members = torch.nn.functional.one_hot(group, num_clusters).to(rows)  # [m, c]
    return members.T @ rows / members.sum(dim=0)[:, None]
