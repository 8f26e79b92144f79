"""The contract of a method: what it reads of the vision tower, how many tokens it keeps, which, and how others merge.

A method is a pure function of what the vision tower produced: no parameters, no state. It works on *unit rows*, the
rows that can be kept (CLS and patches of a CLIP tower, patches of a SigLIP tower). A new method subclasses
``TopScores`` (it only scores), ``ChosenUnits`` (it only chooses) or ``Compressor``.

Shapes: N crops (or images, see ``Compressor.scope``), U unit rows, P patches, K tokens kept, E the width of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vzip.errors import ConfigError
from vzip.keys import SEED, check_value, raise_all
from vzip.ops.attention import at_least_float32
from vzip.ops.merge import MERGE_RULES, MergeRule, combine_rows
from vzip.ops.select import dominant_rows, gather_rows

from .budget import FractionBudget, TokenBudget, check_budget
from .plan import TowerPlan, TowerUse
from .vision import Signal, VisionOutput, VisionShape


@dataclass(frozen=True)
class Selection:
    """Which units stay and which merge into which: an index map, the same for any rows it is applied to.

    Attributes:
        place_index: int64 ``[N, K]``, the unit whose place each token takes: a kept unit's own, a contextual token's
            target's. Units kept as tokens come first, ascending; contextual tokens follow.
        merge_index: int64 ``[N, U]``, the token into which each other unit merges, -1 where it is kept or dropped;
            None: nothing merges.
        num_contextual: how many of the K tokens, the last ones, are contextual.
        weights: ``[N, K, U]``, what each token is as a weighted sum of units, for a method whose units may join several
            tokens; ``merge_rule`` then says nothing, and ``merge_index`` only where a unit is found again.
    """

    place_index: Tensor
    merge_index: Tensor | None = None
    num_contextual: int = 0
    weights: Tensor | None = None

    @property
    def num_kept(self) -> int:
        """Tokens that are units kept, whether others merge into them or not."""
        return self.place_index.shape[1] - self.num_contextual


@dataclass(frozen=True)
class CompressedTokens:
    """What a compressor returns for N crops.

    Attributes:
        tokens: ``[N, K, E]``, kept rows first (ascending), then contextual tokens.
        source_index: int64 ``[N, num_kept]``, units kept, ascending (CLS = 0).
        merge_index: int64 ``[N, U]``, for each unit the contextual token (0..num_contextual-1) it was merged into,
            targets included; -1 for units that were kept or dropped. Of a method without contextual tokens, the kept
            token (0..K-1) that it was merged into.
        place_index: int64 ``[N, K]``, the unit whose place each token takes; None: of kept units their own, and
            contextual tokens have none.
        planes: ``[N, K, F]``, the tokens of ``VisionOutput.planes``, or None.
    """

    tokens: Tensor
    source_index: Tensor
    merge_index: Tensor
    place_index: Tensor | None = None
    planes: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """K, per crop."""
        return self.tokens.shape[1]

    @property
    def places(self) -> Tensor:
        """``place_index`` of all tokens; ValueError where contextual ones have none."""
        places = self.source_index if self.place_index is None else self.place_index
        if places.shape != self.tokens.shape[:2]:
            raise ValueError(
                f"place_index is {None if self.place_index is None else tuple(self.place_index.shape)} for"
                f" {tuple(self.tokens.shape[:2])} tokens: each token needs the unit whose place it takes."
            )
        return places


class Compressor(ABC):
    """A method: ``VisionOutput`` -> ``CompressedTokens``, the same number of tokens for every crop.

    Attributes:
        scope: what shares one budget: each ``crop``, or the whole ``image`` (or video): its crops packed as the
            unmodified model packs them, newlines among them and not ``valid``.
        space: whose rows are combined: the ``tower``'s, then projected; or the ``projected`` ones. Of a whole image the
            latter, since newlines are nothing the tower makes.
        merge_rule: how merged units enter their token, see ``vzip.ops.merge``.
        is_vanilla: whether nothing is compressed.
        uses_valid: whether units that are not ``valid`` are kept last.
        splits_budget: whether dominant and contextual tokens are told apart; otherwise only their sum counts.
        drops_rest: whether what is not kept is dropped, and so left to ``MergeDropped``.
        tower_use: how the vision tower runs for it; ``plan`` says the rest.
        uses_grid: whether it goes by rows and columns of patches, which frames that share a budget do not have.
        cannot_capture: why what it does cannot be part of one graph (``torch.compile(fullgraph=True)``); None: it can.
        text_encoder: of a text-aware method: the CLIP checkpoint by whose text model it reads the question; None: by
            the language model's input embeddings.
    """

    scope: ClassVar[Literal["crop", "image"]] = "crop"
    space: ClassVar[Literal["tower", "projected"]] = "tower"
    is_vanilla: ClassVar[bool] = False
    uses_valid: ClassVar[bool] = False
    splits_budget: ClassVar[bool] = False
    drops_rest: ClassVar[bool] = False
    tower_use: ClassVar[TowerUse] = "whole"
    uses_grid: ClassVar[bool] = False
    cannot_capture: ClassVar[str | None] = None
    merge_rule: MergeRule = "sum"
    text_encoder: str | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        for name, allowed in (("scope", ("crop", "image")), ("space", ("tower", "projected"))):
            if getattr(cls, name) not in allowed:
                raise TypeError(f"{cls.__name__}: {name}={getattr(cls, name)!r} must be one of {', '.join(allowed)}.")
        if cls.scope == "image" and cls.space != "projected":
            raise TypeError(f"{cls.__name__}: scope='image' needs space='projected'.")
        rule = vars(cls).get("merge_rule", "sum")
        if isinstance(rule, str) and rule not in MERGE_RULES:
            raise TypeError(f"{cls.__name__}: merge_rule={rule!r} must be one of {', '.join(MERGE_RULES)}.")

    def reads(self) -> frozenset[Signal]:
        """What the vision tower's run must record."""
        return frozenset()

    @property
    def reads_text(self) -> bool:
        """Whether the method is text-aware: what it keeps depends on the question."""
        return Signal("text") in self.reads()

    def text(self, question: str) -> str:
        """What a text-aware method reads of the raw question; ``Signal("text")`` are this text's rows."""
        return question

    def view(self, pixel_values: Tensor) -> Tensor:
        """What is shown in place of the processor's pixels, of any layout: of the same shape, type and device."""
        return pixel_values

    def plan(self, shape: VisionShape) -> TowerPlan | None:
        """How the vision tower runs on a crop of that shape, where ``tower_use`` is not ``whole``.

        Its output has a row for every place of the grid all the same: zeros where no patch is left, and the signal
        ``present`` says where. Nothing else is recorded.
        """
        return None

    @abstractmethod
    def num_tokens(self, shape: VisionShape) -> int:
        """Tokens that ``compress`` makes of a crop (of the whole, where ``scope`` is the image), by its shape alone.

        Raises:
            ConfigError: the budget does not fit.
        """

    @abstractmethod
    def select(self, vision: VisionOutput) -> Selection:
        """Chooses. Must not synchronise with the host, change its input or depend on the other crops."""

    def combine(self, rows: Tensor, selection: Selection) -> Tensor:
        """Applies a selection to rows of any width, ``[N, U, E]`` -> ``[N, K, E]``; linear in the rows."""
        if selection.weights is not None:
            wide = at_least_float32(rows)
            return (selection.weights.to(wide.dtype) @ wide).to(rows.dtype)
        if selection.merge_index is None:
            return gather_rows(rows, selection.place_index)
        first = selection.num_kept if selection.num_contextual else 0
        return combine_rows(rows, selection.place_index, selection.merge_index, self.merge_rule, first)

    @property
    def is_tested(self) -> bool:
        """Whether its selections need no ``check_selection`` in each run, some twenty operators: this package's own."""
        return type(self).__module__.startswith(f"{__package__}.")

    @property
    def joins_frames(self) -> bool:
        """Whether all frames (temporal steps) of a video share one budget: ``scope="video"`` of the budget."""
        return getattr(getattr(self, "budget", None), "scope", "crop") == "video"

    def joins(self, shape: VisionShape) -> bool:
        """Whether ``select`` sees all crops of that image or video as one, see ``VisionShape.joined``."""
        return self.joins_frames and shape.kind == "video"

    def num_visual_tokens(self, shape: VisionShape) -> int:
        """Visual tokens that enter the language model for the whole of an image or video."""
        if self.joins(shape):
            return self.num_tokens(shape.joined)
        num_tokens = self.num_tokens(shape)
        return num_tokens if self.scope == "image" else num_tokens * shape.num_crops + shape.num_added

    def compress(self, vision: VisionOutput) -> CompressedTokens:
        """Selects and combines, nothing checked; see ``__call__``."""
        selection = self.select(vision)
        if not self.is_tested:
            check_selection(selection, vision.num_rows)
        rows = vision.hidden if self.space == "tower" else vision.read(Signal("projected"))
        tokens = self.combine(rows, selection)
        planes = None if vision.planes is None else self.combine(vision.planes, selection)
        num_kept, merged = selection.num_kept, selection.merge_index
        if merged is None:
            merged = torch.full(rows.shape[:2], -1, dtype=torch.int64, device=rows.device)
        elif selection.num_contextual:
            targets = selection.place_index[:, num_kept:]
            own = torch.arange(num_kept, selection.place_index.shape[1], device=rows.device).expand_as(targets)
            merged = (merged.scatter(1, targets, own) - num_kept).clamp(min=-1)
        return CompressedTokens(tokens, selection.place_index[:, :num_kept], merged, selection.place_index, planes)

    def __call__(self, vision: VisionOutput) -> CompressedTokens:
        """Compresses and checks count, type and device.

        Raises:
            ConfigError: the budget does not fit the tower.
            ValueError: ``compress`` returned something else than it promised (a mistake in the method).
        """
        num_tokens = self.num_tokens(vision.shape)
        device = vision.hidden.device.type
        # Under autocast, as in a training, float32 scores would be bfloat16 ones, and other tokens be kept.
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            result = self.compress(vision)
        num_crops, num_rows, width = vision.hidden.shape
        tokens = result.tokens
        expected = (num_crops, num_tokens, width if self.space == "tower" else tokens.shape[-1])
        if tuple(tokens.shape) != expected:
            raise ValueError(f"{self}: tokens have shape {tuple(tokens.shape)}, promised {expected}.")
        if self.space == "tower" and (tokens.dtype, tokens.device) != (vision.hidden.dtype, vision.hidden.device):
            raise ValueError(
                f"{self}: tokens are {tokens.dtype} on {tokens.device}, the tower's output {vision.hidden.dtype} on"
                f" {vision.hidden.device}."
            )
        if vision.planes is not None and (result.planes is None or result.planes.shape[:2] != tokens.shape[:2]):
            raise ValueError(
                f"{self}: `compress` must apply its selection to the planes of this model too, as the base's does."
            )
        if result.merge_index.shape != (num_crops, num_rows) or result.source_index.shape[:1] != (num_crops,):
            raise ValueError(
                f"{self}: merge_index {tuple(result.merge_index.shape)} must be {(num_crops, num_rows)}, source_index"
                f" {tuple(result.source_index.shape)} must be ({num_crops}, number of kept rows)."
            )
        return result


