"""LLaVA-NeXT's crops: the whole image as the base crop, and the image again on a grid of tiles ("anyres").

Two rules choose the grid from the checkpoint's list of resolutions ("pinpoints"), and they differ only in how they read
the list: LLaVA width first, Hugging Face height first. Where several resolutions serve an image equally well (small
and square ones) the first of the list wins, so the two grids are then each other's transpose. Tiles made by LLaVA's
rule therefore travel with their ``tile_grids``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.errors import ConfigError
from vzip.media.images import PREPROCESSES, Preprocess, call_processor, check_processor, load_image

Size = tuple[int, int]
_PADDING_COLOUR = (0, 0, 0)


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """The resolution that shows most of an image and, of those, wastes least; of equal ones the first.

    Args:
        size: the image's sides, in the axis order in which ``resolutions`` are to be read.
        resolutions: pairs of sides in pixels.
    """
    best: Size = (resolutions[0][0], resolutions[0][1])
    best_rank: tuple[int, int] | None = None
    for first, second in resolutions:
        # Bit for bit the published arithmetic: the sides are multiplied by a rounded quotient and cut off.
        scale = min(second / size[1], first / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        rank = (shown, shown - first * second)
        if best_rank is None or rank > best_rank:
            best, best_rank = (first, second), rank
    return best


def llava_grid(height: int, width: int, pinpoints: Sequence[Sequence[int]], tile_side: int) -> Size:
    """(rows, cols) of tiles by LLaVA's rule, which reads ``pinpoints`` width first."""
    grid_width, grid_height = best_resolution((width, height), pinpoints)
    return grid_height // tile_side, grid_width // tile_side


def hf_grid(height: int, width: int, pinpoints: Sequence[Sequence[int]], tile_side: int) -> Size:
    """(rows, cols) of tiles by Hugging Face's rule, which reads ``pinpoints`` height first."""
    grid_height, grid_width = best_resolution((height, width), pinpoints)
    return grid_height // tile_side, grid_width // tile_side


def placement(height: int, width: int, canvas_height: int, canvas_width: int) -> tuple[int, int, int, int]:
    """Where an image lies on its canvas of tiles, as large as it fits and centred: (top, left, height, width)."""
    scale_height, scale_width = canvas_height / height, canvas_width / width
    if scale_width < scale_height:
        new_height, new_width = min(math.ceil(height * scale_width), canvas_height), canvas_width
    else:
        new_height, new_width = canvas_height, min(math.ceil(width * scale_height), canvas_width)
    return (canvas_height - new_height) // 2, (canvas_width - new_width) // 2, new_height, new_width


def prepare_crops(
    images: Sequence[Image.Image],
    image_processor: Any,
    preprocess: Preprocess,
    pinpoints: Sequence[Sequence[int]],
    tile_side: int,
) -> dict[str, Tensor]:
    """Images -> crops, as LLaVA-NeXT takes them.

    Args:
        images: images of any mode and size.
        image_processor: the checkpoint's Hugging Face image processor.
        preprocess: ``"llava"``: the published grid and padding; ``"hf"``: the image processor alone.
        pinpoints: the checkpoint's resolutions.
        tile_side: side of a crop in pixels.

    Returns:
        ``pixel_values`` float32 ``[images, max_crops, 3, h, w]``, base crop first, zero-padded to the most crops;
        ``image_sizes`` int64 ``[images, 2]`` (height, width) of the images; with ``"llava"`` also ``tile_grids``
        int64 ``[images, 2]`` (rows, cols).

    Raises:
        ConfigError: another ``preprocess``; settings of the image processor that contradict each other.
        ImageError: an image that cannot be decoded.
    """
    images = [load_image(image) for image in images]
    if preprocess == "hf":
        return call_processor(image_processor, images)
    if preprocess != "llava":
        raise ConfigError(f"model.preprocess={preprocess!r}: must be one of {', '.join(PREPROCESSES)}.")
    check_processor(image_processor)
    sizes = [(image.height, image.width) for image in images]
    grids = [llava_grid(height, width, pinpoints, tile_side) for height, width in sizes]
    crops = [
        normalised(_cut(image, grid, tile_side, int(image_processor.resample)), image_processor)
        for image, grid in zip(images, grids, strict=True)
    ]
    pixel_values = crops[0].new_zeros(len(crops), max(len(own) for own in crops), *crops[0].shape[1:])
    for row, own in zip(pixel_values, crops, strict=True):
        row[: len(own)] = own
    return {
        "pixel_values": pixel_values,
        "image_sizes": torch.tensor(sizes, dtype=torch.int64),
        "tile_grids": torch.tensor(grids, dtype=torch.int64),
    }


def _cut(image: Image.Image, grid: Size, side: int, resample: int) -> list[Image.Image]:
    """The base crop (the whole image, stretched to a square) and the tiles, row by row."""
    rows, cols = grid
    method = Image.Resampling(resample)
    top, left, height, width = placement(image.height, image.width, rows * side, cols * side)
    canvas = Image.new("RGB", (cols * side, rows * side), _PADDING_COLOUR)
    canvas.paste(image.resize((width, height), method), (left, top))
    corners = [(row * side, col * side) for row in range(rows) for col in range(cols)]
    tiles = [canvas.crop((x, y, x + side, y + side)) for y, x in corners]
    return [image.resize((side, side), method), *tiles]


def normalised(crops: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """``[crops, 3, h, w]`` float32, scaled and normalised by the image processor's own constants, where it does so."""
    values = np.stack([np.asarray(crop) for crop in crops]).astype(np.float32)
    if image_processor.do_rescale:
        values *= np.float32(image_processor.rescale_factor)
    if image_processor.do_normalize:
        values -= np.asarray(image_processor.image_mean, dtype=np.float32)
        values /= np.asarray(image_processor.image_std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 3, 1, 2)))
