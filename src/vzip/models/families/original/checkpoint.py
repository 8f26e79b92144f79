"""What a reader of a checkpoint in its authors' layout is: configuration, model and processor of one directory."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import LlamaConfig

from vzip.errors import CheckpointError, UnsupportedModelError

from ...hub import Checkpoint, is_hub_id
from .tensors import CHECKPOINT_FILES, names_in, weight_files

# Where a tower comes from, by the folder's name in the published config.json (JIA-Lab-research/MGM issue 51).
HUB_IDS = {
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": (
        "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    ),
}
# Commits that public repositories pin (found by search on 2026-11-21); the second one with MGM's own names.
HUB_REVISIONS = {
    "openai/clip-vit-large-patch14-336": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup": "39918dfbdf69ccd2172e6510a430e92337ee23e1",
}
# ``image_aspect_ratio`` of a configuration whose images are not padded: the short side is resized, the centre cut out.
CROPPED = "square"
_TOWER_OWNERS = ("openai/", "laion/", "LanguageBind/")
_WHOLE = {"vocab_size", "hidden_size", "num_hidden_layers", "mm_vision_select_layer"}
_WHOLE |= {"mm_hidden_size_aux", "image_size_aux"}
_NOT_OF_TEXT = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class OriginalCheckpoint(ABC):
    """A checkpoint in its authors' layout, its ``config.json`` read, its weights untouched.

    Attributes:
        source: its directory.
        fields: its ``config.json``.
        family: its name, for messages.
        towers: the keys of ``config.json`` that name its vision towers, and the beginning of the names that a tower's
            tensors have where they are in the checkpoint itself.
    """

    source: Path
    fields: Mapping[str, Any]
    family: ClassVar[str]
    towers: ClassVar[Mapping[str, str]] = {"mm_vision_tower": "model.vision_tower.vision_tower."}

    @abstractmethod
    def config(self) -> Any:
        """The configuration of the model's class, as far as it is known before weights are read.

        Raises:
            CheckpointError: a tower that is nowhere.
            UnsupportedModelError: a setting that the class does not have.
        """

    @abstractmethod
    def tensors(self, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights by the names of the model's class; those that must be computed are in ``dtype``.

        Raises:
            CheckpointError: files or tensors that are missing or have no place.
        """

    @abstractmethod
    def processor(self) -> Any:
        """Images and prompts as the authors' scripts make them; raises CheckpointError."""

    def files(self) -> list[Path]:
        """All files that decide its weights, wherever they are: its own first, then those of towers beside it.

        Raises:
            CheckpointError: files that are missing.
        """
        own = self.own_files()
        inside = [name for file in own for name in names_in(file)]
        beside = [key for key, start in self.towers.items() if not any(name.startswith(start) for name in inside)]
        return [*own, *(file for key in beside for file in self.tower_files(key))]

    def own_files(self) -> list[Path]:
        """Those of ``files`` that hold no tower, or one inside."""
        return weight_files(self.source, CHECKPOINT_FILES)

    def tower_files(self, key: str) -> list[Path]:
        """The weights of a tower beside it."""
        return weight_files(self.folder_of(key, weights=True), CHECKPOINT_FILES)

    def tokenizer_folder(self) -> Path:
        """The directory with its tokenizer's files, where there are any."""
        return self.source

    def load(self, model_class: Any, config: Any, **settings: Any) -> Any:
        """What ``from_pretrained`` of the class returns.

        Args:
            model_class: a class of Hugging Face's kind for ``config``.
            config: from ``config``.
            **settings: of ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config``, ...).

        Raises:
            CheckpointError: files or tensors that are missing, unexpected or of another size than the configuration
                says; each one is named.
        """
        config, dtype = copy.deepcopy(config), settings.get("dtype")
        own = getattr(torch, str(self.fields.get("torch_dtype", "float32")), torch.float32)
        tensors = self.tensors(config, dtype if isinstance(dtype, torch.dtype) else own)
        check_tensors(self.source, tensors, config, model_class, self.family)
        loaded = model_class.from_pretrained(
            None, config=config, state_dict=tensors, trust_remote_code=False, **settings
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(self.source)
        return loaded

    def text_config(self, kind: type[Any] = LlamaConfig, **changes: Any) -> Any:
        """The language model's part of the flat ``config.json``."""
        known = {*kind().to_dict(), "rope_theta", "rope_scaling"} - _NOT_OF_TEXT
        return kind(**{key: value for key, value in self.fields.items() if key in known} | changes)

    def check_fields(self, needed: Sequence[str], required: Mapping[str, tuple[Any, Any]], served: str) -> None:
        """Refuses settings that cannot be served, all at once.

        Args:
            needed: keys that must be there.
            required: the value that a key must have, and the one that a missing key stands for in the authors' code.
            served: what is, for messages.

        Raises:
            CheckpointError: keys that are missing.
            UnsupportedModelError: other values.
        """
        absent = [key for key in needed if self.fields.get(key) is None]
        if absent:
            raise CheckpointError(f"{self.source}: config.json has no {', '.join(absent)}, which {self.family} needs.")
        told = [
            f"{key}={self.fields[key]!r:.80} in config.json; a whole number is read"
            for key in needed
            if key in _WHOLE and type(self.fields[key]) is not int
        ]
        for key, (wanted, default) in required.items():
            if (value := self.fields.get(key, default)) != wanted:
                missing = "" if key in self.fields else " (what a missing key stands for)"
                told.append(f"{key}={value!r}{missing} in config.json; only {wanted!r} is supported")
        if told:
            raise UnsupportedModelError(f"{self.source}: {'; '.join(told)} ({served}).")

    def folder_of(self, key: str, weights: bool = False) -> Path:
        """The directory of the tower that ``config.json`` names under ``key``; a hub's has weights if they are wanted.

        Raises:
            CheckpointError: it is nowhere.
        """
        name = str(self.fields[key])
        what = f"the vision tower {key}={name} of its config.json"
        return find_folder(self.source, name, what, tower_hub_id(name), weights)


def tower_hub_id(name: str) -> str | None:
    """The repository of a vision tower that a ``config.json`` names; None: not known."""
    published = is_hub_id(name) and name.startswith(_TOWER_OWNERS)
    return HUB_IDS.get(Path(name).name) or (name if published else None)


def local_folder(source: Path, name: str, hub_id: str | None = None) -> Path | None:
    """The directory that a checkpoint names, if it is on this machine.

    It is looked for as it is named: from the working directory, from the checkpoint and from every folder above it;
    then by its own name, or by its repository's, in the checkpoint and next to it.
    """
    base, own = source.resolve(), Path(name).name
    places = [Path(name), *(folder / name for folder in (base, *base.parents))]
    names = (own, (hub_id or own).rpartition("/")[2])
    places += [folder / each for folder in (base, base.parent) for each in names]
    return next((place for place in places if place.is_dir() and place.resolve() != base), None)


def find_folder(source: Path, name: str, what: str, hub_id: str | None, weights: bool = False) -> Path:
    """The directory of another model that a checkpoint needs, on this machine or fetched from the hub.

    Args:
        source: the checkpoint.
        name: as it names the other.
        what: the same, for messages.
        hub_id: the other's repository; None: not known.
        weights: whether weights are needed from the hub.

    Raises:
        CheckpointError: it is nowhere.
    """
    if (folder := local_folder(source, name, hub_id)) is not None:
        return folder
    nowhere = f"{source}: {what} is in none of the folders around it"
    beside = f"Put it beside the checkpoint, in a folder called {Path(name).name}."
    if hub_id is None:
        raise CheckpointError(f"{nowhere}. {beside}")
    try:
        checkpoint = Checkpoint(hub_id, HUB_REVISIONS.get(hub_id))
        return checkpoint.fetch_weights() if weights else checkpoint.directory
    except CheckpointError as error:
        raise CheckpointError(f"{nowhere}, and {error} {beside}") from error


def check_tensors(
    source: Path, tensors: Mapping[str, Tensor], config: Any, model_class: type[Any], family: str
) -> None:
    """Raises CheckpointError unless the tensors are exactly those of a model with this configuration."""
    with torch.device("meta"):
        wanted = model_class(copy.deepcopy(config)).state_dict()
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - wanted.keys()),
        "of another size": sorted(
            f"{name} {tuple(tensors[name].shape)} for {tuple(wanted[name].shape)}"
            for name in wanted.keys() & tensors.keys()
            if tensors[name].shape != wanted[name].shape
        ),
    }
    told = [
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if told:
        raise CheckpointError(
            f"{source}: the tensors are not those of the {family} its config.json describes: {'; '.join(told)}. The"
            " checkpoint or a vision tower is damaged, or belongs to another architecture."
        )