def check_selection(selection: Selection, num_units: int) -> None:
    """Holds a selection to what ``Selection`` says; a method that breaks it would merge or drop the wrong units.

    Values are held by asserts of the device itself, so the host waits for nothing.

    Raises:
        ValueError: a wrong shape or type; RuntimeError: wrong values.
    """
    place, merge, num_kept = selection.place_index, selection.merge_index, selection.num_kept
    for name, index in (("place_index", place), ("merge_index", merge)):
        if index is not None and (index.ndim != 2 or index.dtype != torch.int64):
            raise ValueError(f"{name} is {index.dtype} of shape {tuple(index.shape)}: must be int64 of two dimensions.")
    kept = place[:, :num_kept]
    in_range = ((place >= 0) & (place < num_units)).all()
    torch._assert_async(in_range, f"place_index: must be units, 0 to {num_units - 1}")
    torch._assert_async((kept[:, 1:] > kept[:, :-1]).all(), "place_index: units kept must ascend, each once")
    weights = selection.weights
    if weights is not None and (weights.shape != (*place.shape, num_units) or not weights.is_floating_point()):
        expected = (*place.shape, num_units)
        raise ValueError(f"weights are {weights.dtype} of shape {tuple(weights.shape)}: must be floats, {expected}.")
    if merge is None:
        return
    if merge.shape != (place.shape[0], num_units):
        raise ValueError(f"merge_index has shape {tuple(merge.shape)}: must be {(place.shape[0], num_units)}.")
    first = num_kept if selection.num_contextual else 0
    joins = (merge == -1) | ((merge >= first) & (merge < place.shape[1]))
    torch._assert_async(
        joins.all(), f"merge_index: must be -1 or a token that others join, {first} to {place.shape[1] - 1}"
    )
    of_places = merge.gather(1, place.clamp(0, num_units - 1))
    torch._assert_async((of_places == -1).all(), "merge_index: must be -1 where a token's own unit is")


