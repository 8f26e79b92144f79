"""CDPruner: patches relevant to the question, unlike each other (arXiv 2506.10967, github.com/Theia-4869/CDPruner)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vzip.errors import ConfigError, nearest

from .base import ChosenUnits
from .text import cosines, token_weights, without_answer_sentences
from .vision import Signal, VisionOutput

SIGNS = ("negated", "positive")
ALIGNED_LAYER = -2
# Below it what is left of a patch, or of a difference, is rounding: the kept ones span it already.
_EXHAUSTED = 1e-10


@dataclass(frozen=True)
class CDPruner(ChosenUnits):
    """Text-aware: the most probable patches of a determinantal point process whose kernel is weighted by relevance.

    A patch's relevance r to the question is its cosine, negated as published, with the question in the space that
    CLIP's image and text models share (the mean over parts of 77 tokens of a long question); it is scaled to 0..1 over
    all crops of an image. The kernel is r_i S_ij r_j, S being the cosines of the projected patches. Greedily the
    patch is kept that adds most to the determinant of the kept ones' kernel; ties to the lower index. CLS is dropped,
    nothing is merged.

    Apart from the published code: the scale is an image's own, not the batch's; where all patches are equally relevant
    each has 1, and where the kept patches span all others (as many as the projected rows' rank) the rest is filled by
    relevance: the published code divides by zero in both cases. The tower's rows are normed and projected in
    float32, the kernel is float64.

    Attributes:
        budget: tokens per crop.
        text_encoder: the CLIP checkpoint (directory or hub id) whose image model the vision tower is, since the
            checkpoints of vision-language models lack its text model. None: the mean of the language model's input
            embeddings of the question instead, beside the projected patches, as ports to other families have it.
        relevance: ``negated`` or ``positive``: the sign of the cosine; ports differ in it.

    Raises:
        ConfigError: a value that is not allowed.
    """

    uses_valid: ClassVar[bool] = True
    space: ClassVar[Literal["tower", "projected"]] = "projected"

    text_encoder: str | None = None
    relevance: str = "negated"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relevance not in SIGNS:
            raise ConfigError(
                f"compressor.relevance={self.relevance!r}: must be one of {', '.join(SIGNS)}"
                f"{nearest(str(self.relevance), SIGNS)}."
            )
        if self.text_encoder is not None and (not isinstance(self.text_encoder, str) or not self.text_encoder):
            raise ConfigError(
                f"compressor.text_encoder={self.text_encoder!r}: must be a CLIP checkpoint, a directory or a hub id as"
                " openai/clip-vit-large-patch14-336, or null for the language model's input embeddings."
            )

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("text")} if self.text_encoder is None else {Signal("text"), self._aligned})

    @property
    def _aligned(self) -> Signal:
        """The patches beside the text."""
        return Signal("projected") if self.text_encoder is None else Signal("aligned", ALIGNED_LAYER)

    def text(self, question: str) -> str:
        return without_answer_sentences(question)

    @torch.no_grad()  # rows of the factor are written in place
    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        rows, relevance = vision.read_patches(Signal("projected")), self._relevance(vision)
        kernel = relevance[:, :, None] * cosines(rows, rows) * relevance[:, None, :]
        left = kernel.diagonal(dim1=1, dim2=2)  # what of each patch the kept ones do not span
        out = torch.zeros_like(left, dtype=torch.float32)  # added: what may not be kept, or only at the end
        if vision.valid_patches is not None:
            out = out.masked_fill(~vision.valid_patches, -1e3)
        factors = torch.zeros_like(kernel[:, :num_tokens])  # rows of the Cholesky factor, one a patch kept
        kept = []
        for step in range(num_tokens):
            adds = left.masked_fill(out < 0, -torch.inf)
            is_spanned = adds.amax(dim=1, keepdim=True) < _EXHAUSTED
            chosen = (torch.where(is_spanned, relevance, left).float() + out).argmax(dim=1, keepdim=True)
            at_chosen = factors[:, :step].gather(2, chosen[:, None].expand(-1, step, -1))
            row = kernel.gather(1, chosen[:, None].expand(-1, -1, kernel.shape[2]))[:, 0]
            pivot = left.gather(1, chosen).clamp(min=_EXHAUSTED).sqrt()
            row = (row - (at_chosen * factors[:, :step]).sum(dim=1)) / pivot
            row = row.masked_fill(is_spanned, 0)
            factors[:, step] = row
            left = left - row.square()
            out = out.scatter(1, chosen, -torch.inf)
            kept.append(chosen)
        return torch.cat(kept, dim=1).sort(dim=1).values + int(vision.has_cls)

    def _relevance(self, vision: VisionOutput) -> Tensor:
        """Float64 ``[N, P]``, above 0, at most about 1."""
        text = vision.read(Signal("text")).double()
        weights = token_weights(text)
        if self.text_encoder is None:  # one row, the mean of the tokens
            text, weights = (weights[:, None] @ text), weights.new_ones(len(text), 1)
        relevance = (weights[:, None] @ cosines(text, vision.read_patches(self._aligned)))[:, 0]
        if self.relevance == "negated":
            relevance = -relevance
        low, high = vision.over_images(relevance, "amin"), vision.over_images(relevance, "amax")
        spread = high - low
        return torch.where(spread > _EXHAUSTED, (relevance - low + 1e-6) / spread, 1.0)
