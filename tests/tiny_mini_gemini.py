"""A tiny random Mini-Gemini and what a processor returns for it, built from configuration objects."""

from __future__ import annotations

from typing import Any

import torch
from tests import tiny
from transformers import ConvNextConfig, LlavaProcessor

from vzip.models.families.mini_gemini import MiniGeminiConfig
from vzip.models.weights import from_config as fresh

SIDE = 128  # pixels: 32 x 32 features, a window of 4 x 4 for each of 8 x 8 patches


def config(select_layer: int = -2, vocab_size: int = 64) -> MiniGeminiConfig:
    """A 64-patch CLIP tower, a four-stage ConvNeXt of 60 channels, a two-layer Llama."""
    return fresh.family_config(
        "mini_gemini",
        tiny.vision_config("clip"),
        tiny.text_config(vocab_size),
        tiny.IMAGE_TOKEN,
        select_layer,
        **high_res(),
    )


def high_res() -> dict[str, Any]:
    """What Mini-Gemini's configuration has beyond LLaVA's."""
    tower = ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 2, 1])
    return {"high_res_config": tower, "high_res_image_size": SIDE}


def mini_gemini(tower: str = "clip", strategy: str = "default", *kind: Any, **settings: Any) -> Any:
    """The model in eval mode, float32, with attention and mining peaked enough for every input to matter."""
    assert (tower, strategy) == ("clip", "default")
    model = tiny.build("mini_gemini", tower, strategy, *kind, **{"seed": 3, **settings}, **high_res())
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if name.startswith("patch_info_mining") and parameter.ndim == 2:
                parameter.normal_(std=0.5)
            elif name.startswith("high_res_tower") and name.endswith("layer_scale_parameter"):
                parameter.normal_()
            elif name.startswith("high_res_tower") and parameter.ndim in (2, 4):
                parameter.normal_(std=0.2)
    return model


def inputs(num_images: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor returns for ``num_images`` images."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(num_images, 3, SIDE, SIDE, generator=generator)}


def processor() -> LlavaProcessor:
    """The high-resolution image processor over the tests' tokenizer."""
    return fresh.new_processor(config(), tiny.tokenizer(), tiny.CHAT_TEMPLATE)


FAMILY = tiny.Family(
    name="mini_gemini_tiny",
    build=mini_gemini,
    inputs=inputs,
    kinds=(("clip", "default"),),
    crops=(1,),
    config_class=MiniGeminiConfig,
)
