"""Mini-Gemini as it is published (``YanweiLi/MGM-7B``): MGM's weight names, its two vision towers beside it.

The mgm package is not needed. ``config.json`` names the towers by where they lay when the model was trained
(``model_zoo/OpenAI/...``). They are looked for there, seen from the working directory, from the checkpoint and from
every folder above it, then next to the checkpoint, and last on the hub.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig, LlavaProcessor, PreTrainedConfig

from vzip.errors import CheckpointError, UnsupportedModelError

from ...hub import Checkpoint
from .config import MiniGeminiConfig
from .modeling import MiniGeminiForConditionalGeneration
from .names import HIGH_RES, LOW_RES, rename_checkpoint, rename_clip, rename_openclip
from .processing import build_processor
from .tensors import CHECKPOINT_FILES, OPENCLIP_FILES, renamed_tensors, weight_files

MODEL_TYPES = ("mgm", "mini_gemini")  # the second: checkpoints from before the code was renamed
# Where each tower comes from, by the folder's name in the published config.json (JIA-Lab-research/MGM issue 51).
HUB_IDS = {
    "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    "openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": (
        "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    ),
}
# The towers' commits that public repositories pin (found by search on 2026-11-21); the second one with MGM's own names.
HUB_REVISIONS = {
    "openai/clip-vit-large-patch14-336": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1",
    "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup": "39918dfbdf69ccd2172e6510a430e92337ee23e1",
}
# What must be so, and what a missing key stands for in MGM's code.
_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_vision_select_feature": ("patch", "patch"),
    "image_grid": (1, 1),
    "image_global": (False, False),
    "mm_use_im_start_end": (False, False),
    "mm_use_im_patch_token": (False, True),
}
_NOT_OF_LLAMA = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published checkpoint, its ``config.json`` read and checked, its weights untouched.

    Attributes:
        source: its directory.
        fields: its ``config.json``.
    """

    source: Path
    fields: Mapping[str, Any]

    def config(self) -> MiniGeminiConfig:
        """The configuration; the depths of the high-resolution tower are ``convnext_large``'s until weights are read.

        Raises:
            CheckpointError: a tower that is nowhere.
            UnsupportedModelError: a setting that this class does not have.
        """
        self._check_fields()
        known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - _NOT_OF_LLAMA
        text = LlamaConfig(**{key: value for key, value in self.fields.items() if key in known})
        narrowest = self.fields["mm_hidden_size_aux"] // 15
        return MiniGeminiConfig(
            vision_config=CLIPVisionConfig.from_pretrained(self._tower("mm_vision_tower")),
            text_config=text,
            high_res_config=ConvNextConfig(
                depths=[3, 3, 27, 3], hidden_sizes=[narrowest * factor for factor in (1, 2, 4, 8)]
            ),
            high_res_image_size=self.fields["image_size_aux"],
            image_token_index=text.vocab_size,  # the placeholder is no word of the language model's
            vision_feature_layer=self.fields["mm_vision_select_layer"],
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            architectures=[MiniGeminiForConditionalGeneration.__name__],
            dtype=self.fields.get("torch_dtype"),
        )

    def load(self, config: MiniGeminiConfig, **settings: Any) -> Any:
        """What ``MiniGeminiForConditionalGeneration.from_pretrained`` returns.

        Args:
            config: from ``config``.
            **settings: of ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config``, ...).

        Raises:
            CheckpointError: files or tensors that are missing, unexpected or of another size than the configuration
                says; each one is named.
        """
        tensors = self._tensors()
        config = copy.deepcopy(config)
        config.high_res_config.depths = _depths(tensors)
        _check_tensors(self.source, tensors, config)
        loaded = MiniGeminiForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=tensors, trust_remote_code=False, **settings
        )
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(self.source)
        return loaded

    def processor(self) -> LlavaProcessor:
        """See ``processing.build_processor``."""
        return build_processor(
            self.source,
            self._tower("mm_vision_tower"),
            self.fields["image_size_aux"],
            self.fields["vocab_size"],
        )

    def _check_fields(self) -> None:
        needed = ("mm_vision_tower", "mm_vision_tower_aux", "mm_hidden_size_aux", "image_size_aux", "vocab_size")
        absent = [key for key in (*needed, "mm_vision_select_layer") if self.fields.get(key) is None]
        if absent:
            raise CheckpointError(f"{self.source}: config.json has no {', '.join(absent)}, which Mini-Gemini needs.")
        for key, (wanted, default) in _REQUIRED.items():
            if (value := self.fields.get(key, default)) != wanted:
                raise UnsupportedModelError(
                    f"{self.source}: {key}={value!r} in config.json; only {wanted!r} is supported (MGM-7B, MGM-13B; not"
                    " the HD models, which cut an image into crops)."
                )
        channels = self.fields["mm_hidden_size_aux"]
        if channels % 15:
            raise UnsupportedModelError(
                f"{self.source}: mm_hidden_size_aux={channels} in config.json; the four stages of a ConvNeXt are 1, 2,"
                " 4 and 8 times as wide as the first, so it must be a multiple of 15 (convnext_large: 2880)."
            )

    def _tensors(self) -> dict[str, Tensor]:
        """All weights by their new names; towers inside the checkpoint come before those beside it, as in MGM."""
        tensors = renamed_tensors(weight_files(self.source, CHECKPOINT_FILES), rename_checkpoint)
        if not any(name.startswith(LOW_RES) for name in tensors):
            tower = self._tower("mm_vision_tower", weights=True)
            tensors |= renamed_tensors(weight_files(tower, CHECKPOINT_FILES), rename_clip)
        if not any(name.startswith(HIGH_RES) for name in tensors):
            tower = self._tower("mm_vision_tower_aux", weights=True)
            tensors |= renamed_tensors(weight_files(tower, OPENCLIP_FILES), rename_openclip)
        return tensors

    def _tower(self, key: str, weights: bool = False) -> Path:
        """The directory of the tower that ``config.json`` names under ``key``; a hub's has weights if they are wanted.

        Raises:
            CheckpointError: it is nowhere.
        """
        name = Path(self.fields[key])
        base = self.source.resolve()
        hub_name = HUB_IDS.get(name.name, name.name).rpartition("/")[2]
        places = [name, *(folder / name for folder in (base, *base.parents))]
        places += [folder / own for folder in (base, base.parent) for own in (name.name, hub_name)]
        for place in places:
            if place.is_dir():
                return place
        hub_id = HUB_IDS.get(name.name)
        nowhere = f"{self.source}: the vision tower {key}={name} of its config.json is in none of the folders around it"
        if hub_id is None:
            raise CheckpointError(f"{nowhere}. Put it beside the checkpoint, in a folder called {name.name}.")
        try:
            checkpoint = Checkpoint(hub_id, HUB_REVISIONS[hub_id])
            return checkpoint.fetch_weights() if weights else checkpoint.directory
        except CheckpointError as error:
            raise CheckpointError(
                f"{nowhere}, and {error} Put it beside the checkpoint, in a folder called {name.name}."
            ) from error


