"""How far a compressed model is from vanilla on one answer, without labels: divergence of distributions, agreement.

Along vanilla's own greedy answer both are asked, at each of its tokens, what comes next, given the tokens before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm

MEASURES = ("kl", "agreement", "identical")


@dataclass(frozen=True)
class AnswerFidelity:
    """One answer of vanilla's beside a compressed model.

    Attributes:
        kl: float64 ``[T]``: KL(vanilla || compressed) in nats of the next-token distributions at each of its tokens.
        agrees: bool ``[T]``: whether the most likely token is the same there.
        identical: whether the compressed model's own greedy answer is vanilla's, token by token.
    """

    kl: Tensor
    agrees: Tensor
    identical: bool


def divergences(vanilla: Tensor, compressed: Tensor) -> Tensor:
    """KL(vanilla || compressed) in nats, float64 ``[T]``, of the softmax of logits ``[T, V]``; computed in float64."""
    log_p, log_q = (torch.log_softmax(logits.double(), dim=-1) for logits in (vanilla, compressed))
    # A token that vanilla rules out (-inf) adds nothing, whatever the other says of it.
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))
    return terms.sum(dim=-1).clamp_min(0.0)  # rounding may leave -1e-17


def compare_answers(
    vanilla_logits: Tensor, logits: Tensor, vanilla_answer: Sequence[int], answer: Sequence[int]
) -> AnswerFidelity:
    """Compares logits ``[T, V]`` at the tokens of vanilla's answer, and the two greedy answers."""
    agrees = vanilla_logits.argmax(dim=-1) == logits.argmax(dim=-1)
    return AnswerFidelity(divergences(vanilla_logits, logits), agrees, list(vanilla_answer) == list(answer))


def image_means(answers: Sequence[AnswerFidelity]) -> dict[str, float]:
    """The measures of one image: means over all tokens of its answers, and the share of identical answers."""
    return {
        "kl": float(torch.cat([each.kl for each in answers]).mean()),
        "agreement": float(torch.cat([each.agrees for each in answers]).double().mean()),
        "identical": sum(each.identical for each in answers) / len(answers),
    }


@torch.inference_mode()
def answer_logits(vlm: CompressedVlm, inputs: Mapping[str, Any], answer: Tensor) -> Tensor:
    """Logits ``[T, V]`` from which each token of a given answer would be chosen, in one pass.

    Args:
        vlm: without a pruner, which would take the answer for a part of the prompt.
        inputs: of one prompt, from ``build_inputs``, with its ``questions`` for a text-aware method.
        answer: int64 ``[T]``, one token or more.
    """
    before = answer[None, :-1].to(inputs["input_ids"])
    read = {
        "input_ids": torch.cat([inputs["input_ids"], before], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(before)], dim=1),
    }
    logits: Tensor = vlm(**{**inputs, **read}, logits_to_keep=len(answer), use_cache=False).logits[0]
    return logits
