"""Configuration of ``MiniGeminiForConditionalGeneration``."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, ConvNextConfig, LlavaConfig


class MiniGeminiConfig(LlavaConfig):
    """LLaVA's configuration and a high-resolution tower.

    Attributes:
        high_res_config: the ConvNeXt; None: OpenCLIP's ``convnext_large``.
        high_res_image_size: side in pixels of the square image the model takes. The low-resolution tower sees the
            same image scaled down to its own size.
    """

    # Not "mini_gemini": early published checkpoints call their own layout so.
    model_type = "vzip_mini_gemini"
    sub_configs = LlavaConfig.sub_configs | {"high_res_config": ConvNextConfig}

    high_res_config: Any = None
    high_res_image_size: int = 768

    def __post_init__(self, **kwargs: Any) -> None:
        if self.high_res_config is None:
            self.high_res_config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536])
        elif isinstance(self.high_res_config, dict):
            self.high_res_config = ConvNextConfig(**self.high_res_config)
        super().__post_init__(**kwargs)


AutoConfig.register(MiniGeminiConfig.model_type, MiniGeminiConfig, exist_ok=True)
