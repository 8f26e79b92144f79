"""Questions on their way to text-aware methods: checked, read, and laid beside the crops that they are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vzip.compressors.base import Compressor
from vzip.compressors.vision import Signal, VisionOutput
from vzip.errors import ConfigError, PromptError

from ..towers.text import TextEncoder


def check_questions(compressor: Compressor, questions: object, num_needed: int, what: str) -> Sequence[str] | None:
    """The questions that a text-aware method reads; None for any other method, whatever is given.

    Args:
        compressor: the method.
        questions: as the caller gave them.
        num_needed: how many there must be.
        what: what each is for, as ``prompt``.

    Raises:
        PromptError: none, another number, no texts, or an empty one.
    """
    if not compressor.reads_text:
        return None
    name = type(compressor).__name__
    if questions is None:
        raise missing_questions(compressor)
    if isinstance(questions, str) or not isinstance(questions, Sequence):
        raise PromptError(
            f"questions={questions!r:.60}: must be a list of texts, one for each {what}: questions=[question]."
        )
    if len(questions) != num_needed:
        raise PromptError(f"{len(questions)} questions for {num_needed} {what}s: {name} needs one for each {what}.")
    for number, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            raise PromptError(
                f"questions[{number}]={question!r:.60}: must be the raw question of {what} {number}, a text with at"
                f" least one word, since {name} keeps what it asks about."
            )
    return questions


def missing_questions(compressor: Compressor) -> PromptError:
    """What is raised where a text-aware method would have to choose without a question."""
    return PromptError(
        f"questions is missing: {type(compressor).__name__} is text-aware, it keeps the visual tokens that a question"
        " asks about. Pass questions=[...], the raw question of each prompt (encode_images, encode_videos: of each"
        " image or video), or use a method that reads no text, as VisionZip."
    )


@torch.no_grad()
def read_text(text: str, tokenizer: Any, embed_tokens: Any, device: torch.device) -> Tensor:
    """``[M, d_text]``: the language model's input embeddings of a text's tokens, none added.

    Raises:
        PromptError: a text without tokens.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PromptError(f"the question {text!r} has no token: ask something.")
    rows: Tensor = embed_tokens(torch.tensor([ids], device=device))[0]
    return rows.detach()


def need_tokenizer(processor: Any, compressor: Compressor) -> Any:
    """The processor's tokenizer; raises ConfigError where there is no processor."""
    if processor is None:
        raise ConfigError(
            f"{type(compressor).__name__} reads questions by the language model's tokenizer, and this wrapper has none:"
            " pass processor= to CompressedVlm, or use load_vlm on a directory that holds the tokenizer's files."
        )
    return processor.tokenizer


def beside(
    vision: VisionOutput,
    compressor: Compressor,
    texts: Sequence[Tensor],
    num_crops: Sequence[int],
    encoder: TextEncoder | None,
) -> VisionOutput:
    """The tower's output with what a text-aware method reads beside it.

    Args:
        vision: of all crops of some images.
        compressor: the method.
        texts: of each image its question's rows ``[M, width]``.
        num_crops: of each image.
        encoder: whose space ``aligned`` is in.
    """
    longest = max(map(len, texts))
    rows = [functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts]
    of_crops = [row for row, count in zip(rows, num_crops, strict=True) for _ in range(count)]
    signals = {**vision.signals, Signal("text"): torch.stack(of_crops).to(vision.hidden.device)}
    for signal in compressor.reads():
        if signal.name == "aligned":
            assert encoder is not None
            signals[signal] = encoder.align(vision.read(Signal("hidden", signal.layer)))
    return replace(vision, signals=signals, num_crops=tuple(num_crops))
