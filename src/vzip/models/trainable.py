"""What transformers' ``Trainer`` asks of a model beside its ``forward``: that part of ``CompressedVlm``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vzip.compressors.base import Compressor
from vzip.errors import CheckpointError, ConfigError

from .families import Adapter
from .freeze import zero_of
from .hub import public_name
from .weights.digests import DIGESTS_NAME
from .weights.tuned import HEADER_NAME, WEIGHTS_NAME, describe, save_tuned


class TrainerModel(nn.Module):
    """Answers as the wrapped model does, and keeps of it what trains; see ``CompressedVlm`` for the attributes."""

    adapter: Adapter
    model: PreTrainedModel
    compressor: Compressor
    name_or_path: str
    revision: str | None
    lora: dict[str, str] | None
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # num_items_in_batch: the target tokens of a whole step

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_do_not_miss_frozen)

    @property
    def config(self) -> Any:
        """The wrapped model's."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The wrapped model's."""
        return self.model.generation_config

    @property
    def loss_type(self) -> Any:
        """The wrapped model's: by it ``Trainer`` knows that labels are shifted."""
        return getattr(self.model, "loss_type", None)

    def can_generate(self) -> bool:
        """True: ``generate``."""
        return True

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed anew in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the wrapped model's: activations are computed anew in the backward pass."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """As the wrapped model's."""
        self.model.gradient_checkpointing_disable()

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As the wrapped model's, in the versions of transformers that call ``gradient_checkpointing_enable`` so."""
        self.model.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """As the wrapped model's."""
        self.model.activation_checkpointing_disable()

    def add_model_tags(self, tags: Any) -> None:
        """As the wrapped model's, which a trainer's card of its own has."""
        self.model.add_model_tags(tags)

    def save_pretrained(self, directory: str | Path, is_main_process: bool = True, **_: Any) -> None:
        """Writes the trained projector, as ``train.py`` does: ``load_vlm(projector=directory)`` reads it.

        The base model is not written; ``vzip merge`` and ``vzip push`` take the directory.

        Args:
            directory: new, or one that this has written before.
            is_main_process: of several that train together one writes.
            **_: what Hugging Face's ``save_pretrained`` takes beside.

        Raises:
            ConfigError: something else trains than the projector.
            CheckpointError: the directory holds other files, or cannot be written.
        """
        if not is_main_process:
            return
        projector = {id(parameter) for parameter in self.adapter.projector.parameters()}
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        others = [name for name, parameter in trained.items() if id(parameter) not in projector]
        if others or not trained:
            what = (
                f"{len(others)} parameters beside the projector's train, as {others[0]}" if others else "nothing trains"
            )
            raise ConfigError(
                f"save_pretrained({str(directory)!r}): writes a tuned projector alone, but {what}. Freeze the rest"
                " before training (vzip.train_projector_only(vlm.model)); a whole model is written by"
                " vlm.model.save_pretrained, LoRA layers by PEFT's."
            )
        target = Path(directory)
        ours = {HEADER_NAME, WEIGHTS_NAME, DIGESTS_NAME}
        if target.name in ("", ".."):  # it is renamed into place
            raise CheckpointError(f"save_pretrained({str(directory)!r}): name a new directory, as 'tuned'.")
        if target.exists() and (not target.is_dir() or {path.name for path in target.iterdir()} - ours):
            raise CheckpointError(f"save_pretrained({str(directory)!r}): holds other files; name a new directory.")
        name = public_name(self.name_or_path)
        header = describe(self.adapter, self.compressor, name, self.revision, ["projector"], self.lora)
        save_tuned(target, {name: p.detach().float() for name, p in trained.items()}, header)

    def _nothing_trained(self) -> Tensor | None:
        """Zero that depends on the projector: in training a batch of text must give it a gradient. None: not needed."""
        projector = self.adapter.projector
        if not (self.training and torch.is_grad_enabled() and any(p.requires_grad for p in projector.parameters())):
            return None
        return zero_of(projector, self.adapter.least_projected)


def _frozen(module: nn.Module) -> set[str]:
    """Names of the parameters that do not train beside some that do, and of what is kept with them (buffers)."""
    trains = {name: p.requires_grad for name, p in module.named_parameters(remove_duplicate=False)}
    if all(trains.values()) or not any(trains.values()):
        return set()
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name for name, does in trains.items() if not does} | buffers


def _leave_out_frozen(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name in _frozen(module):
        state_dict.pop(prefix + name, None)


def _do_not_miss_frozen(module: nn.Module, incompatible_keys: Any) -> None:
    frozen, missing = _frozen(module), incompatible_keys.missing_keys
    missing[:] = [key for key in missing if not _is_one_of(key, frozen)]


def _is_one_of(key: str, names: set[str]) -> bool:
    """Whether a name, perhaps within a module around the model, is one of these."""
    parts = key.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))
