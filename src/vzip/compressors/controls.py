"""Controls: what a method must beat, and its two halves alone. Compressors like any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vzip.ops.merge import assign_to_targets, merge_rows
from vzip.ops.select import dominant_rows, gather_rows, random_indices, uniform_indices

from .base import CompressedTokens, Compressor, TokenBudget, VisionOutput, check_count, check_seed, no_merge_index

_BUDGET_KEYS = ("budget.num_dominant", "budget.num_contextual")


def _keep_patches(vision: VisionOutput, patches: torch.Tensor) -> CompressedTokens:
    """Keeps the same ``patches [K]`` (0..P-1, ascending) of every crop and drops the rest."""
    rows = (patches + int(vision.has_cls)).expand(vision.hidden.shape[0], -1)
    return CompressedTokens(gather_rows(vision.hidden, rows), rows, no_merge_index(vision))


@dataclass(frozen=True)
class Identity(Compressor):
    """No compression: exactly the rows the unmodified model passes to its projector."""

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        """Fits every tower."""

    def num_tokens(self, vision: VisionOutput) -> int:
        return vision.num_rows - vision.first_stock_row

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        rows = torch.arange(vision.first_stock_row, vision.num_rows, device=vision.hidden.device)
        tokens = vision.hidden[:, vision.first_stock_row :]
        return CompressedTokens(tokens, rows.expand(tokens.shape[0], -1), no_merge_index(vision))


@dataclass(frozen=True)
class RandomTokens(Compressor):
    """``budget.num_tokens`` patches chosen at random (never CLS), the rest dropped.

    One subset per seed and number of patches, the same for every crop: a picture gets the same tokens alone, in any
    batch and on any device. Run several seeds to see the spread.
    """

    budget: TokenBudget
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)

    def num_tokens(self, vision: VisionOutput) -> int:
        return self.budget.num_tokens

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        check_count(self.budget.num_tokens, num_patches, _BUDGET_KEYS)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        device = vision.hidden.device
        return _keep_patches(vision, random_indices(self.budget.num_tokens, vision.num_patches, self.seed, device))


@dataclass(frozen=True)
class UniformTokens(Compressor):
    """``budget.num_tokens`` patches evenly spaced in raster order (never CLS), the rest dropped."""

    budget: TokenBudget

    def num_tokens(self, vision: VisionOutput) -> int:
        return self.budget.num_tokens

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        check_count(self.budget.num_tokens, num_patches, _BUDGET_KEYS)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        device = vision.hidden.device
        return _keep_patches(vision, uniform_indices(self.budget.num_tokens, vision.num_patches, device))


@dataclass(frozen=True)
class DominantOnly(Compressor):
    """VisionZip without the merge: ``budget.num_tokens`` dominant tokens (CLS among them), the rest dropped.

    The whole budget goes to dominant tokens, so that it compares with VisionZip at the same number of tokens.
    """

    budget: TokenBudget
    requires: ClassVar[frozenset[str]] = frozenset({"attention"})

    def num_tokens(self, vision: VisionOutput) -> int:
        return self.budget.num_tokens

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        check_count(self.budget.num_tokens, num_patches + int(has_cls), _BUDGET_KEYS)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        kept = dominant_rows(vision.need_attention(), self.budget.num_tokens, vision.has_cls)
        return CompressedTokens(gather_rows(vision.hidden, kept), kept, no_merge_index(vision))


@dataclass(frozen=True)
class ContextualOnly(Compressor):
    """VisionZip without the selection: all patches merged into ``budget.num_tokens`` contextual tokens (rule "sum").

    CLS is left out, as the unmodified model leaves it out: nothing is kept as it is, and CLS has no place in the grid.
    """

    budget: TokenBudget
    requires: ClassVar[frozenset[str]] = frozenset({"keys"})

    def num_tokens(self, vision: VisionOutput) -> int:
        return self.budget.num_tokens

    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        check_count(self.budget.num_tokens, num_patches, _BUDGET_KEYS)

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        first = int(vision.has_cls)
        assignment = assign_to_targets(vision.need_keys()[:, first:], self.budget.num_tokens)
        tokens = merge_rows(vision.hidden[:, first:], assignment, self.budget.num_tokens, "sum")
        merge_index = no_merge_index(vision)
        merge_index[:, first:] = assignment
        return CompressedTokens(tokens, assignment.new_empty(assignment.shape[0], 0), merge_index)