@dataclass(frozen=True)
class Budgeted(Compressor):
    """A method with a ``TokenBudget``; of a whole image it has the budgets of all its crops.

    Attributes:
        budget: tokens per crop, as counts or as fractions kept.
        keeps_cls: whether CLS, where there is one, is kept too, as one of the budget.
    """

    budget: TokenBudget | FractionBudget
    keeps_cls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def num_tokens(self, shape: VisionShape) -> int:
        num_tokens = self.budget.of(shape).num_tokens
        available = shape.num_patches + int(shape.has_cls and self.keeps_cls and self.scope == "crop")
        check_count(num_tokens, available, ("budget.num_dominant", "budget.num_contextual"))
        if self.scope == "crop":
            return num_tokens
        # Sizes vary: cutting padding off may leave an image fewer tokens than its crops' budgets.
        return min(num_tokens * shape.num_crops, shape.num_vanilla)


@dataclass(frozen=True)
class TopScores(Budgeted):
    """A method that scores: the patches of highest score are kept, the rest is dropped."""

    uses_valid: ClassVar[bool] = True
    drops_rest: ClassVar[bool] = True

    @abstractmethod
    def score(self, vision: VisionOutput) -> Tensor:
        """``[N, U]``, higher is kept; CLS's own value is not looked at."""

    def select(self, vision: VisionOutput) -> Selection:
        score = self.score(vision)
        if score.shape != vision.hidden.shape[:2]:
            raise ValueError(
                f"{type(self).__name__}.score has shape {tuple(score.shape)}: must be"
                f" {tuple(vision.hidden.shape[:2])}, a value for every unit row, CLS included, as `read` gives it."
            )
        torch._assert_async(score.isnan().any().logical_not(), f"{type(self).__name__}.score is NaN for some units")
        keeps_cls = vision.has_cls and self.keeps_cls
        of_patches = score[:, int(vision.has_cls) :]
        kept = dominant_rows(of_patches, self.num_tokens(vision.shape), keeps_cls, vision.valid_patches)
        return Selection(kept + int(vision.has_cls and not keeps_cls))


