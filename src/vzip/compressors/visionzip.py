"""VisionZip: dominant tokens by attention, the rest merged into contextual tokens (arXiv 2412.04467, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch.nn import functional

from vzip.errors import ConfigError, nearest
from vzip.ops.attention import at_least_float32
from vzip.ops.merge import MERGE_RULES, MergeRule, targets_of
from vzip.ops.select import gather_rows, kept_and_rest, random_indices

from .base import Compressor, Selection, check_count, check_seed
from .budget import FractionBudget, TokenBudget, check_budget
from .vision import Signal, VisionOutput, VisionShape

SCORES = ("attention", "received_attention", "key_norms")
TARGETS = ("uniform", "random")


@dataclass(frozen=True)
class VisionZip(Compressor):
    """Keeps ``num_dominant`` tokens, merges all others into ``num_contextual``.

    Dominant: CLS and the patches it attends to most; in a tower without CLS, the patches that receive most attention.
    Contextual: among the remaining rows in raster order, every step-th is a target and each other row joins the target
    of most similar key (cosine); see ``vzip.ops.merge``. The defaults are the published method; the other values are
    its ablations.

    Attributes:
        budget: tokens per crop, as counts or as fractions kept.
        merge_rule: ``"sum"`` (target + mean of its rows; the published code) or ``"mean"`` (average of all of them).
        score: the signal that patches are selected by: ``"attention"``, ``"received_attention"`` or ``"key_norms"``;
            the highest are kept.
        score_layer: the layer that score and keys are read at, see ``Signal.layer``.
        targets: ``"uniform"``, or ``"random"``: as many of the remaining rows drawn by ``seed``, the same for every
            crop.
        keep_cls: False: CLS is neither kept nor merged, and the whole budget goes to patches. No effect in a tower
            without CLS.
        seed: of random targets.

    Raises:
        ConfigError: a value that is not allowed; when called, a budget that does not fit the tower.
    """

    uses_valid: ClassVar[bool] = True
    splits_budget: ClassVar[bool] = True

    budget: TokenBudget | FractionBudget
    merge_rule: MergeRule = "sum"
    score: str = "attention"
    score_layer: int | None = None
    targets: str = "uniform"
    keep_cls: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_budget(self.budget)
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

    def reads(self) -> frozenset[Signal]:
        return frozenset({self._score, self._keys})

    def num_tokens(self, shape: VisionShape) -> int:
        budget, keeps_cls = self.budget.of(shape), shape.has_cls and self.keep_cls
        if keeps_cls and budget.num_dominant == 0:
            raise ConfigError(
                "budget.num_dominant=0: this vision tower has a CLS token, which is always kept and counts as dominant,"
                " so at least 1. To merge everything use compressor=contextual_only, or compressor.keep_cls=false."
            )
        available = shape.num_patches + int(keeps_cls)
        check_count(budget.num_tokens, available, ("budget.num_dominant", "budget.num_contextual"))
        return budget.num_tokens

    def select(self, vision: VisionOutput) -> Selection:
        keeps_cls = vision.has_cls and self.keep_cls
        first = int(vision.has_cls and not self.keep_cls)  # rows before it take no part
        budget = self.budget.of(vision.shape)
        num_dominant, num_contextual = budget.num_dominant, budget.num_contextual
        score, valid = at_least_float32(vision.read_patches(self._score)), vision.valid_patches
        if valid is not None:
            score = score.masked_fill(~valid, -math.inf)
        if keeps_cls:  # it comes first, whatever patches score
            score = functional.pad(score, (1, 0), value=math.inf)
        rows = kept_and_rest(score, num_dominant)
        kept, rest = (rows + first if first else rows).split([num_dominant, rows.shape[1] - num_dominant], dim=1)
        if num_contextual == 0:
            return Selection(kept)
        metric = functional.normalize(at_least_float32(gather_rows(vision.read(self._keys), rest)), dim=-1)
        if self.targets == "uniform":
            targets, of_targets = targets_of(rest, num_contextual), targets_of(metric, num_contextual)
        else:
            positions = random_indices(num_contextual, rest.shape[1], self.seed, rest.device)
            targets, of_targets = rest.index_select(1, positions), metric.index_select(1, positions)
        # torch documents that argmax is the first of several: ties go to the lower target.
        slots = (metric @ of_targets.transpose(1, 2)).argmax(dim=-1) + num_dominant
        merge_index = torch.full(vision.hidden.shape[:2], -1, dtype=torch.int64, device=rest.device)
        merge_index = merge_index.scatter(1, rest, slots).scatter(1, targets, -1)
        return Selection(torch.cat([kept, targets], dim=1), merge_index, num_contextual)

    @property
    def _score(self) -> Signal:
        return Signal(self.score, self.score_layer)

    @property
    def _keys(self) -> Signal:
        return Signal("keys", self.score_layer)


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"compressor.{name}={value!r}: must be one of {', '.join(allowed)}{nearest(str(value), allowed)}."
        )
