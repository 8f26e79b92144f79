"""VisionZip: dominant tokens by attention, the rest merged into contextual tokens (arXiv 2412.04467, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vzip.errors import ConfigError, nearest
from vzip.ops.merge import MERGE_RULES, MergeRule, assign_to_targets, merge_rows
from vzip.ops.select import dominant_rows, gather_rows, remaining_rows

from .base import CompressedTokens, Compressor, TokenBudget, VisionOutput, check_count, no_merge_index


@dataclass(frozen=True)
class VisionZip(Compressor):
    """Keeps ``num_dominant`` tokens, merges all others into ``num_contextual``.

    Dominant: CLS and the patches it attends to most; in a tower without CLS, the patches that receive most attention.
    Contextual: among the remaining rows in raster order, every step-th is a target and each other row joins the target
    of most similar key (cosine); see ``vzip.ops.merge``.

    Attributes:
        budget: tokens per crop.
        merge_rule: ``"sum"`` (target + mean of its rows; the published code) or ``"mean"`` (average of all of them).

    Raises:
        ConfigError: unknown merge rule; when called, a budget that does not fit the tower.
    """

    budget: TokenBudget
    merge_rule: MergeRule = "sum"
    requires: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})

    def __post_init__(self) -> None:
        if self.merge_rule not in MERGE_RULES:
            raise ConfigError(
                f"compressor.merge_rule={self.merge_rule!r}: must be one of {', '.join(MERGE_RULES)}"
                f"{nearest(str(self.merge_rule), MERGE_RULES)}."
            )

    def num_tokens(self, vision: VisionOutput) -> int:
        return self.budget.num_tokens

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        if has_cls and self.budget.num_dominant == 0:
            raise ConfigError(
                "budget.num_dominant=0: this vision tower has a CLS token, which is always kept and counts as dominant,"
                " so at least 1. To merge everything use compressor=contextual_only."
            )
        check_count(
            self.budget.num_tokens, num_patches + int(has_cls), ("budget.num_dominant", "budget.num_contextual")
        )

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        hidden = vision.hidden
        kept = dominant_rows(vision.need_attention(), self.budget.num_dominant, vision.has_cls)
        dominant = gather_rows(hidden, kept)
        if self.budget.num_contextual == 0:
            return CompressedTokens(dominant, kept, no_merge_index(vision))
        rest = remaining_rows(kept, vision.num_rows)
        assignment = assign_to_targets(gather_rows(vision.need_keys(), rest), self.budget.num_contextual)
        contextual = merge_rows(gather_rows(hidden, rest), assignment, self.budget.num_contextual, self.merge_rule)
        merge_index = no_merge_index(vision).scatter(1, rest, assignment)
        return CompressedTokens(torch.cat([dominant, contextual], dim=1), kept, merge_index)
