"""Choosing what trains: the projector and nothing else (VisionZip's fine-tuning); and beginning it anew."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vzip.errors import UnsupportedModelError

from .families import adapter_for_model


def train_projector_only(hf_model: PreTrainedModel, in_float32: bool = False) -> list[str]:
    """Freezes every parameter but the projector's.

    Args:
        hf_model: a loaded Hugging Face model of a supported class.
        in_float32: keep the projector in float32 beside a half-precision model, as ``train.py`` does: small steps are
            lost in bfloat16. The model then runs under autocast (``TrainingArguments(bf16=True)``).

    Returns:
        the names of the trainable parameters, as ``hf_model.named_parameters()`` gives them.

    Raises:
        UnsupportedModelError: no adapter for the class, or a projector without parameters that can train.
    """
    projector = {id(parameter) for parameter in adapter_for_model(hf_model).projector.parameters()}
    trainable = [name for name, parameter in hf_model.named_parameters() if id(parameter) in projector]
    fixed = [name for name in trainable if not hf_model.get_parameter(name).is_floating_point()]
    if not trainable or fixed:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__}: the projector has {len(trainable)} parameters, {len(fixed)} of them quantised;"
            " training needs at least one, and all in a floating type. Load the model with load_vlm, whose"
            " quantization setting leaves the projector alone."
        )
    for parameter in hf_model.parameters():
        parameter.requires_grad_(id(parameter) in projector)
        if in_float32 and id(parameter) in projector:
            parameter.data = parameter.data.float()
    return trainable


def zero_of(projector: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Zero, with (zero) gradients for the projector: what a batch without images gives it.

    Args:
        projector: of a model.
        shape: of the smallest input that it takes.
    """
    first = next(projector.parameters())
    return 0.0 * projector(torch.zeros(shape, dtype=first.dtype, device=first.device)).sum().float()


def initialise_anew(projector: nn.Module) -> None:
    """Gives a projector torch's own initial weights, in place, drawn by torch's seed as it stands; norms get ones."""
    for module in projector.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif "weight" in dict(module.named_parameters(recurse=False)):  # Hugging Face's RMS norm has no such method
            nn.init.ones_(module.get_parameter("weight"))
