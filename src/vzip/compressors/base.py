"""What a compressor takes and returns, and the base class that checks both.

A compressor is a pure function of what the vision tower produced: no parameters, no state. To add a method, subclass
``Compressor`` in a new file, name what it needs in ``requires`` and write ``compress``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vzip.errors import ConfigError

# What patches can be selected by: fields of ``VisionOutput``, each ``[N, P]``, higher is more important.
SCORES = ("attention", "received_attention", "key_norms")


@dataclass(frozen=True)
class TokenBudget:
    """Visual tokens kept per crop (or frame).

    Attributes:
        num_dominant: tokens kept as they are; CLS, where the tower has one, counts as the first of them.
        num_contextual: tokens into which all the others are merged.

    Raises:
        ConfigError: a count is negative or not an integer, or both are zero.
    """

    num_dominant: int
    num_contextual: int

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class VisionOutput:
    """What the vision tower produced for N crops, at the select layer.

    Attributes:
        hidden: ``[N, L, D]``, all rows of the tower, CLS first where there is one.
        has_cls: whether row 0 is a CLS token.
        grid: (rows, cols) of the patches; rows * cols = P = L - has_cls.
        attention: ``[N, P]`` float32 or float64, or None if not asked for. With CLS: the CLS query's softmax row over
            the patches, summed over heads. Without: the mean attention each patch receives.
        received_attention: ``[N, P]``, the mean attention each patch receives over heads and queries, or None. Where
            there is no CLS it is the same as ``attention``.
        key_norms: ``[N, P]``, the norm of each patch's unscaled key, mean over heads, or None.
        keys: ``[N, L, d]``, mean over heads of the unscaled keys, or None if not asked for.
        stock_offset: first row the unmodified model passes to its projector (1: row 0 is dropped; 0: all are used).
            None stands for "CLS is dropped". A checkpoint's ``vision_feature_select_strategy`` decides it.
    """

    hidden: Tensor
    has_cls: bool
    grid: tuple[int, int]
    attention: Tensor | None = None
    keys: Tensor | None = None
    stock_offset: int | None = None
    received_attention: Tensor | None = None
    key_norms: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """L, CLS included."""
        return self.hidden.shape[1]

    @property
    def num_patches(self) -> int:
        """P."""
        return self.hidden.shape[1] - int(self.has_cls)

    @property
    def first_stock_row(self) -> int:
        """First row of ``hidden`` that the unmodified model uses."""
        return int(self.has_cls) if self.stock_offset is None else self.stock_offset

    def need_attention(self) -> Tensor:
        """``attention``, or a ValueError if the tower's run did not record it."""
        return self.need_score("attention")

    def need_score(self, name: str) -> Tensor:
        """The field of ``SCORES`` of that name, or a ValueError if the tower's run did not record it."""
        score: Tensor | None = {field: getattr(self, field) for field in SCORES}[name]
        if score is None:
            raise ValueError(f"VisionOutput.{name} is None: name '{name}' in the compressor's `requires`.")
        return score

    def need_keys(self) -> Tensor:
        """``keys``, or a ValueError if the tower's run did not record them."""
        if self.keys is None:
            raise ValueError("VisionOutput.keys is None: name 'keys' in the compressor's `requires`.")
        return self.keys


@dataclass(frozen=True)
class CompressedTokens:
    """What a compressor returns for N crops.

    Attributes:
        tokens: ``[N, K, D]``, kept rows first (ascending), then contextual tokens.
        source_index: int64 ``[N, num_kept]``, rows of ``hidden`` kept as they are, ascending (CLS = 0).
        merge_index: int64 ``[N, L]``, for each row of ``hidden`` the contextual token (0..num_contextual-1) it was
            merged into, targets included; -1 for rows that were kept or dropped.
    """

    tokens: Tensor
    source_index: Tensor
    merge_index: Tensor

    @property
    def num_tokens(self) -> int:
        """K, per crop."""
        return self.tokens.shape[1]


