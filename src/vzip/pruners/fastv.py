"""FastV: one cut by the attention of the prompt's last token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vzip.errors import ConfigError
from vzip.keys import raise_all
from vzip.ops.select import top_indices

from .base import Cut, PromptState, Pruner
from .stages import check_budget, nearest_count


@dataclass(frozen=True, repr=False)
class FastV(Pruner):
    """Drops at the input of layer K what the last token attended to least in layer K - 1 (arXiv 2403.06764).

    The rule is the one of the authors' Hugging Face port (``pkunlp-icler/FastV``): mean over heads, row of the last
    token alone, original position ids, decoding continues from the full length.

    Attributes:
        K: layers that see everything: 0 to K - 1.
        keep: visual tokens of an image that go on: a whole number of them, or a fraction (``R`` of the paper is
            ``1 - keep``). An image that has no more than these keeps all.
        pooled: choose among all images of a prompt together, which can leave an image without any.
        budget: visual tokens of an image that layers attend to on average: ``keep`` is then the number that comes
            nearest.

    Raises:
        ConfigError: a value that cannot be.
    """

    K: int = 2
    keep: int | float = 0.5
    pooled: bool = False
    budget: int | None = None
    set_by_budget = ("keep",)

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.K, bool) or not isinstance(self.K, int) or self.K < 1:
            problems.append(f"pruner.K={self.K!r}: must be a whole number, 1 or more: the layers that see every token")
        counted = isinstance(self.keep, int) and not isinstance(self.keep, bool) and self.keep >= 1
        if not counted and not (isinstance(self.keep, float) and 0 < self.keep <= 1):
            problems.append(
                f"pruner.keep={self.keep!r}: must be a whole number of visual tokens an image, 1 or more, or the"
                " fraction of them that is kept, above 0 and at most 1.0 (with a decimal point)"
            )
        if not isinstance(self.pooled, bool):
            problems.append(f"pruner.pooled={self.pooled!r}: must be true or false")
        elif self.pooled and self.budget is not None:
            problems.append("pruner.pooled=true: a budget is of each image; set budget=full and pruner.keep")
        if problems:
            raise ConfigError("\n".join(f"{problem}." for problem in problems))
        raise_all(check_budget(self.budget))

    @property
    def cuts(self) -> tuple[int, ...]:
        return (self.K,)

    def num_kept(self, num_visual: int, num_layers: int) -> int:
        """Visual tokens that go on of ``num_visual``."""
        if self.budget is not None:
            return nearest_count(self.budget, num_visual, self.K, num_layers)
        return round(num_visual * self.keep) if isinstance(self.keep, float) else min(self.keep, num_visual)

    def schedule(self, num_visual: int, num_layers: int) -> list[int]:
        return [num_visual] * self.K + [self.num_kept(num_visual, num_layers)] * (num_layers - self.K)

    def cut(self, state: PromptState) -> Cut:
        scores = state.attention_rows(self.K - 1, [-1]).mean(dim=0)  # [1, L]
        groups = [torch.cat(state.images)] if self.pooled else state.images
        num_layers = len(state.decoder.layers)
        kept = [group[top_indices(scores[:, group], self.num_kept(len(group), num_layers))[0]] for group in groups]
        return Cut(torch.cat([state.text, *kept]).sort().values)
