"""VisionZip: dominant tokens by attention, the rest merged into contextual tokens (arXiv 2412.04467, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vzip.errors import ConfigError, nearest
from vzip.ops.merge import MERGE_RULES, MergeRule, assign_to_targets, merge_rows
from vzip.ops.select import dominant_rows, gather_rows, random_indices, remaining_rows

from .base import (
    SCORES,
    CompressedTokens,
    Compressor,
    TokenBudget,
    VisionOutput,
    check_count,
    check_seed,
    no_merge_index,
)

TARGETS = ("uniform", "random")


@dataclass(frozen=True)
class VisionZip(Compressor):
    """Keeps ``num_dominant`` tokens, merges all others into ``num_contextual``.

    Dominant: CLS and the patches it attends to most; in a tower without CLS, the patches that receive most attention.
    Contextual: among the remaining rows in raster order, every step-th is a target and each other row joins the target
    of most similar key (cosine); see ``vzip.ops.merge``. The defaults are the published method; the other values are
    its ablations.

    Attributes:
        budget: tokens per crop.
        merge_rule: ``"sum"`` (target + mean of its rows; the published code) or ``"mean"`` (average of all of them).
        score: what patches are selected by, a field of ``VisionOutput``: ``"attention"``, ``"received_attention"`` or
            ``"key_norms"``; the highest are kept.
        score_layer: see ``Compressor.score_layer``.
        targets: ``"uniform"``, or ``"random"``: as many of the remaining rows drawn by ``seed``, the same for every
            crop.
        keep_cls: False: CLS is neither kept nor merged, and the whole budget goes to patches. No effect in a tower
            without CLS.
        seed: of random targets.

    Raises:
        ConfigError: a value that is not allowed; when called, a budget that does not fit the tower.
    """

    budget: TokenBudget
    merge_rule: MergeRule = "sum"
    score: str = "attention"
    score_layer: int | None = None
    targets: str = "uniform"
    keep_cls: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("merge_rule", self.merge_rule, MERGE_RULES)
        _check_choice("score", self.score, SCORES)
        _check_choice("targets", self.targets, TARGETS)
        if not isinstance(self.keep_cls, bool):
            raise ConfigError(f"compressor.keep_cls={self.keep_cls!r}: must be true or false.")
        if self.score_layer is not None and (
            isinstance(self.score_layer, bool) or not isinstance(self.score_layer, int)
        ):
            raise ConfigError(
                f"compressor.score_layer={self.score_layer!r}: must be a whole number, the index of a layer as in the"
                " tower's hidden states (-2: the second-last layer), or null for the select layer."
            )
        check_seed(self.seed)

    def __repr__(self) -> str:
        """Budget and merge rule, and what is not the published method."""
        usual = [f for f in fields(self) if f.name in ("budget", "merge_rule") or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in usual)})"

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({self.score, "keys"})

    def num_tokens(self, vision: VisionOutput) -> int:
        return self.budget.num_tokens

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        keeps_cls = has_cls and self.keep_cls
        if keeps_cls and self.budget.num_dominant == 0:
            raise ConfigError(
                "budget.num_dominant=0: this vision tower has a CLS token, which is always kept and counts as dominant,"
                " so at least 1. To merge everything use compressor=contextual_only, or compressor.keep_cls=false."
            )
        check_count(
            self.budget.num_tokens, num_patches + int(keeps_cls), ("budget.num_dominant", "budget.num_contextual")
        )

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        keeps_cls = vision.has_cls and self.keep_cls
        first = int(vision.has_cls and not self.keep_cls)  # rows before it take no part
        rows, num_contextual = vision.hidden[:, first:], self.budget.num_contextual
        kept = dominant_rows(vision.need_score(self.score), self.budget.num_dominant, keeps_cls)
        dominant = gather_rows(rows, kept)
        if num_contextual == 0:
            return CompressedTokens(dominant, kept + first, no_merge_index(vision))
        rest = remaining_rows(kept, rows.shape[1])
        positions = self._targets(rest)
        keys = gather_rows(vision.need_keys()[:, first:], rest)
        assignment = assign_to_targets(keys, num_contextual, positions)
        contextual = merge_rows(gather_rows(rows, rest), assignment, num_contextual, self.merge_rule, positions)
        merge_index = no_merge_index(vision).scatter(1, rest + first, assignment)
        return CompressedTokens(torch.cat([dominant, contextual], dim=1), kept + first, merge_index)

    def _targets(self, rest: Tensor) -> Tensor | None:
        """Where the targets are among the remaining rows ``[N, R]``; None: evenly spaced."""
        if self.targets == "uniform":
            return None
        return random_indices(self.budget.num_contextual, rest.shape[1], self.seed, rest.device)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"compressor.{name}={value!r}: must be one of {', '.join(allowed)}{nearest(str(value), allowed)}."
        )
