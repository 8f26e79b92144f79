"""DART: what repeats a few pivots is dropped, without any attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vzip.keys import raise_all, whole_number
from vzip.ops.attention import at_least_float32
from vzip.ops.select import top_indices

from .base import Cut, PromptState, Pruner
from .stages import by_layer, check_budget, nearest_count


@dataclass(frozen=True, repr=False)
class DART(Pruner):
    """Keeps at the input of layer K some pivots of an image and what is least like any pivot (arXiv 2502.11494).

    The rule is that of the authors' code (``ZichenWen1/DART``). Pivots are the tokens of largest L1 norm of the keys of
    layer K - 1 after the rotary embedding, some of the image and some of the text after it. Each pivot in turn claims
    ``num_claimed // pivots`` visual tokens, of those left the ones of least cosine to it, in hidden states after the
    model's last norm. Image pivots and claims go on: 4 + 128 = 132 by default. Position ids are kept.

    Deviations: pivots claim in the order of their norms, the largest first, where the published order is that of a
    Python set (of 576 tokens 91 % or more of the choice is shared). Images are pruned one by one. Where less text
    follows an image than there should be text pivots, those that there are share the claims, the first ones more.

    Attributes:
        K: layers that see everything: 0 to K - 1.
        num_claimed: visual tokens of an image that pivots claim, in equal parts, rounded down; pivots come on top. An
            image that has no more than both keeps all.
        num_image_pivots: pivots among an image's visual tokens.
        num_text_pivots: pivots among the text after it; they claim, and text is kept anyway.
        budget: visual tokens of an image that layers attend to on average: ``num_claimed`` is then the number that
            comes nearest, in equal parts rounded down.

    Raises:
        ConfigError: a value that cannot be.
    """

    K: int = 2
    num_claimed: int = 128
    num_image_pivots: int = 4
    num_text_pivots: int = 4
    budget: int | None = None
    set_by_budget = ("num_claimed",)

    def __post_init__(self) -> None:
        rules = {name: whole_number(int(name == "K")) for name in vars(self) if name != "budget"}
        problems = [
            f"pruner.{name}={vars(self)[name]!r}: must be {rule.text}."
            for name, rule in rules.items()
            if not rule.allows(vars(self)[name])
        ]
        if not problems and not 1 <= self.num_image_pivots + self.num_text_pivots <= self.num_claimed:
            problems.append(
                f"pruner.num_claimed={self.num_claimed}: must be at least one for each of the pivots, of which there"
                f" must be one: pruner.num_image_pivots={self.num_image_pivots} +"
                f" pruner.num_text_pivots={self.num_text_pivots}."
            )
        raise_all(problems + check_budget(self.budget))

    @property
    def cuts(self) -> tuple[int, ...]:
        return (self.K,)

    def num_claims(self, num_visual: int, num_layers: int) -> int:
        """Visual tokens of an image of ``num_visual`` that all pivots claim together."""
        num_pivots, num_claimed = self.num_image_pivots + self.num_text_pivots, self.num_claimed
        if self.budget is not None:
            least = self.num_image_pivots + num_pivots
            num_claimed = nearest_count(self.budget, num_visual, self.K, num_layers, least) - self.num_image_pivots
        return num_claimed // num_pivots * num_pivots

    def num_kept(self, num_visual: int, num_layers: int) -> int:
        """Visual tokens that go on of ``num_visual``."""
        if self.budget is not None and num_visual <= self.budget:
            return num_visual
        return min(num_visual, self.num_image_pivots + self.num_claims(num_visual, num_layers))

    def schedule(self, num_visual: int, num_layers: int) -> list[int]:
        return by_layer(self.cuts, [self.num_kept(num_visual, num_layers)], num_visual, num_layers)

    def cut(self, state: PromptState) -> Cut:
        norms = at_least_float32(state.keys(self.K - 1)).abs().sum(dim=(0, 2))  # [L]
        normed = normalize(at_least_float32(state.decoder.norm(state.hidden).to(state.hidden.device)), dim=-1)
        kept = [self._keep(state, norms, normed, image) for image in state.images]
        return Cut(torch.cat([state.text, *kept]).sort().values)

    def _keep(self, state: PromptState, norms: Tensor, normed: Tensor, image: Tensor) -> Tensor:
        """Which of an image's positions go on."""
        num_layers = len(state.decoder.layers)
        if self.num_kept(len(image), num_layers) == len(image):
            return image
        text = state.text[state.text > image[-1]]
        own = image[top_indices(norms[None, image], self.num_image_pivots)[0]]
        others = text[top_indices(norms[None, text], min(self.num_text_pivots, len(text)))[0]]
        pivots = self.in_turn(torch.cat([own, others]), norms)
        share, rest = divmod(self.num_claims(len(image), num_layers), len(pivots))
        is_taken = torch.isin(image, own)
        for turn, pivot in enumerate(pivots.unbind()):
            likeness = (normed[image] @ normed[pivot]).masked_fill(is_taken, torch.inf)
            claimed = likeness.sort(stable=True).indices[: share + (turn < rest)]
            is_taken = is_taken.index_fill(0, claimed, True)
        return image[is_taken]

    def in_turn(self, pivots: Tensor, norms: Tensor) -> Tensor:
        """The pivots in the order in which they claim."""
        return pivots[norms[pivots].sort(descending=True, stable=True).indices]
