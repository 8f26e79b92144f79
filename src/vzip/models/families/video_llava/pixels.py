"""Pixels as Video-LLaVA's own scripts make them; they mirror half of the videos at random, which is not done here.

Source: PKU-YuanGroup/Video-LLaVA 984e65b, ``processing_image.py`` and ``processing_video.py``. Both resize the short
side without antialiasing and cut the centre out; no image is padded to a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vzip.errors import ImageError
from vzip.media.images import MAX_HF_ASPECT_RATIO


def image_pixels(images: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """RGB images -> ``[images, 3, h, w]``: bicubic, then normalised."""
    side = image_processor.crop_size["height"]
    made = []
    for image in images:
        if max(image.size) > MAX_HF_ASPECT_RATIO * min(image.size):
            raise ImageError(
                f"An image of {image.width} x {image.height} pixels is more oblong than {MAX_HF_ASPECT_RATIO}:1; its"
                " short side would be enlarged and the rest cut off. Crop it."
            )
        longer = int(side * max(image.size) / min(image.size))
        pixels = functional.interpolate(_values(image), _sides(image, side, longer), mode="bicubic")
        made.append(_normalised(_centre(pixels, side), image_processor))
    return torch.cat(made)


def frame_pixels(frames: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """A video's RGB frames -> ``[frames, 3, h, w]``: normalised, then bilinear."""
    side, first = image_processor.crop_size["height"], frames[0]
    longer = int(max(first.size) / min(first.size) * side)
    pixels = _normalised(torch.cat([_values(frame) for frame in frames]), image_processor)
    return _centre(functional.interpolate(pixels, _sides(first, side, longer), mode="bilinear"), side)


def _values(image: Image.Image) -> Tensor:
    """``[1, 3, h, w]``, 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def _sides(image: Image.Image, shorter: int, longer: int) -> tuple[int, int]:
    """Height and width of the image resized."""
    return (longer, shorter) if image.height > image.width else (shorter, longer)


def _centre(pixels: Tensor, side: int) -> Tensor:
    top, left = (round((length - side) / 2) for length in pixels.shape[2:])
    return pixels[:, :, top : top + side, left : left + side]


def _normalised(pixels: Tensor, image_processor: Any) -> Tensor:
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    return (pixels - mean) / std
