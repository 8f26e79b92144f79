"""Which parts of a model train, said out loud and counted; everything else is frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vzip.compressors.base import check_reads_no_text
from vzip.errors import ConfigError
from vzip.models.freeze import initialise_anew, train_projector_only
from vzip.models.sharing import check_shares
from vzip.models.vlm import CompressedVlm
from vzip.models.weights.lora_training import add_lora, is_lora, peft_arguments

from .settings import LaunchSettings, TrainSettings


def module_of(vlm: CompressedVlm, part: str) -> list[nn.Module]:
    """The modules of a part of the model; the language model's head is part of it."""
    adapter = vlm.adapter
    if part == "projector":
        return [adapter.projector]
    if part == "vision_tower":
        return [adapter.vision_tower]
    return [adapter.language_model, adapter.model.get_output_embeddings()]


def prepare_training(vlm: CompressedVlm, settings: TrainSettings, launch: LaunchSettings) -> str:
    """Chooses what trains and how it is kept, and checkpoints gradients; returns and raises as ``choose_trainable``."""
    line = choose_trainable(vlm, settings, in_float32=not launch.uses_deepspeed)
    if launch.gradient_checkpointing:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return line


def choose_trainable(vlm: CompressedVlm, settings: TrainSettings, in_float32: bool) -> str:
    """Freezes everything but the parts that train; returns the report that is printed.

    Args:
        vlm: the model, loaded.
        settings: ``parts``, ``reset_projector`` and ``lora``, whose layers are made here.
        in_float32: keep the trained weights in float32 beside a half-precision model. DeepSpeed keeps its own float32
            copies instead, and wants one precision.

    Raises:
        UnsupportedModelError: a projector that cannot train, a sliding window where images are shared.
        ConfigError: a template that the family has not, an attention without a mask for shared images, a part whose
            weights are quantised, or LoRA for layers that the language model does not have.
    """
    vlm.adapter.check_template(settings.template)
    check_reads_no_text(vlm.compressor, "a training encodes each image once for all its conversations")
    if settings.share_images:
        check_shares(vlm.model.config.get_text_config())
    arguments = lora_arguments(vlm, settings)
    # First, because PEFT freezes all that is not its own.
    lora = [] if arguments is None else add_lora(vlm.adapter, arguments)
    train_projector_only(vlm.model)
    for parameter in lora:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.to(getattr(torch, settings.precision))
    if settings.reset_projector:
        initialise_anew(vlm.adapter.projector)
    for part in settings.parts:
        for module in module_of(vlm, part):
            for parameter in module.parameters():
                if not parameter.is_floating_point():
                    raise ConfigError(
                        f"train.parts names {part}, whose weights are quantised and cannot train: set"
                        " model.quantization=null, or leave the part out."
                    )
                parameter.requires_grad_(True)
    if "projector" not in settings.parts:
        vlm.adapter.projector.requires_grad_(False)
    if in_float32:
        for parameter in vlm.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    vlm.train()
    if "vision_tower" not in settings.parts:
        vlm.adapter.vision_tower.eval()
    return report(vlm)


def lora_arguments(vlm: CompressedVlm, settings: TrainSettings) -> dict[str, Any] | None:
    """The arguments of PEFT's ``LoraConfig``, or None where the run trains no LoRA layers.

    Raises:
        ConfigError: a layer that the language model does not have.
    """
    lora = settings.lora
    if lora is None:
        return None
    return peft_arguments(vlm.adapter, lora.r, lora.alpha, lora.dropout, lora.target_modules)


def report(vlm: CompressedVlm) -> str:
    """One line: what trains, what is frozen, in numbers of parameters."""
    adapter = vlm.adapter
    parts = {"projector": [*adapter.projector.parameters()], "vision tower": tower_parameters(vlm)}
    counts = {name: sum(p.numel() for p in own if p.requires_grad) for name, own in parts.items()}
    trained = num_trainable(vlm)
    lora = [p for name, p in vlm.model.named_parameters() if is_lora(name) and p.requires_grad]
    counts["LoRA in the language model"] = sum(p.numel() for p in lora)
    counts["language model"] = trained - sum(counts.values())
    total = sum(parameter.numel() for parameter in vlm.model.parameters())
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"training {trained:,} of {total:,} parameters ({shown}); the rest is frozen"


def tower_parameters(vlm: CompressedVlm) -> list[nn.Parameter]:
    """The vision tower's, without the projector's, which some families have within it."""
    projector = {id(parameter) for parameter in vlm.adapter.projector.parameters()}
    return [parameter for parameter in vlm.adapter.vision_tower.parameters() if id(parameter) not in projector]


def num_trainable(vlm: CompressedVlm) -> int:
    """Parameters that train."""
    return sum(parameter.numel() for parameter in vlm.model.parameters() if parameter.requires_grad)


def parameter_groups(vlm: CompressedVlm, settings: TrainSettings) -> list[dict[str, Any]]:
    """The optimizer's groups: ``params``, and their ``peak`` learning rate."""
    tower = {id(parameter) for parameter in tower_parameters(vlm)}
    named = [(name, parameter) for name, parameter in vlm.model.named_parameters() if parameter.requires_grad]
    of_tower = [parameter for _, parameter in named if id(parameter) in tower]
    of_lora = [parameter for name, parameter in named if is_lora(name)]
    taken = {id(parameter) for parameter in (*of_tower, *of_lora)}
    usual, lora = settings.learning_rate, settings.lora
    groups = [
        {"params": [p for _, p in named if id(p) not in taken], "peak": usual},
        {"params": of_lora, "peak": usual if lora is None or lora.learning_rate is None else lora.learning_rate},
        {
            "params": of_tower,
            "peak": usual if settings.tower_learning_rate is None else settings.tower_learning_rate,
        },
    ]
    return [group for group in groups if group["params"]]
