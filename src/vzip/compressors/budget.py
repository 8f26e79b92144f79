"""How many visual tokens are kept: counts of a crop, or fractions of its patches."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

from vzip.errors import ConfigError, nearest

from .vision import VisionShape

BudgetScope = Literal["crop", "video"]
BUDGET_SCOPES: tuple[str, ...] = get_args(BudgetScope)


@dataclass(frozen=True)
class _Scoped:
    """A budget of each crop, or one of all frames (temporal steps) of a video together; images have each crop's."""

    def __repr__(self) -> str:
        """``scope`` where it is not the usual one."""
        shown = [f for f in fields(self) if f.name != "scope" or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


def _check_scope(scope: object) -> None:
    if scope not in BUDGET_SCOPES:
        raise ConfigError(
            f"budget.scope={scope!r}: must be one of {', '.join(BUDGET_SCOPES)}{nearest(str(scope), BUDGET_SCOPES)}:"
            " a budget for each crop, frame or temporal step, or one for all of a video."
        )


@dataclass(frozen=True, repr=False)
class TokenBudget(_Scoped):
    """Visual tokens kept per crop (or frame).

    Attributes:
        num_dominant: tokens kept as they are; CLS, where the tower has one, counts as the first of them.
        num_contextual: tokens into which all the others are merged.
        scope: ``crop``, or ``video``: of a video these are the tokens of all its frames (temporal steps) together,
            whichever of them they come from. An image has its crops' budgets all the same.

    Raises:
        ConfigError: a count is negative or not an integer, or both are zero.
    """

    num_dominant: int
    num_contextual: int
    scope: BudgetScope = "crop"

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        for name in ("num_dominant", "num_contextual"):
            value = vars(self)[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(
                    f"budget.{name}={value!r}: must be a whole number of tokens per crop, 0 or more (not a ratio)."
                )
        if self.num_tokens == 0:
            raise ConfigError(
                "budget.num_dominant=0 with budget.num_contextual=0 keeps no visual token: at least 1 in all."
                " For a run without compression use compressor=none budget=full."
            )

    @property
    def num_tokens(self) -> int:
        """All visual tokens per crop."""
        return self.num_dominant + self.num_contextual

    def of(self, shape: VisionShape) -> TokenBudget:
        """For a crop of that shape: itself, or all patches where crops vary in size and this one has no more."""
        return self if shape.fixed or self.num_tokens < shape.num_patches else TokenBudget(shape.num_patches, 0)


@dataclass(frozen=True, repr=False)
class FractionBudget(_Scoped):
    """Fractions kept of a crop's patches, rounded down, where crops differ in size (as upstream's file for Qwen2.5-VL).

    Attributes:
        dominant: of the patches, kept as they are.
        contextual: into which all the others are merged; where it is above 0, at least one token.
        scope: as of ``TokenBudget``; with ``video`` fractions of all that a video has.

    Raises:
        ConfigError: a fraction outside 0..1, or both are zero or more than one together.
    """

    dominant: float
    contextual: float
    scope: BudgetScope = "crop"

    def __post_init__(self) -> None:
        _check_scope(self.scope)
        for name in ("dominant", "contextual"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"budget.{name}={value!r}: must be a fraction kept, 0 to 1.")
        if not 0 < self.dominant + self.contextual <= 1:
            raise ConfigError(
                f"budget.dominant={self.dominant} + budget.contextual={self.contextual}: together they must be above 0"
                " and at most 1, the fraction of the patches that is kept."
            )

    def of(self, shape: VisionShape) -> TokenBudget:
        """The counts for a crop of that shape; one token at least."""
        num_dominant, num_contextual = (part_of(part, shape.num_patches) for part in (self.dominant, self.contextual))
        if self.contextual:
            num_contextual = max(num_contextual, 1)
        return TokenBudget(num_dominant if num_dominant or num_contextual else 1, num_contextual)


def part_of(share: float, count: int) -> int:
    """A share of a count, rounded down, as the decimal is written: 0.35 * 180 is 62.99... in binary."""
    return math.floor(round(share * count, 9))


def check_budget(budget: object) -> None:
    """Raises ConfigError unless ``budget`` is one."""
    if not isinstance(budget, TokenBudget | FractionBudget):
        raise ConfigError(
            f"budget={budget!r}: must be vzip.TokenBudget(num_dominant=54, num_contextual=10), counts per crop, or"
            " vzip.FractionBudget(0.65, 0.05), fractions kept."
        )
