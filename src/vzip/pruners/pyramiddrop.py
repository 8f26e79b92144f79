"""PyramidDrop, and VScan's second stage, which is the same rule at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vzip.keys import raise_all
from vzip.ops.select import top_indices

from .base import Cut, PromptState, Pruner
from .stages import as_tuple, by_layer, check_budget, check_keep, check_layers, num_entered, num_kept, shrinking_counts


@dataclass(frozen=True, repr=False)
class PyramidDrop(Pruner):
    """Drops in steps what the last token attends to least in the very layer whose input is cut (arXiv 2410.17247).

    The rule is that of the authors' code (``Cooperx521/PyramidDrop``): the layer's own attention, mean over heads, row
    of the last token alone; fractions are of the tokens that entered layer 0, rounded down; what goes on gets
    position ids without gaps.

    Deviations: there a dialogue's later turns, batches, a second image and eager attention fail or are passed over;
    here each image is pruned, in the turn in which it came. Fractions are multiplied exactly, where floating point
    can be one off.

    On average over the layers, [8, 16, 24] of 32 cannot go below a quarter of the tokens. For smaller budgets the
    authors name [2, 8, 16] with x, x*x and x*x*x: x = 0.5605, 0.421 and 0.1927 are 191.9, 127.9 and 63.9 of 576.

    Attributes:
        layers: those at whose input tokens are dropped.
        keep: for each of them the visual tokens of an image that go on: whole numbers, or fractions of those that
            entered layer 0. An image that has no more than these keeps all.
        budget: visual tokens of an image that layers attend to on average: ``keep`` is then x, x*x, x*x*x ... with the
            x of four decimals that comes nearest, and one token at least.

    Raises:
        ConfigError: a value that cannot be.
    """

    layers: Sequence[int] = (8, 16, 24)
    keep: Sequence[int | float] = (0.5, 0.25, 0.125)
    budget: int | None = None
    set_by_budget = ("keep",)

    def __post_init__(self) -> None:
        layers, keep = as_tuple(self.layers), as_tuple(self.keep)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "keep", keep)
        own = [] if self.budget is not None else check_keep(keep, layers)
        raise_all(check_layers(layers, 1) + own + check_budget(self.budget))

    @property
    def cuts(self) -> tuple[int, ...]:
        return tuple(self.layers)

    def counts(self, num_visual: int, num_layers: int) -> list[int]:
        """Visual tokens that go on after each cut of ``num_visual``."""
        if self.budget is not None:
            return shrinking_counts(self.budget, num_visual, self.cuts, num_layers)
        return [num_kept(keep, num_visual) for keep in self.keep]

    def schedule(self, num_visual: int, num_layers: int) -> list[int]:
        return by_layer(self.cuts, self.counts(num_visual, num_layers), num_visual, num_layers)

    def cut(self, state: PromptState) -> Cut:
        scores = state.attention_rows(state.layer, [-1]).mean(dim=0)  # [1, L]
        step, num_layers = self.cuts.index(state.layer), len(state.decoder.layers)
        counts = [self.counts(num_entered(state, image), num_layers)[step] for image in state.images]
        kept = [
            image[top_indices(scores[:, image], count)[0]] for image, count in zip(state.images, counts, strict=True)
        ]
        index = torch.cat([state.text, *kept]).sort().values
        return Cut(index, positions="original" if len(index) == len(state.hidden) else "repacked")


@dataclass(frozen=True, repr=False)
class VScanStage2(PyramidDrop):
    """VScan's second stage (arXiv 2505.22654, ``Tencent/SelfEvolvingAgent``): PyramidDrop's rule at layer 16 alone.

    Its first stage is the compressor ``vzip.VScan``; for 64 tokens on average 96 enter and 32 go on, for 128 and 192
    it is 192 and 64, 288 and 96. On LLaVA-NeXT the published code takes the wrong rows for image and text, on
    Qwen2.5-VL it scores without the rotary embedding: neither is done here.

    Attributes:
        layers: as of ``PyramidDrop``.
        keep: as of ``PyramidDrop``; the published one is a whole number.
    """

    layers: Sequence[int] = (16,)
    keep: Sequence[int | float] = (32,)
