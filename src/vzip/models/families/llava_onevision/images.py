"""What LLaVA-OneVision's vision tower sees: an image in tiles, one of several images, the frames of a video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vzip.media.images import Preprocess, call_processor, check_processor, pad_to_square, padding_colour

from ..llava_next.anyres import hf_grid, normalised, prepare_crops


def prepare_images(
    images: Sequence[Image.Image],
    is_alone: Sequence[bool],
    image_processor: Any,
    preprocess: Preprocess,
    pinpoints: Sequence[Sequence[int]],
    side: int,
) -> dict[str, Tensor]:
    """Images -> crops.

    Args:
        images: RGB.
        is_alone: whether each is the only one of its prompt, and so cut into tiles; the others are padded to a square
            of the mean colour.
        image_processor: the checkpoint's Hugging Face image processor.
        preprocess: as for ``prepare_crops``.
        pinpoints: the checkpoint's resolutions.
        side: of a crop in pixels.

    Returns:
        as ``prepare_crops``, with ``tile_grids`` always; (0, 0) for an image without tiles.
    """
    of_images: list[dict[str, Tensor]] = []
    for image, alone in zip(images, is_alone, strict=True):
        size = torch.tensor([[image.height, image.width]])
        if alone:
            own = prepare_crops([image], image_processor, preprocess, pinpoints, side)
            hf = torch.tensor([hf_grid(image.height, image.width, pinpoints, side)])
            of_images.append({"pixel_values": own["pixel_values"], "tile_grids": own.get("tile_grids", hf)})
        elif preprocess == "hf":  # twice: one alone would be cut into tiles
            values = call_processor(image_processor, [[image, image]])["pixel_values"][:1]
            of_images.append({"pixel_values": values, "tile_grids": torch.zeros(1, 2, dtype=torch.int64)})
        else:
            check_processor(image_processor)
            square = pad_to_square(image, padding_colour(image_processor))
            values = prepare_frames([square], image_processor, side)[None]
            of_images.append({"pixel_values": values, "tile_grids": torch.zeros(1, 2, dtype=torch.int64)})
        of_images[-1]["image_sizes"] = size
    most = max(own["pixel_values"].shape[1] for own in of_images)
    first = of_images[0]["pixel_values"]
    pixel_values = first.new_zeros(len(images), most, *first.shape[2:])
    for row, own in zip(pixel_values, of_images, strict=True):
        row[: own["pixel_values"].shape[1]] = own["pixel_values"][0]
    others = {name: torch.cat([own[name] for own in of_images]) for name in ("image_sizes", "tile_grids")}
    return {"pixel_values": pixel_values, **others}


def prepare_frames(frames: Sequence[Image.Image], image_processor: Any, side: int) -> Tensor:
    """Frames, stretched to squares as the published processors do -> float32 ``[frames, 3, side, side]``."""
    method = Image.Resampling(int(image_processor.resample))
    return normalised([frame.resize((side, side), method) for frame in frames], image_processor)
