"""Video-LLaVA as published: Hugging Face's class with the authors' video tower, which that class lacks."""

from __future__ import annotations

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    VideoLlavaForConditionalGeneration,
    VideoLlavaModel,
)
from transformers.models.video_llava.modeling_video_llava import VideoLlavaMultiModalProjector

from .config import PublishedVideoLlavaConfig
from .tower import LanguageBindVideoTower


class PublishedVideoLlavaModel(VideoLlavaModel):
    """Both towers, projector and language model, without the head."""

    config_class = PublishedVideoLlavaConfig

    def __init__(self, config: PublishedVideoLlavaConfig) -> None:
        super(VideoLlavaModel, self).__init__(config)  # its own would build a video tower without temporal attention
        self.video_tower = LanguageBindVideoTower(config.vision_config)
        self.image_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VideoLlavaMultiModalProjector(config)
        self.vocab_size = config.text_config.vocab_size
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()


class PublishedVideoLlavaForConditionalGeneration(VideoLlavaForConditionalGeneration):
    """Video-LLaVA with its language head; takes what Hugging Face's class takes."""

    config_class = PublishedVideoLlavaConfig

    def __init__(self, config: PublishedVideoLlavaConfig) -> None:
        super(VideoLlavaForConditionalGeneration, self).__init__(config)
        self.model = PublishedVideoLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


AutoModelForImageTextToText.register(
    PublishedVideoLlavaConfig, PublishedVideoLlavaForConditionalGeneration, exist_ok=True
)
