"""The processor of an InternVL checkpoint without its part for videos, which needs torchvision; its tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, ProcessorMixin

from vzip.media.images import check_processor, load_image

# Of the published checkpoints: an image is up to so many tiles, and a thumbnail where it is more than one.
MAX_TILES = 12
IMAGE_TOKEN = "<IMG_CONTEXT>"
WRITTEN_IMAGE = f"<img>{IMAGE_TOKEN}</img>"


class InternVlImageTextProcessor(ProcessorMixin):
    """Tokenizer, image processor and chat template."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = IMAGE_TOKEN
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As Hugging Face's; with ``tokenize=False`` each image's placeholder stands between ``<img>`` and ``</img>``.

        The templates leave these out, and InternVL's own processor puts them in afterwards.
        """
        text = super().apply_chat_template(*args, **kwargs)
        return text.replace(IMAGE_TOKEN, WRITTEN_IMAGE) if isinstance(text, str) else text


def load_processor(directory: Path) -> InternVlImageTextProcessor:
    """From a checkpoint's files; raises what Hugging Face raises."""
    from transformers.models.got_ocr2 import GotOcr2ImageProcessor  # here: it warns about torchvision when imported

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    template = tokenizer.chat_template
    if isinstance(template, str):
        template = template.replace("<image>", IMAGE_TOKEN)  # as the first conversions of the checkpoints wrote it
    return InternVlImageTextProcessor(GotOcr2ImageProcessor.from_pretrained(directory), tokenizer, template)


def prepare_images(images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
    """Images -> ``pixel_values`` ``[tiles of all images, 3, h, w]`` and ``num_patches`` ``[images]``, tiles of each.

    Raises:
        ConfigError: settings of the image processor that contradict each other.
        ImageError: an image that cannot be decoded.
    """
    check_processor(image_processor)
    images = [load_image(image) for image in images]
    return dict(
        image_processor(images=images, crop_to_patches=True, return_tensors="pt", input_data_format="channels_last")
    )
