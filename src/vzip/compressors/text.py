"""What text-aware methods share: the part of a question that is about the image, and how near units are to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vzip.ops.attention import at_least_float32

# Sentences that LLaVA's evaluation puts behind a question; they speak of the answer.
ANSWER_SENTENCES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def without_answer_sentences(question: str) -> str:
    """A question without the sentences about its answer; as it is where nothing else would be left."""
    left = question
    for sentence in ANSWER_SENTENCES:
        left = left.replace(sentence, "")
    return left.strip() or question.strip()


def text_cosines(text: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of a question's rows with units, in float32 at least.

    Args:
        text: ``[N, M, E]``, filled up with rows of zeros.
        rows: ``[N, P, E]``.

    Returns:
        ``[N, M, P]``, and bool ``[N, M]``: which rows are the question's.

    Raises:
        ValueError: rows of another width than the text's.
    """
    if text.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"the question's rows are {text.shape[-1]} wide and the units' {rows.shape[-1]}: they must be of one space."
        )
    wide_text, wide_rows = at_least_float32(text), at_least_float32(rows)
    cosine = functional.normalize(wide_text, dim=-1) @ functional.normalize(wide_rows, dim=-1).transpose(1, 2)
    return cosine, (torch.abs(wide_text) > 0).any(dim=2)
