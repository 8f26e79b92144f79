"""NaN and infinity stop where they are met: from such logits every model answers token 0 for ever."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from vzip.errors import VzipError


class NotFiniteError(VzipError, ArithmeticError):
    """Weights, pixels or what a model makes of them hold NaN or infinity."""


def damaged_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold NaN or infinity; what is on no device is not looked at."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return [name for name, tensor in named if tensor.is_floating_point() and not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return True
    if (
        tensor.dtype.itemsize < 2
    ):  # eight bits: torch has no sum of them, and quantized weights are checked as they load
        return True
    # A sum carries NaN and infinity along and needs no copy; only where it overflows itself is each one looked at.
    return bool(tensor.detach().sum(dtype=torch.float32).isfinite()) or bool(tensor.detach().isfinite().all())


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """All of them together, so that the device is waited for once."""
    if not tensors or any(tensor.device.type == "meta" for tensor in tensors):
        return True
    sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in tensors])
    return bool(sums.isfinite().all()) or all(map(_is_finite, tensors))


def check_embeddings(model: nn.Module, embeddings: Iterable[Tensor], inputs: Mapping[str, Any]) -> None:
    """Refuses what would enter the language model if it holds NaN or infinity.

    Args:
        model: that made it.
        embeddings: of text and images.
        inputs: what they were made of, as ``pixel_values``.

    Raises:
        NotFiniteError: naming the image, the weights or the precision that it comes from.
    """
    if torch.compiler.is_compiling() or _are_finite(list(embeddings)):
        return
    for name, values in inputs.items():
        if isinstance(values, Tensor) and values.is_floating_point() and not _is_finite(values):
            rows = [str(row) for row, value in enumerate(values) if not value.isfinite().all()]
            raise NotFiniteError(
                f"{name}: number {', '.join(rows[:4])} of {len(values)} holds NaN or infinity. Look at the image, and"
                " at image_mean and image_std of the checkpoint's preprocessor_config.json."
            )
    raise NotFiniteError(_of_model(model, "the embeddings of the prompt"))


def _of_model(model: nn.Module, what: str) -> str:
    names = damaged_weights(model)
    if names:
        return (
            f"{what} hold NaN or infinity, because {len(names)} of the model's tensors do ({', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}): the checkpoint is damaged, or its training diverged."
        )
    return (
        f"{what} hold NaN or infinity, though weights and pixels are finite: numbers became too large for the model's"
        " precision. Load it with model.dtype=bfloat16 or float32."
    )


def check_logits(model: nn.Module, logits: Tensor) -> None:
    """Refuses logits ``[rows, words]`` that hold NaN or infinity; forbidden words may be at minus infinity.

    Raises:
        NotFiniteError: naming the weights or the precision that it comes from.
    """
    if torch.compiler.is_compiling() or logits.device.type == "meta":
        return
    wrong = logits.isnan().any() | logits.isposinf().any() | logits.isneginf().all(dim=-1).any()
    if bool(wrong):
        raise NotFiniteError(_of_model(model, "the logits of the next token"))


class _Finite(LogitsProcessor):
    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_logits(self._model, scores)
        return scores


def refusing_not_finite(model: nn.Module, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of Hugging Face's ``generate`` under which logits are checked before anything is chosen by them."""
    given = settings.get("logits_processor") or []
    return {**settings, "logits_processor": LogitsProcessorList([_Finite(model), *given])}
