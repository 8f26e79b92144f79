"""Models and processors that come from no checkpoint: a family's parts put together, in any size.

For shapes to measure, for small models to try commands on, and for tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    VideoLlavaConfig,
)

from ..families import adapter_class_for_config
from ..families.internvl.processing import InternVlImageTextProcessor
from ..families.mini_gemini import MiniGeminiConfig
from ..families.qwen2_5_vl.processing import Qwen2_5VlImageTextProcessor
from ..families.video_llava.config import PublishedVideoLlavaConfig
from ..towers.structure import geometry_from_config

CONFIGS: dict[str, Any] = {
    "llava": LlavaConfig,
    "llava_next": LlavaNextConfig,
    "llava_onevision": LlavaOnevisionConfig,
    "video_llava": VideoLlavaConfig,
    "video_llava_published": PublishedVideoLlavaConfig,
    "mini_gemini": MiniGeminiConfig,
}
QWEN2_5_VL, QWEN3_VL, INTERNVL = "qwen2_5_vl", "qwen3_vl", "internvl"
FAMILIES = (*CONFIGS, QWEN2_5_VL, QWEN3_VL, INTERNVL)
QWEN_CONFIGS = (Qwen2_5_VLConfig, Qwen3VLConfig)


def family_config(
    family: str,
    vision_config: Any,
    text_config: Any,
    image_token_id: int,
    select_layer: Any = -2,
    select_strategy: str = "default",
    **of_family: Any,
) -> Any:
    """The Hugging Face configuration of a family with a CLIP or SigLIP tower.

    Args:
        family: one of ``CONFIGS``.
        vision_config: of the vision tower (of both, in Video-LLaVA).
        text_config: of the language model.
        image_token_id: id of the placeholder.
        select_layer: the tower's layer that is read, as ``config.vision_feature_layer``.
        select_strategy: ``default`` (CLS is cut off) or ``full``.
        **of_family: what one family has beyond that (``image_grid_pinpoints``, ``video_token_index``,
            ``high_res_config``, ``high_res_image_size``).
    """
    return CONFIGS[family](
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=image_token_id,
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=select_strategy,
        **of_family,
    )


def qwen2_5_vl_config(text: Mapping[str, Any], vision: Mapping[str, Any], ids: Mapping[str, int]) -> Any:
    """Qwen2.5-VL's configuration, with its positions in three axes.

    Args:
        text: of the language model; its heads are divided among the axes as in the published checkpoints, 16 : 24 : 24.
        vision: of the vision tower.
        ids: of the special tokens, by Hugging Face's names (``image_token_id``, ...).
    """
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    spatial = half * 24 // 64
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * spatial, spatial, spatial]}
    settings = {"text_config": {**text, "rope_parameters": rope}, "vision_config": dict(vision)}
    return Qwen2_5_VLConfig(**settings, **ids, tie_word_embeddings=text.get("tie_word_embeddings", False))


def qwen3_vl_config(text: Mapping[str, Any], vision: Mapping[str, Any], ids: Mapping[str, int]) -> Any:
    """Qwen3-VL's; as ``qwen2_5_vl_config``, the heads divided 24 : 20 : 20, with ``head_dim`` in ``text``."""
    half = text["head_dim"] // 2
    spatial = half * 20 // 64
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [half - 2 * spatial, spatial, spatial],
        "mrope_interleaved": True,
    }
    settings = {"text_config": {**text, "rope_parameters": rope}, "vision_config": dict(vision)}
    return Qwen3VLConfig(**settings, **ids, tie_word_embeddings=text.get("tie_word_embeddings", False))


def internvl_config(text: Mapping[str, Any], vision: Mapping[str, Any], image_token_id: int) -> Any:
    """InternVL3's, with Qwen2.5's language model; arguments as for ``qwen2_5_vl_config``."""
    config = InternVLConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config=dict(vision),
        image_token_id=image_token_id,
        tie_word_embeddings=text.get("tie_word_embeddings", False),
    )
    config.image_seq_length = geometry_from_config(config.vision_config).shape().num_units
    return config


def pinpoints(side: int) -> list[list[int]]:
    """LLaVA-NeXT's resolutions (height, width) as the published checkpoints have them, for crops of ``side`` pixels."""
    return [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side], [side, 3 * side]]


def new_model(config: Any) -> PreTrainedModel:
    """The model of a configuration with Hugging Face's random weights, float32, in training mode."""
    return adapter_class_for_config(config).model_class(config)


def image_side(config: Any) -> int:
    """Side in pixels of the square images (crops, frames) that the model of a configuration takes."""
    own = config.to_dict()
    side = own.get("high_res_image_size") or own.get("vision_config", own)["image_size"]
    return side if isinstance(side, int) else side[0]


def new_image_processor(config: Any) -> Any:
    """The image processor for a configuration (a family's, or a vision tower's alone), with CLIP's constants."""
    # Here, because they warn about torchvision when they are imported; and AutoImageProcessor of 5.17 insists on it.
    from transformers import LlavaNextImageProcessor, LlavaOnevisionImageProcessor, VideoLlavaImageProcessor
    from transformers.models.clip import CLIPImageProcessor

    if isinstance(config, QWEN_CONFIGS):
        from transformers.models.qwen2_vl import Qwen2VLImageProcessor

        vision = config.vision_config
        settings: dict[str, Any] = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        if isinstance(config, Qwen3VLConfig):  # as its checkpoints' own
            settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
            settings["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
        return Qwen2VLImageProcessor(**settings)
    side = image_side(config)
    if isinstance(config, InternVLConfig):
        from transformers.models.got_ocr2 import GotOcr2ImageProcessor

        return GotOcr2ImageProcessor(
            size={"height": side, "width": side}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
        )
    sides: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if isinstance(config, LlavaNextConfig):
        return LlavaNextImageProcessor(**sides, image_grid_pinpoints=config.image_grid_pinpoints)
    if isinstance(config, LlavaOnevisionConfig):  # constants of its checkpoints
        square, constants = {"height": side, "width": side}, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        resolutions = config.image_grid_pinpoints
        return LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=resolutions, **constants)
    return VideoLlavaImageProcessor(**sides) if isinstance(config, VideoLlavaConfig) else CLIPImageProcessor(**sides)


def new_processor(
    config: Any, tokenizer: PreTrainedTokenizerBase, chat_template: str, image_processor: Any = None
) -> Any:
    """The processor for a family's configuration.

    Args:
        config: from ``family_config``.
        tokenizer: with the placeholders.
        chat_template: Jinja.
        image_processor: None: a new one for the configuration.
    """
    if isinstance(config, QWEN_CONFIGS):
        return Qwen2_5VlImageTextProcessor(image_processor or new_image_processor(config), tokenizer, chat_template)
    if isinstance(config, InternVLConfig):
        return InternVlImageTextProcessor(image_processor or new_image_processor(config), tokenizer, chat_template)
    kind = LlavaNextProcessor if isinstance(config, LlavaNextConfig) else LlavaProcessor
    geometry = geometry_from_config(config.vision_config)
    return kind(
        image_processor or new_image_processor(config),
        tokenizer,
        patch_size=image_side(config) // geometry.grid[0],  # pixels of the image for each visual token
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(geometry.has_cls),
        chat_template=chat_template,
    )
