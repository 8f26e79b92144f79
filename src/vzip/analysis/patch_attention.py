"""Where a patch of the vision tower looks: its row of the attention at the select layer, drawn over the image."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vzip.models.vlm import CompressedVlm

from .attention import each_layer
from .seeing import of_vlm

_OPACITY = 0.6  # of the colours over the image


@dataclass(frozen=True)
class PatchAttention:
    """One crop and how its patches attend to each other.

    Attributes:
        seen: the crop as the vision tower saw it.
        grid: (rows, cols) of patches.
        rows: float32 ``[P, P]``: row p is the attention that patch p pays to each patch, mean over heads; without
            what goes to CLS, each sums to 1.
    """

    seen: Image.Image
    grid: tuple[int, int]
    rows: Tensor

    def drawn(self, patch: int) -> Image.Image:
        """The crop under the attention of a patch, which is framed."""
        low, high = self.rows[patch].min(), self.rows[patch].max()
        cells = ((self.rows[patch] - low) / (high - low).clamp(min=1e-12)).reshape(self.grid).numpy()
        colors = Image.fromarray(np.uint8(matplotlib.colormaps["plasma"](cells)[..., :3] * 255))
        over = Image.blend(self.seen, colors.resize(self.seen.size, Image.Resampling.NEAREST), _OPACITY)
        (row, col), (width, height) = divmod(patch, self.grid[1]), (self.seen.width, self.seen.height)
        left, right = (round((col + more) * width / self.grid[1]) for more in (0, 1))
        top, bottom = (round((row + more) * height / self.grid[0]) for more in (0, 1))
        pen = ImageDraw.Draw(over)
        pen.rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="black", width=1)
        pen.rectangle((left - 1, top - 1, right, bottom), outline="white", width=1)
        return over


def patch_at(x: float, y: float, size: tuple[int, int], grid: tuple[int, int]) -> int:
    """The patch, row by row from 0, under a point of an image.

    Args:
        x, y: in pixels of the image, from its top left corner; a point outside counts as the nearest inside.
        size: (width, height) of the image in pixels.
        grid: (rows, cols) of patches.
    """
    col = min(max(int(x * grid[1] / size[0]), 0), grid[1] - 1)
    row = min(max(int(y * grid[0] / size[1]), 0), grid[0] - 1)
    return row * grid[1] + col


@torch.inference_mode()
def patch_attention(vlm: CompressedVlm, image: Image.Image) -> PatchAttention:
    """Runs the vision tower once on the crop that shows the whole of an image.

    Raises:
        UnsupportedModelError: as ``of_vlm``.
        ConfigError: the wrapper has no processor; the select layer is the input of the first layer, where there is no
            attention.
        ImageError: an image that cannot be used.
    """
    seeing = of_vlm(vlm, type(vlm.model).__name__).with_layer(None)
    pixels, seen = seeing.see(image)
    (layer,) = each_layer(seeing.tower, pixels, [seeing.select_layer])
    every = torch.arange(seeing.tower.geometry.num_patches)
    return PatchAttention(seen, layer.grid, layer.of_patches(every)[0].float().cpu())