@dataclass(frozen=True)
class PresentPatches(TopScores):
    """A method that chooses by its ``plan``: the patches that the vision tower ends with are kept."""

    uses_valid: ClassVar[bool] = False

    @abstractmethod
    def plan(self, shape: VisionShape) -> TowerPlan: ...

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("present")})

    def score(self, vision: VisionOutput) -> Tensor:
        return vision.read(Signal("present"))


@dataclass(frozen=True)
class ChosenUnits(Budgeted):
    """A method that chooses units by itself: those are kept, the rest is dropped."""

    drops_rest: ClassVar[bool] = True

    @abstractmethod
    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        """int64 ``[N, num_tokens]``, ascending units."""

    def select(self, vision: VisionOutput) -> Selection:
        return Selection(self.choose(vision, self.num_tokens(vision.shape)))


def check_is_compressor(compressor: object, key: str = "compressor") -> None:
    """Raises ConfigError for anything else, a name above all."""
    if not isinstance(compressor, Compressor):
        raise ConfigError(
            f"{key}={compressor!r}: must be an instance of vzip.Compressor, such as vzip.VisionZip(budget) or"
            " vzip.Identity()."
        )


def check_reads_no_text(compressor: Compressor, why: str) -> None:
    """Raises ConfigError for a text-aware method where nothing is asked; ``why`` says where."""
    if compressor.reads_text:
        raise ConfigError(
            f"compressor: {type(compressor).__name__} is text-aware, it needs the question about each image, and {why}."
            " Choose a method that reads no text, such as compressor=visionzip."
        )


def check_count(num_tokens: int, available: int, what: Iterable[str] | str) -> None:
    """Raises ConfigError unless ``num_tokens`` is within 1..available; ``what`` names the keys to change."""
    if not 1 <= num_tokens <= available:
        keys = what if isinstance(what, str) else " + ".join(what)
        raise ConfigError(
            f"{keys} = {num_tokens} visual tokens per crop: the vision tower has {available} to choose from, so 1 to"
            f" {available} are allowed. Change {keys} (for each crop; an image of 5 crops gets 5 times as many)."
        )


def check_seed(seed: object, key: str = "compressor.seed") -> None:
    """Raises ConfigError unless ``seed`` is a whole number that NumPy and torch both take."""
    raise_all(check_value(key, seed, SEED))
