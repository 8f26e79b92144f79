"""What text-aware methods share: the part of a question that is about the image, and how near units are to it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

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


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosine of each of ``rows [N, M, E]`` with each of ``others [N, P, E]``: float64 ``[N, M, P]``.

    In float32 equal rows would differ in the last bit by where they stand, and a tie not be one.

    Raises:
        ValueError: rows of different width.
    """
    if rows.shape[-1] != others.shape[-1]:
        raise ValueError(f"rows are {rows.shape[-1]} and {others.shape[-1]} wide: they must be of one space.")
    unit, other = (functional.normalize(own.double(), dim=-1) for own in (rows, others))
    return unit @ other.transpose(1, 2)


def token_weights(text: Tensor) -> Tensor:
    """Float64 ``[N, M]``: of a question's rows ``[N, M, E]`` each the same, 1 together; 0 for rows that fill up."""
    is_token = (text != 0).any(dim=2).double()
    return is_token / is_token.sum(dim=1, keepdim=True).clamp(min=1)