class Compressor(ABC):
    """A method: ``VisionOutput`` -> ``CompressedTokens``, the same number of tokens for every crop.

    Subclasses set ``requires`` (any of ``REQUIRABLE``: what the tower's run must record; a property where it depends on
    the method's own arguments) and write ``compress``, ``num_tokens`` and ``check_fits``.
    """

    REQUIRABLE: ClassVar[frozenset[str]] = frozenset({*SCORES, "keys"})

    @property
    def requires(self) -> frozenset[str]:
        """What the tower's run must record."""
        return frozenset()

    @property
    def score_layer(self) -> int | None:
        """The layer that scores and keys are read at, as an index into the tower's hidden states; None: select layer.

        ``hidden`` is of the select layer in any case, which the projector was trained on.
        """
        return None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        named = vars(cls).get("requires", frozenset())
        unknown = frozenset() if isinstance(named, property) else frozenset(named) - cls.REQUIRABLE
        if unknown:
            raise TypeError(f"{cls.__name__}.requires has {sorted(unknown)}; allowed are {sorted(cls.REQUIRABLE)}.")

    @abstractmethod
    def compress(self, vision: VisionOutput) -> CompressedTokens:
        """Computes the tokens. Must not synchronise with the host, change its input or depend on the other crops."""

    @abstractmethod
    def num_tokens(self, vision: VisionOutput) -> int:
        """Tokens per crop that ``compress`` returns for this output; the base class holds it to that."""

    @abstractmethod
    def check_fits(self, num_patches: int, has_cls: bool) -> None:
        """Raises ConfigError if this compressor cannot serve a tower of ``num_patches`` (plus CLS).

        Needs no tensors, so a configuration can be refused before any model is loaded.
        """

    def __call__(self, vision: VisionOutput) -> CompressedTokens:
        """Compresses and checks count, type and device.

        Raises:
            ConfigError: the budget does not fit the tower.
            ValueError: ``compress`` returned something else than it promised (a mistake in the method).
        """
        self.check_fits(vision.num_patches, vision.has_cls)
        device = vision.hidden.device.type
        # Under autocast, as in a training, float32 scores would be bfloat16 ones, and other tokens be kept.
        with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
            result = self.compress(vision)
        num_crops, num_rows, width = vision.hidden.shape
        expected = (num_crops, self.num_tokens(vision), width)
        tokens = result.tokens
        if tuple(tokens.shape) != expected:
            raise ValueError(f"{self}: tokens have shape {tuple(tokens.shape)}, promised {expected}.")
        if tokens.dtype != vision.hidden.dtype or tokens.device != vision.hidden.device:
            raise ValueError(
                f"{self}: tokens are {tokens.dtype} on {tokens.device}, the tower's output {vision.hidden.dtype} on"
                f" {vision.hidden.device}."
            )
        if result.merge_index.shape != (num_crops, num_rows) or result.source_index.shape[:1] != (num_crops,):
            raise ValueError(
                f"{self}: merge_index {tuple(result.merge_index.shape)} must be {(num_crops, num_rows)}, source_index"
                f" {tuple(result.source_index.shape)} must be ({num_crops}, number of kept rows)."
            )
        return result


def check_count(num_tokens: int, available: int, what: Iterable[str] | str) -> None:
    """Raises ConfigError unless ``num_tokens`` is within 1..available; ``what`` names the keys to change."""
    if not 1 <= num_tokens <= available:
        keys = what if isinstance(what, str) else " + ".join(what)
        raise ConfigError(
            f"{keys} = {num_tokens} visual tokens per crop: the vision tower has {available} to choose from, so 1 to"
            f" {available} are allowed. Change {keys} (for each crop; a picture of 5 crops gets 5 times as many)."
        )


def check_seed(seed: object) -> None:
    """Raises ConfigError unless a compressor's ``seed`` is a whole number from 0 up."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"compressor.seed={seed!r}: must be a whole number, 0 or more.")


def no_merge_index(vision: VisionOutput) -> Tensor:
    """A ``merge_index`` saying that nothing was merged: int64 ``[N, L]`` of -1."""
    return torch.full(vision.hidden.shape[:2], -1, dtype=torch.int64, device=vision.hidden.device)
