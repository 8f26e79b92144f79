"""MMTok: patches that cover the question's words and the image (arXiv 2508.18264, github.com/Ironieser/MMTok)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vzip.errors import ConfigError
from vzip.keys import POSITIVE, number
from vzip.ops.select import gather_rows

from .base import ChosenUnits
from .text import cosines, token_weights, without_answer_sentences
from .vision import Signal, VisionOutput

STOP_WORDS = frozenset(
    """a an the is are was were be been being have has had do does did it they he she we you i what where when why how
    who which and or but so if then question answer to for with by from at into onto upon""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class MMTok(ChosenUnits):
    """Text-aware: keeps, one after the other, the patch that adds most to the cover of the question and the image.

    What is to be covered: each token of the question's words (stop words and sentences about the answer left out;
    where no word is left, the whole question), by the softmax over the patches of its input embedding's cosine with
    the projected patches; and each patch, by the softmax of its cosine with the tower's rows. A row is covered by its
    greatest entry at a kept patch, 0 before the first; tokens share a weight of 1, patches one of ``alpha``. Ties to
    the lower index. CLS is dropped, nothing is merged.

    Apart from the published code: every patch is kept once; patches that show padding alone are set aside where
    the family knows them (``model.drop_padding``), not for LLaVA-1.5; several images of a prompt each have the budget.
    For Qwen2.5-VL its authors keep all words, put "Question: " before them, take ``text_temperature=0.01`` and the
    tower's last layer (``layer=-1``), and share one budget among all images of a prompt; here each image has its own.

    Attributes:
        budget: tokens per crop.
        alpha: weight of the image's cover beside the question's.
        text_temperature: of the softmax of the question's tokens.
        image_temperature: of the softmax of the patches.
        stop_words: whether stop words are left out; false: the whole question, "Question: " before it.
        layer: of the tower's rows that cover the image; None: the select layer's.

    Raises:
        ConfigError: a value that is not allowed.
    """

    uses_valid: ClassVar[bool] = True
    space: ClassVar[Literal["tower", "projected"]] = "projected"

    alpha: float = 0.5
    text_temperature: float = 0.02
    image_temperature: float = 0.2
    stop_words: bool = True
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rule in (("alpha", number(0)), ("text_temperature", POSITIVE), ("image_temperature", POSITIVE)):
            if not rule.allows(vars(self)[name]):
                raise ConfigError(f"compressor.{name}={vars(self)[name]!r}: must be {rule.text}.")
        if not isinstance(self.stop_words, bool):
            raise ConfigError(f"compressor.stop_words={self.stop_words!r}: must be true or false.")
        self.reads()

    def reads(self) -> frozenset[Signal]:
        return frozenset({Signal("text"), Signal("hidden", self.layer)})

    def text(self, question: str) -> str:
        asked = without_answer_sentences(question)
        if not self.stop_words:
            return f"Question: {asked}"
        words = [word for word in re.findall(r"\w+", asked) if word.lower() not in STOP_WORDS]
        return " ".join(words) if words else asked

    def choose(self, vision: VisionOutput, num_tokens: int) -> Tensor:
        valid, text = vision.valid_patches, vision.read(Signal("text"))
        rows = vision.read_patches(Signal("hidden", self.layer))
        of_text = cosines(text, vision.read_patches(Signal("projected"))) / self.text_temperature
        covers = torch.cat([of_text, cosines(rows, rows) / self.image_temperature], dim=1)  # [N, M + P, P]
        weights = torch.full_like(covers[:, :, 0], self.alpha / rows.shape[1])
        weights[:, : text.shape[1]] = token_weights(text)
        out = torch.zeros_like(covers[:, 0], dtype=torch.float32)  # added: what may not be kept, or only at the end
        if valid is not None:
            covers = covers.masked_fill(~valid[:, None], -torch.inf)
            weights[:, text.shape[1] :] *= valid
            out = out.masked_fill(~valid, -1e3)
        covers = (covers.softmax(dim=2).nan_to_num(0) * weights[:, :, None]).float()
        best, kept = torch.zeros_like(covers[:, :, 0]), []
        for _ in range(num_tokens):
            gain = (covers - best[:, :, None]).clamp(min=0).sum(dim=1, dtype=torch.float64).float()
            kept.append((gain + out).argmax(dim=1, keepdim=True))
            out = out.scatter(1, kept[-1], -torch.inf)
            best = torch.maximum(best, gather_rows(covers.transpose(1, 2), kept[-1])[:, 0])
        return torch.cat(kept, dim=1).sort(dim=1).values + int(vision.has_cls)
