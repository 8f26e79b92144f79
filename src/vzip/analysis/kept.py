"""What a wrapper's compressor keeps of an image, drawn over the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.vision import of_tower
from vzip.models.vlm import CompressedVlm

from .overlay import draw_overlay


@torch.inference_mode()
def draw_kept(vlm: CompressedVlm, image: Image.Image, question: str | None = None) -> Image.Image:
    """The image as the vision tower sees it, kept patches and merge groups drawn (``draw_overlay``).

    Of a family that cuts images into crops the one that shows the whole image. Without compression, and
    of a method that keeps tokens of the whole image whatever their crop, what the tower sees is returned as it is.

    Args:
        vlm: the wrapper.
        image: any.
        question: about it, for a text-aware method.

    Raises:
        ConfigError: the wrapper has no processor.
        PromptError: a text-aware method without a question.
        ImageError: an image that cannot be used.
    """
    adapter, inputs = vlm.adapter, vlm.preprocess_images([image])
    moved = {
        name: value.to(vlm.device, vlm.model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
    visual = vlm.asked(adapter.read_inputs(**moved), None if question is None else [question])
    visual = adapter.viewed(visual, vlm.compressor)
    seen = as_image(adapter.shown(visual), vlm.processor.image_processor)  # type: ignore[union-attr]
    if vlm.compressor.scope == "image":
        return seen
    reads = of_tower(vlm.compressor.reads())
    _, vision = adapter.image_outputs(visual, reads, adapter.run_for(vlm.compressor))[0]
    vision = adapter.beside(vision, vlm.compressor, visual.texts, [visual.images[0].num_crops])
    return draw_overlay(
        seen, vlm.compressor(vision), adapter.overview_index(visual.images[0]), vision.grid, vision.has_cls
    )


def as_image(crop: Tensor, image_processor: Any) -> Image.Image:
    """``[3, h, w]``, as the image processor normalised it, back to 8-bit RGB."""
    given = ((image_processor.image_mean, 0.0), (image_processor.image_std, 1.0))  # None: it does not normalise
    mean, std = (torch.tensor([usual] * 3 if own is None else own).view(3, 1, 1) for own, usual in given)
    pixels = (crop.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().permute(1, 2, 0).numpy().astype(np.uint8))
