"""Small random models of every family, with the pictures, patches and crops of the published ones.

They answer nonsense, but in the true class, through the true processor and with the true numbers of visual tokens, in
seconds and without a download: for trying commands, and for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VideoLlavaImageProcessor,
)
from transformers.models.clip import CLIPImageProcessor  # AutoImageProcessor of 5.17 insists on torchvision

from vzip.errors import ConfigError, RunExistsError, nearest
from vzip.models.mini_gemini import MiniGeminiConfig, MiniGeminiForConditionalGeneration

WIDTH, NUM_LAYERS, NUM_HEADS = 32, 4, 4
PATCH_SIZE, GRID = 14, 24
IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"
# The published checkpoints' tilings, of crops of 336 pixels.
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for item in message['content'] if item['type'] != 'text' %}<{{ item['type'] }}>\n{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class _Parts:
    """What every family is built from.

    Attributes:
        tokenizer: the built-in model's, with the placeholders.
        text: the language model's configuration.
        settings: of the vision tower's output, by Hugging Face's names, and the picture's placeholder.
    """

    tokenizer: PreTrainedTokenizerBase
    text: LlamaConfig
    settings: dict[str, Any]

    def id_of(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))


def vision_config(side: int) -> CLIPVisionConfig:
    """A narrow CLIP tower for square pictures of ``side`` pixels."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=side,
        patch_size=PATCH_SIZE,
    )


def _sides(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _layout(patch_size: int = PATCH_SIZE) -> dict[str, Any]:
    """Settings of a processor: how many placeholders it writes, and the chat template."""
    return {
        "patch_size": patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }


def _llava(parts: _Parts) -> tuple[Any, Any]:
    config = LlavaConfig(vision_config=vision_config(336), text_config=parts.text, **parts.settings)
    processor = LlavaProcessor(CLIPImageProcessor(**_sides(336)), parts.tokenizer, **_layout())
    return LlavaForConditionalGeneration(config), processor


def _llava_next(parts: _Parts) -> tuple[Any, Any]:
    config = LlavaNextConfig(
        vision_config=vision_config(336), text_config=parts.text, image_grid_pinpoints=PINPOINTS, **parts.settings
    )
    images = LlavaNextImageProcessor(**_sides(336), image_grid_pinpoints=PINPOINTS)
    return LlavaNextForConditionalGeneration(config), LlavaNextProcessor(images, parts.tokenizer, **_layout())


def _video_llava(parts: _Parts) -> tuple[Any, Any]:
    config = VideoLlavaConfig(
        vision_config=vision_config(224),
        text_config=parts.text,
        video_token_index=parts.id_of(VIDEO_TOKEN),
        **parts.settings,
    )
    processor = LlavaProcessor(VideoLlavaImageProcessor(**_sides(224)), parts.tokenizer, **_layout())
    return VideoLlavaForConditionalGeneration(config), processor


def _mini_gemini(parts: _Parts) -> tuple[Any, Any]:
    side = 768
    config = MiniGeminiConfig(
        vision_config=vision_config(336),
        text_config=parts.text,
        high_res_config=ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 1, 1]),
        high_res_image_size=side,
        **parts.settings,
    )
    processor = LlavaProcessor(CLIPImageProcessor(**_sides(side)), parts.tokenizer, **_layout(side // GRID))
    return MiniGeminiForConditionalGeneration(config), processor


_BUILDERS: dict[str, Callable[[_Parts], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "video_llava": _video_llava,
    "mini_gemini": _mini_gemini,
}
FAMILIES = tuple(_BUILDERS)


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model in eval mode, float32, and its processor.

    Args:
        family: one of ``FAMILIES``.
        seed: of the weights.

    Raises:
        ConfigError: another family.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family={family}: must be one of {', '.join(FAMILIES)}{nearest(family, FAMILIES)}.")
    parts = _parts()
    torch.manual_seed(seed)
    model, processor = _BUILDERS[family](parts)
    model.generation_config.update(eos_token_id=parts.text.eos_token_id, pad_token_id=parts.text.pad_token_id)
    return model.eval(), processor


def save(family: str, directory: Path, seed: int = 0) -> None:
    """Writes a checkpoint directory as ``save_pretrained`` does.

    Raises:
        ConfigError: another family.
        RunExistsError: the directory is there and not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunExistsError(f"{directory}: is there already and not empty; choose another directory.")
    model, processor = build(family, seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def _parts() -> _Parts:
    from vzip.models.load import resolve_checkpoint

    tokenizer = LlavaProcessor.from_pretrained(resolve_checkpoint("vzip/tiny")).tokenizer
    tokenizer.add_tokens([VIDEO_TOKEN], special_tokens=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        max_position_embeddings=32768,  # eighty frames without compression are 20560 tokens
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    settings = {
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    return _Parts(tokenizer, text, settings)
