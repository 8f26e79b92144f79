"""Mini-Gemini as it is published (``YanweiLi/MGM-7B``): MGM's weight names, its two vision towers beside it.

The mgm package is not needed. ``config.json`` names the towers by where they lay when the model was trained
(``model_zoo/OpenAI/...``). They are looked for there, seen from the working directory, from the checkpoint and from
every folder above it, then next to the checkpoint, and last on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, ConvNextConfig, LlavaProcessor, PreTrainedConfig

from vzip.errors import UnsupportedModelError

from ..original.checkpoint import OriginalCheckpoint
from ..original.names import rename_clip
from ..original.tensors import CHECKPOINT_FILES, renamed_tensors, weight_files
from .config import MiniGeminiConfig
from .modeling import MiniGeminiForConditionalGeneration
from .names import HIGH_RES, LOW_RES, rename_checkpoint, rename_openclip
from .processing import build_processor

MODEL_TYPES = ("mgm", "mini_gemini")  # the second: checkpoints from before the code was renamed
OPENCLIP_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
# What must be so, and what a missing key stands for in MGM's code.
_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_vision_select_feature": ("patch", "patch"),
    "image_grid": (1, 1),
    "image_global": (False, False),
    "mm_use_im_start_end": (False, False),
    "mm_use_im_patch_token": (False, True),
}


class PublishedCheckpoint(OriginalCheckpoint):
    """A published checkpoint of Mini-Gemini."""

    family = "Mini-Gemini"
    towers: ClassVar[Mapping[str, str]] = {
        "mm_vision_tower": "model.vision_tower.vision_tower.",
        "mm_vision_tower_aux": "model.vision_tower_aux.",
    }

    def config(self) -> MiniGeminiConfig:
        """The configuration; the depths of the high-resolution tower are ``convnext_large``'s until weights are read.

        Raises:
            CheckpointError: a tower that is nowhere.
            UnsupportedModelError: a setting that this class does not have.
        """
        self._check_fields()
        text = self.text_config()
        narrowest = self.fields["mm_hidden_size_aux"] // 15
        return MiniGeminiConfig(
            vision_config=CLIPVisionConfig.from_pretrained(self.folder_of("mm_vision_tower")),
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

    def processor(self) -> LlavaProcessor:
        """See ``processing.build_processor``."""
        return build_processor(
            self.source,
            self.folder_of("mm_vision_tower"),
            self.fields["image_size_aux"],
            self.fields["vocab_size"],
        )

    def _check_fields(self) -> None:
        needed = ("mm_vision_tower", "mm_vision_tower_aux", "mm_hidden_size_aux", "image_size_aux", "vocab_size")
        self.check_fields(
            (*needed, "mm_vision_select_layer"),
            _REQUIRED,
            "MGM-7B, MGM-13B; not the HD models, which cut an image into crops",
        )
        channels = self.fields["mm_hidden_size_aux"]
        if channels % 15:
            raise UnsupportedModelError(
                f"{self.source}: mm_hidden_size_aux={channels} in config.json; the four stages of a ConvNeXt are 1, 2,"
                " 4 and 8 times as wide as the first, so it must be a multiple of 15 (convnext_large: 2880)."
            )

    def tensors(self, config: MiniGeminiConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """Also tells ``config`` the depths of the high-resolution tower.

        Towers inside the checkpoint come before those beside it, as in MGM.
        """

        tensors = renamed_tensors(self.own_files(), rename_checkpoint, self.family)
        if not any(name.startswith(LOW_RES) for name in tensors):
            tensors |= renamed_tensors(self.tower_files("mm_vision_tower"), rename_clip, self.family)
        if not any(name.startswith(HIGH_RES) for name in tensors):
            tensors |= renamed_tensors(self.tower_files("mm_vision_tower_aux"), rename_openclip, self.family)
        config.high_res_config.depths = _depths(tensors)
        return tensors

    def tower_files(self, key: str) -> list[Path]:
        names = OPENCLIP_FILES if key == "mm_vision_tower_aux" else CHECKPOINT_FILES
        return weight_files(self.folder_of(key, weights=True), names)


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
