"""LoRA layers that train beside the projector: put into a language model, written as PEFT's own checkpoint, read back.

What is written is a directory that PEFT and ``model.adapter_path`` load as well (see ``vzip.models.weights.lora``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vzip.errors import ConfigError, nearest

from ..families import Adapter

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, before the model's own names
_LAYER = re.compile(r"(.*\.lora_(?:A|B))\.default\.weight")  # Hugging Face's name for the first adapter: default
_SAVED = re.compile(r"(.*\.lora_(?:A|B))\.weight")


def is_lora(name: str) -> bool:
    """Whether a parameter of this name belongs to a LoRA layer."""
    return _LAYER.fullmatch(name) is not None


def peft_arguments(
    adapter: Adapter, r: int, alpha: float, dropout: float, target_modules: Sequence[str]
) -> dict[str, Any]:
    """The arguments of PEFT's ``LoraConfig``, held against the model.

    Args:
        adapter: of the model.
        r, alpha, dropout: rank, scale (the layers' output times alpha / r) and dropout at their input.
        target_modules: last names of the language model's linear layers, as ``q_proj``; the vision tower has layers
            of the same names, which are left alone.

    Raises:
        ConfigError: a name that no linear layer of the language model has.
    """
    language_model = adapter.language_model
    (path,) = [name for name, module in adapter.model.named_modules() if module is language_model]
    linear = {name.split(".")[-1] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)}
    for name in target_modules:
        if name not in linear:
            raise ConfigError(
                f"train.lora.target_modules names {name}, but the language model of {type(adapter.model).__name__} has"
                f" no linear layer of that name{nearest(name, linear)}; it has {', '.join(sorted(linear))}."
            )
    pattern = rf"{re.escape(path)}\..*\.({'|'.join(map(re.escape, target_modules))})"
    return {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": pattern}


def add_lora(adapter: Adapter, arguments: Mapping[str, Any]) -> list[nn.Parameter]:
    """Puts new LoRA layers into the language model, which at first change nothing; returns their parameters.

    PEFT freezes everything else: choose what trains afterwards.
    """
    from peft import LoraConfig  # only here: what trains or loads no LoRA does without the package

    adapter.model.add_adapter(LoraConfig(**arguments))
    return [parameter for name, parameter in adapter.model.named_parameters() if is_lora(name)]


def write_lora(directory: Path, tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], base: str) -> None:
    """Writes a PEFT checkpoint into a new directory.

    Args:
        directory: made here.
        tensors: the layers' weights under the model's own names.
        arguments: as ``peft_arguments`` gave them.
        base: name or path of the model that they belong to.
    """
    from peft import LoraConfig

    directory.mkdir()
    config = LoraConfig(**arguments, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(directory))
    saved = {_PREFIX + _LAYER.sub(r"\1.weight", name): tensor for name, tensor in tensors.items()}
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in saved.items()},
        directory / WEIGHTS_NAME,
        metadata={"format": "pt"},
    )


def read_lora(directory: Path) -> dict[str, Tensor]:
    """What ``write_lora`` wrote, under the model's own names."""
    saved = load_file(directory / WEIGHTS_NAME)
    return {_SAVED.sub(r"\1.default.weight", name.removeprefix(_PREFIX)): tensor for name, tensor in saved.items()}
