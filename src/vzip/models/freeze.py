"""Choosing what trains: the projector and nothing else (VisionZip's fine-tuning); and beginning it anew."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from vzip.errors import UnsupportedModelError

from .families import adapter_for_model


def train_projector_only(hf_model: PreTrainedModel) -> list[str]:
    """Freezes every parameter but the projector's.

    Args:
        hf_model: a loaded Hugging Face model of a supported class.

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
    return trainable


def initialise_anew(projector: nn.Module) -> None:
    """Gives a projector torch's own initial weights, in place, drawn by torch's seed as it stands; norms get ones."""
    for module in projector.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
        elif "weight" in dict(module.named_parameters(recurse=False)):  # Hugging Face's RMS norm has no such method
            nn.init.ones_(module.get_parameter("weight"))
