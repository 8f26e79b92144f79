"""Where a patch of the vision tower looks: its row of the attention at the select layer, drawn over the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vzip.errors import ConfigError, UnsupportedModelError
from vzip.models.families.base import VisualInputs
from vzip.models.families.llava_base import LlavaBase
from vzip.models.towers.structure import Tower
from vzip.models.towers.tap import record_output
from vzip.models.vlm import CompressedVlm
from vzip.ops.attention import at_least_float32, split_heads

from .kept import as_image

_OPACITY = 0.6  # of the colours over the image


@dataclass(frozen=True)
class PatchAttention:
    """One crop and how its patches attend to each other.

    Attributes:
        seen: the crop as the vision tower saw it.
        grid: (rows, cols) of patches.
        rows: float32 ``[P, P]``: row p is the attention that patch p pays to each patch, mean over heads, CLS left
            out, so that a row of a tower with CLS sums to less than 1.
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
        UnsupportedModelError: a family whose crops are not all of one size; a select layer before any attention.
        ConfigError: the wrapper has no processor.
        ImageError: an image that cannot be used.
    """
    adapter = vlm.adapter
    if not isinstance(adapter, LlavaBase):
        raise UnsupportedModelError(
            f"{type(vlm.model).__name__}: the attention of a patch is shown for CLIP's, SigLIP's and InternVL's vision"
            " towers, whose crops are all of one size."
        )
    inputs = {name: value.to(vlm.device) for name, value in vlm.preprocess_images([image]).items()}
    visual = adapter.read_inputs(**inputs)
    pixels = adapter.image_pixels(visual)[adapter.overview_index(visual.images[0])]  # Mini-Gemini shows finer ones
    tower = adapter.tower
    rows = attention_rows(tower, pixels[None].to(vlm.model.dtype), adapter.select_layer)
    return PatchAttention(seen_by_tower(vlm, visual), tower.geometry.grid, rows[0].float().cpu())


def seen_by_tower(vlm: CompressedVlm, visual: VisualInputs) -> Image.Image:
    """The crop that shows the whole of the first image, as the vision tower sees it."""
    processor: Any = vlm.processor
    shown: Any = vlm.adapter.shown(visual)  # one crop, or all of them
    crop = shown if isinstance(shown, Tensor) else shown[vlm.adapter.overview_index(visual.images[0])]
    return as_image(crop, processor.image_processor)


def attention_rows(tower: Tower, pixel_values: Tensor, select_layer: int) -> Tensor:
    """``[N, 3, h, w]`` -> attention of every patch to every patch ``[N, P, P]`` at the select layer, mean over heads.

    The softmax runs over all keys; CLS's own row and column are then left out.

    Raises:
        ConfigError: the select layer is the input of the first layer, where there is no attention.
    """
    layer = tower.geometry.num_layers_to_run(select_layer)
    if layer == 0:
        raise ConfigError(f"vision_feature_layer={select_layer}: before the first layer there is no attention to show.")
    query_projection, key_projection, scale = tower.attention_of(layer - 1)
    found: dict[str, Tensor] = {}
    with record_output(query_projection, "queries", found), record_output(key_projection, "keys", found):
        hidden = tower.embed(pixel_values)
        for index in range(layer):
            hidden = tower.run_layer(index, hidden)
    queries, keys = (split_heads(at_least_float32(found[name]), tower.num_heads) for name in ("queries", "keys"))
    rows = torch.softmax(queries * scale @ keys.transpose(-1, -2), dim=-1).mean(dim=1)
    first = int(tower.geometry.has_cls)
    return rows[:, first:, first:]
