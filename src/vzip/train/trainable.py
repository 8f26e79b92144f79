"""Which parts of a model train, said out loud and counted; everything else is frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from vzip.errors import ConfigError
from vzip.models.compressed_vlm import CompressedVlm
from vzip.models.freeze import train_projector_only

from .settings import TrainSettings


def module_of(vlm: CompressedVlm, part: str) -> list[nn.Module]:
    """The modules of a part of the model; the language model's head is part of it."""
    adapter = vlm.adapter
    if part == "projector":
        return [adapter.projector]
    if part == "vision_tower":
        return [adapter.vision_tower]
    return [adapter.language_model, adapter.model.get_output_embeddings()]


def choose_trainable(vlm: CompressedVlm, settings: TrainSettings, in_float32: bool) -> str:
    """Freezes everything but the parts that train; returns the report that is printed.

    Args:
        vlm: the model, loaded.
        settings: ``parts`` and ``reset_projector``.
        in_float32: keep the trained weights in float32 beside a half-precision model. DeepSpeed keeps its own float32
            copies instead, and wants one precision.

    Raises:
        UnsupportedModelError: a projector that cannot train.
        ConfigError: a part whose weights are quantised.
    """
    train_projector_only(vlm.model)
    if settings.reset_projector:
        for module in vlm.adapter.projector.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
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


def report(vlm: CompressedVlm) -> str:
    """One line: what trains, what is frozen, in numbers of parameters."""
    adapter = vlm.adapter
    parts = {"projector": adapter.projector, "vision tower": adapter.vision_tower}
    counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in parts.items()}
    trained = num_trainable(vlm)
    counts["language model"] = trained - sum(counts.values())
    total = sum(parameter.numel() for parameter in vlm.model.parameters())
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"training {trained:,} of {total:,} parameters ({shown}); the rest is frozen"


def num_trainable(vlm: CompressedVlm) -> int:
    """Parameters that train."""
    return sum(parameter.numel() for parameter in vlm.model.parameters() if parameter.requires_grad)


def parameter_groups(vlm: CompressedVlm, settings: TrainSettings) -> list[dict[str, Any]]:
    """The optimizer's groups: ``params``, and their ``peak`` learning rate."""
    tower = {id(parameter) for parameter in vlm.adapter.vision_tower.parameters()}
    trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in tower], "peak": settings.learning_rate},
        {
            "params": [p for p in trained if id(p) in tower],
            "peak": settings.learning_rate if settings.tower_learning_rate is None else settings.tower_learning_rate,
        },
    ]
    return [group for group in groups if group["params"]]
