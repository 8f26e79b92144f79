"""What a wrapper's compressor keeps of an image, drawn over the image."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.vision import of_tower
from vzip.errors import UnsupportedModelError
from vzip.models.families.llava_base import LlavaBase
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
    seen = as_image(adapter.shown(visual), vlm)
    if vlm.compressor.scope == "image":
        return seen
    reads = of_tower(vlm.compressor.reads())
    _, vision = adapter.image_outputs(visual, reads, adapter.run_for(vlm.compressor))[0]
    vision = adapter.beside(vision, vlm.compressor, visual.texts, [visual.images[0].num_crops])
    return draw_overlay(
        seen, vlm.compressor(vision), adapter.overview_index(visual.images[0]), vision.grid, vision.has_cls
    )


@torch.inference_mode()
def draw_kept_frame(vlm: CompressedVlm, inputs: Mapping[str, Tensor], question: str | None = None) -> Image.Image:
    """The same of the middle frame of a video.

    Args:
        vlm: the wrapper.
        inputs: of one video, as ``preprocess_videos`` returns them, on the model's device.
        question: about it, for a text-aware method.

    Raises:
        UnsupportedModelError: a family whose frames the tower does not see one by one.
        PromptError: a text-aware method without a question.
    """
    adapter, compressor = vlm.adapter, vlm.compressor
    if not isinstance(adapter, LlavaBase):
        raise UnsupportedModelError(f"{type(vlm.model).__name__} joins frames of a video: there is none to draw over.")
    visual = vlm.asked(adapter.read_inputs(**inputs), None if question is None else [question])
    visual = adapter.viewed(visual, compressor)
    (shape,) = visual.videos
    frames, middle = adapter.video_pixels(visual), shape.num_crops // 2
    seen = as_image(frames[middle], vlm)
    if compressor.scope == "image" or compressor.joins(shape):
        return seen
    _, vision = adapter.video_outputs(visual, of_tower(compressor.reads()), adapter.run_for(compressor))[0]
    vision = adapter.beside(vision, compressor, visual.texts, [shape.num_crops])
    return draw_overlay(seen, compressor(vision), middle, vision.grid, vision.has_cls)


def as_image(crop: Tensor, vlm: CompressedVlm) -> Image.Image:
    """``[3, h, w]``, as the processor normalised it, back to 8-bit RGB."""
    processor = vlm.processor.image_processor  # type: ignore[union-attr]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pixels = (crop.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().permute(1, 2, 0).numpy().astype(np.uint8))
