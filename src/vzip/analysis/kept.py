"""What a wrapper's compressor keeps of a picture, drawn over the picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.controls import Identity
from vzip.models.vlm import CompressedVlm

from .overlay import draw_overlay


@torch.inference_mode()
def draw_kept(vlm: CompressedVlm, picture: Image.Image) -> Image.Image:
    """The picture as the vision tower sees it, kept patches and merge groups drawn (``draw_overlay``).

    Of a family that cuts pictures into crops the first crop, which is the whole picture. Without compression there is
    nothing to draw, and what the tower sees is returned as it is.

    Raises:
        ConfigError: the wrapper has no processor.
        ImageError: a picture that cannot be used.
    """
    inputs = vlm.preprocess_images([picture])
    sizes, grids = inputs.get("image_sizes"), inputs.get("tile_grids")
    crops, num_crops = vlm.adapter.crops(inputs["pixel_values"].to(vlm.device, vlm.model.dtype), sizes, grids)
    seen = _as_picture(crops[0], vlm)
    if isinstance(vlm.compressor, Identity):
        return seen
    vision = vlm.adapter.run_tower(crops, vlm.compressor.requires, vlm.compressor.score_layer)
    tokens = vlm.compressor(vlm.adapter.hide_padding(vision, num_crops, sizes, grids))
    return draw_overlay(seen, tokens, 0, vision.grid, vision.has_cls)


def _as_picture(crop: Tensor, vlm: CompressedVlm) -> Image.Image:
    """``[3, h, w]``, as the processor normalised it, back to 8-bit RGB."""
    processor = vlm.processor.image_processor  # type: ignore[union-attr]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pixels = (crop.float().cpu() * std + mean).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().permute(1, 2, 0).numpy().astype(np.uint8))
