"""The processor of a Qwen2.5-VL (or Qwen3-VL) checkpoint; of its part for videos, which needs torchvision, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, ProcessorMixin

from vzip.errors import ImageError
from vzip.media.images import load_image

from .videos import MAX_ASPECT_RATIO, read_settings

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


class Qwen2_5VlImageTextProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template; ``video_settings`` are what the files say of videos."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        video_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.video_settings = dict(video_settings or {})
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def load_processor(directory: Path) -> Qwen2_5VlImageTextProcessor:
    """From a checkpoint's files; raises what Hugging Face raises."""
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor  # here: it warns about torchvision when imported

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    template = tokenizer.chat_template
    if (file := directory / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    elif (file := directory / "chat_template.json").is_file():
        template = json.loads(file.read_text(encoding="utf-8"))["chat_template"]
    image_processor = Qwen2VLImageProcessor.from_pretrained(directory)
    return Qwen2_5VlImageTextProcessor(image_processor, tokenizer, template, read_settings(directory))


def prepare_images(images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
    """Images -> ``pixel_values`` ``[patches, values of a patch]`` and ``image_grid_thw`` ``[images, 3]``.

    Raises:
        ImageError: an image that cannot be decoded, or is more oblong than 200:1.
    """
    images = [load_image(image) for image in images]
    for image in images:
        if max(image.size) >= MAX_ASPECT_RATIO * min(image.size):
            raise ImageError(
                f"An image of {image.width} x {image.height} is more oblong than {MAX_ASPECT_RATIO}:1, which"
                " Qwen's image processor does not take. Cut it into pieces."
            )
    return dict(image_processor(images=images, return_tensors="pt"))
