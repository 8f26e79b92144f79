"""Configuration of ``PublishedVideoLlavaForConditionalGeneration``."""

from __future__ import annotations

from transformers import AutoConfig, VideoLlavaConfig


class PublishedVideoLlavaConfig(VideoLlavaConfig):
    """Hugging Face's configuration, of a model whose video tower has temporal attention."""

    model_type = "vzip_video_llava"


AutoConfig.register(PublishedVideoLlavaConfig.model_type, PublishedVideoLlavaConfig, exist_ok=True)
