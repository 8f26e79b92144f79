"""Video-LLaVA in its authors' layout (``LanguageBind/Video-LLaVA-7B``): LLaVA's names, LanguageBind's two towers.

The towers are in the checkpoint, or beside it as ``LanguageBind_Image`` and ``LanguageBind_Video_merge``. The authors'
code always reads the latter; the towers are frozen in training, so both are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip import CLIPImageProcessor  # AutoImageProcessor of 5.17 insists on torchvision

from vzip.errors import UnsupportedModelError
from vzip.json_files import read_json

from ..original.checkpoint import OriginalCheckpoint, local_folder
from ..original.llava import with_rows
from ..original.names import LANGUAGE, after, apply, is_buffer, rename_clip
from ..original.tensors import renamed_tensors
from ..original.tokenizer import llama_tokenizer, vicuna_template
from .config import PublishedVideoLlavaConfig
from .modeling import PublishedVideoLlavaForConditionalGeneration
from .tower import CLIP_FRAMES

IMAGE_TOWER, VIDEO_TOWER = "model.image_tower.", "model.video_tower."
# Where each tower comes from, by the key that names it. The authors' code tells towers by their names' ends.
REPOSITORIES = {
    "mm_image_tower": "LanguageBind/LanguageBind_Image",
    "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
}
SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# What must be so, and what a missing key stands for in the authors' code.
_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_vision_select_feature": ("patch", "patch"),
    "mm_use_im_start_end": (False, False),
    "mm_use_im_patch_token": (False, True),
}
# Both towers are ViT-L/14 (constants of public ports); a tower's own config.json, where it is there, comes first.
_VIT_L: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "gelu",
}


class PublishedVideoLlava(OriginalCheckpoint):
    """A published checkpoint of Video-LLaVA."""

    family = "Video-LLaVA"
    towers: ClassVar[Mapping[str, str]] = {
        "mm_image_tower": "model.image_tower.image_tower.",
        "mm_video_tower": "model.video_tower.video_tower.",
    }

    def config(self) -> PublishedVideoLlavaConfig:
        needed = ("mm_image_tower", "mm_video_tower", "mm_vision_select_layer", "vocab_size", "hidden_size")
        self.check_fields(needed, _REQUIRED, "Video-LLaVA-7B and what is trained as it is")
        first = self.fields["vocab_size"]
        # Rows for two placeholders and the padding, up to a multiple of 64, as in the checkpoint of Hugging Face's.
        text = self.text_config(vocab_size=-(-(first + 3) // 64) * 64, pad_token_id=first + 2)
        return PublishedVideoLlavaConfig(
            vision_config=self._vision_config(),
            text_config=text,
            image_token_index=first,
            video_token_index=first + 1,
            vision_feature_layer=self.fields["mm_vision_select_layer"],
            vision_feature_select_strategy="default",
            bos_token_id=text.bos_token_id,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.pad_token_id,
            architectures=[PublishedVideoLlavaForConditionalGeneration.__name__],
            dtype=self.fields.get("torch_dtype"),
        )

    def tensors(self, config: PublishedVideoLlavaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = renamed_tensors(self.own_files(), rename_checkpoint, self.family)
        for key, prefix in zip(REPOSITORIES, (IMAGE_TOWER, VIDEO_TOWER), strict=True):
            if not any(name.startswith(prefix) for name in tensors):
                tensors |= renamed_tensors(self.tower_files(key), partial(rename_clip, to=prefix), self.family)
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors and len(tensors[name]) == self.fields["vocab_size"]:
                tensors[name] = with_rows(tensors[name], config.text_config.vocab_size)
        return tensors

    def processor(self) -> LlavaProcessor:
        """CLIP's constants, which ``pixels`` reads, and the language model's tokenizer with both placeholders."""
        vision = self._vision_config()
        side = vision.image_size
        return LlavaProcessor(
            CLIPImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_mean=OPENAI_CLIP_MEAN,
                image_std=OPENAI_CLIP_STD,
            ),
            llama_tokenizer(self.source, self.fields["vocab_size"], ["<image>", "<video>"], "<pad>"),
            patch_size=vision.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=vicuna_template(SYSTEM_PROMPT, media=("image", "video")),
        )

    def _vision_config(self) -> CLIPVisionConfig:
        """Of both towers."""
        found = {}
        for key, repository in REPOSITORIES.items():
            name, own = str(self.fields[key]), repository.rpartition("/")[2]
            if Path(name).name != own:
                raise UnsupportedModelError(
                    f"{self.source}: {key}={name} in config.json; a folder called {own} is known there."
                )
            folder = local_folder(self.source, name, repository)
            if folder is not None and (folder / "config.json").is_file():
                given = read_json(folder / "config.json")
                given = given.get("vision_config", given)
                if (num_frames := given.get("num_frames", CLIP_FRAMES)) != CLIP_FRAMES and key == "mm_video_tower":
                    raise UnsupportedModelError(
                        f"{folder}: num_frames={num_frames} in config.json; clips of {CLIP_FRAMES} frames are known."
                    )
                found[key] = {name: value for name, value in given.items() if name in CLIPVisionConfig().to_dict()}
        configs = [CLIPVisionConfig(**{n: given[n] for n in _VIT_L if n in given}) for given in found.values()]
        if len(configs) == 2 and configs[0].to_dict() != configs[1].to_dict():
            raise UnsupportedModelError(
                f"{self.source}: {' and '.join(REPOSITORIES)} differ in their config.json; the class has one for both."
            )
        return configs[0] if configs else CLIPVisionConfig(**_VIT_L)


def find_published(directory: Path) -> PublishedVideoLlava | None:
    """The checkpoint if it is in its authors' layout, None for any other; raises ValueError for unreadable JSON."""
    fields = read_json(directory / "config.json")
    is_llava = str(fields.get("model_type")).startswith("llava") and "vision_config" not in fields
    return PublishedVideoLlava(directory, fields) if is_llava and fields.get("mm_video_tower") else None


def rename_checkpoint(name: str) -> str | None:
    """A name of the published checkpoint, which holds its towers; None for what is not a weight."""
    if is_buffer(name):
        return None
    for medium in ("image", "video"):
        if rest := after(name, f"model.{medium}_tower.{medium}_tower."):
            return f"model.{medium}_tower.{rest.removeprefix('vision_model.')}"
    return apply(LANGUAGE, name, name)