def find_published(source: Path) -> PublishedCheckpoint | None:
    """The checkpoint if it is in MGM's layout, None for any other; raises what Hugging Face raises for bad files."""
    fields, _ = PreTrainedConfig.get_config_dict(source)
    if fields.get("model_type") not in MODEL_TYPES or "mm_vision_tower" not in fields:
        return None
    return PublishedCheckpoint(source, fields)


def _depths(tensors: Mapping[str, Tensor]) -> list[int]:
    """Blocks in each stage of the high-resolution tower, counted from the names of its weights."""
    pattern = re.compile(re.escape(HIGH_RES) + r"stages\.(\d+)\.layers\.(\d+)\.")
    depths = [0, 0, 0, 0]
    for name in tensors:
        if (match := pattern.match(name)) and int(match[1]) < len(depths):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    return depths


def _check_tensors(source: Path | str, tensors: dict[str, Tensor], config: MiniGeminiConfig) -> None:
    """Raises CheckpointError unless the tensors are exactly those of a model with this configuration."""
    with torch.device("meta"):
        wanted = MiniGeminiForConditionalGeneration(copy.deepcopy(config)).state_dict()
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
            f"{source}: the tensors are not those of the Mini-Gemini its config.json describes: {'; '.join(told)}. The"
            " checkpoint or a vision tower is damaged, or belongs to another architecture."
        )
