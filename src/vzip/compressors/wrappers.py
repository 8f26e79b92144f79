"""Methods around another method: what it drops merged into what it keeps; what it ranks seen without outliers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from vzip.errors import ConfigError, nearest
from vzip.keys import number
from vzip.ops.attention import at_least_float32
from vzip.ops.merge import MERGE_RULES, MergeRule
from vzip.ops.select import gather_rows

from .base import Compressor, Selection, check_is_compressor
from .budget import FractionBudget, TokenBudget
from .plan import TowerPlan
from .vision import SCORES, Signal, VisionOutput, VisionShape

_HANDED_ON = (
    *("scope", "space", "uses_valid", "splits_budget", "drops_rest"),
    *("tower_use", "uses_grid", "cannot_capture", "text_encoder"),
)


@dataclass(frozen=True)
class Wrapper(Compressor):
    """A method that hands on to another one; as many tokens, of the same crops or images.

    Attributes:
        of: the other method.

    Raises:
        ConfigError: ``of`` is none.
    """

    of: Compressor

    def __post_init__(self) -> None:
        check_is_compressor(self.of, "of")
        for name in _HANDED_ON:
            object.__setattr__(self, name, getattr(self.of, name))

    @property
    def budget(self) -> TokenBudget | FractionBudget | None:
        """The other method's, where it has one."""
        return getattr(self.of, "budget", None)

    @property
    def is_tested(self) -> bool:
        return super().is_tested and self.of.is_tested

    def reads(self) -> frozenset[Signal]:
        return self.of.reads()

    def text(self, question: str) -> str:
        return self.of.text(question)

    def view(self, pixel_values: Tensor) -> Tensor:
        return self.of.view(pixel_values)

    def plan(self, shape: VisionShape) -> TowerPlan | None:
        return self.of.plan(shape)

    def num_tokens(self, shape: VisionShape) -> int:
        return self.of.num_tokens(shape)


@dataclass(frozen=True)
class MergeDropped(Wrapper):
    """A method that drops units, and here has them merged into those it keeps.

    Each dropped patch joins the kept patch of most similar key (cosine of the keys' mean over heads, ties to the
    earlier one), as VisionZip's rows join their targets. CLS neither joins nor is joined, nor do units that are not
    ``valid`` (newlines, padding) join: they stay dropped.

    Attributes:
        of: a method that drops what it does not keep, as ``DivPrune`` or ``FasterVLM``.
        merge_rule: as of ``VisionZip``.

    Raises:
        ConfigError: a method that merges by itself or keeps everything; an unknown rule.
    """

    merge_rule: MergeRule = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge_rule not in MERGE_RULES:
            raise ConfigError(
                f"compressor.merge_rule={self.merge_rule!r}: must be one of {', '.join(MERGE_RULES)}"
                f"{nearest(str(self.merge_rule), MERGE_RULES)}."
            )
        if self.tower_use != "whole":
            raise ConfigError(
                f"compressor.of={self.of}: what it drops never reaches the end of the vision tower, so there is nothing"
                " left to merge. Use a method that drops afterwards, as fastervlm, divprune, scope or random."
            )
        if not self.of.drops_rest:
            raise ConfigError(
                f"compressor.of={self.of}: merges what it does not keep by itself, or keeps everything, so nothing is"
                " dropped that could be merged. Use a method that drops, as fastervlm, divprune, scope or random."
            )
        object.__setattr__(self, "drops_rest", False)

    def reads(self) -> frozenset[Signal]:
        return self.of.reads() | {Signal("keys")}

    def select(self, vision: VisionOutput) -> Selection:
        chosen = self.of.select(vision)
        if chosen.merge_index is not None or chosen.weights is not None:
            raise ValueError(f"{self.of}: merges units, although it says that it drops them (drops_rest).")
        places = chosen.place_index
        metric = functional.normalize(at_least_float32(vision.read(Signal("keys"))), dim=-1)
        similarity = metric @ gather_rows(metric, places).transpose(1, 2)  # [N, U, K]
        stays = torch.zeros(similarity.shape[:2], dtype=torch.bool, device=places.device).scatter(1, places, True)
        if vision.valid is not None:
            stays = stays | ~vision.valid
        if vision.has_cls:
            similarity = similarity.masked_fill((places == 0)[:, None], -torch.inf)
            stays = stays | (torch.arange(vision.num_rows, device=places.device) == 0)
        best = similarity.max(dim=-1)
        # Where CLS alone is kept, there is nothing to join.
        return Selection(places, best.indices.masked_fill(stays | best.values.isneginf(), -1))


@dataclass(frozen=True)
class WithoutOutliers(Wrapper):
    """A method that ranks by attention, with the patches set aside whose rows are far longer than others.

    Vision transformers keep global information in a few patches that show little of their own place and draw much of
    CLS's attention; their rows have a far greater norm than others ("Vision Transformers Need Registers", arXiv
    2309.16588). Here a patch is an outlier if the norm of its row (of the rows that are compressed: the tower's at the
    select layer) is above ``threshold`` times the median of its crop's patches. To the method it is not ``valid`` and
    has attention 0, so it comes last: it is kept only where others do not suffice, or by a rule that goes by more than
    attention (a method's diverse tokens). What merges, as VisionZip's contextual tokens, merges outliers like others.

    Attributes:
        of: a method that ranks by attention, crop by crop, as ``VisionZip`` or ``FasterVLM``.
        threshold: norms above so many times the median are outliers; above 1.

    Raises:
        ConfigError: a method that does not rank by attention, or chooses among a whole image's projected tokens, whose
            norms are not the tower's; a threshold that is not above 1.
    """

    threshold: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(1).allows(self.threshold) or self.threshold == 1:
            raise ConfigError(
                f"compressor.threshold={self.threshold!r}: must be a number above 1, how many times the median norm."
            )
        if not any(signal.name in SCORES for signal in self.of.reads()):
            raise ConfigError(
                f"compressor.of={self.of}: does not rank by attention, so outliers draw none of its tokens. Use a"
                " method that does, as visionzip, fastervlm, vispruner or scope."
            )
        if self.scope == "image":
            raise ConfigError(
                f"compressor.of={self.of}: chooses among the projected tokens of a whole image, and outliers are told"
                " by the norms of the vision tower's rows. Use a method that works crop by crop, as visionzip,"
                " fastervlm, vispruner or scope."
            )

    def select(self, vision: VisionOutput) -> Selection:
        return self.of.select(self.seen(vision))

    def combine(self, rows: Tensor, selection: Selection) -> Tensor:
        return self.of.combine(rows, selection)

    def outliers(self, vision: VisionOutput) -> Tensor:
        """Bool ``[N, P]``: which patches are."""
        norms = at_least_float32(vision.read_patches(Signal("hidden"))).norm(dim=-1)
        return norms > self.threshold * norms.median(dim=1, keepdim=True).values

    def seen(self, vision: VisionOutput) -> VisionOutput:
        """What the method is shown."""
        outliers = self.outliers(vision)
        aside = functional.pad(outliers, (int(vision.has_cls), 0))
        return replace(
            vision,
            attention=None if vision.attention is None else vision.attention.masked_fill(outliers, 0.0),
            signals={
                signal: value.masked_fill(outliers, 0.0) if signal.name in SCORES else value
                for signal, value in vision.signals.items()
            },
            valid=~aside if vision.valid is None else vision.valid & ~aside,
        )
