"""LLaVA-1.5 (``LlavaForConditionalGeneration``): one crop an image, its tokens used as they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ..base import check_pixel_values
from ..llava_base import LlavaBase


class LlavaAdapter(LlavaBase):
    """One crop an image."""

    model_class = LlavaForConditionalGeneration

    def expanded_lengths(
        self, num_images: int, image_sizes: Tensor | None, tile_grids: Tensor | None = None
    ) -> list[int]:
        num_rows = self.geometry.num_patches + int(self.geometry.has_cls)
        return [num_rows - self.stock_offset] * num_images

    def crops(
        self, pixel_values: Tensor, image_sizes: Tensor | None, tile_grids: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        check_pixel_values(pixel_values, 4, "[images, 3, height, width]")
        return pixel_values, [1] * pixel_values.shape[0]

    def pack(
        self,
        crops: Sequence[Tensor],
        image_sizes: Tensor | None,
        kept: Sequence[Tensor] | None = None,
        tile_grids: Tensor | None = None,
    ) -> list[Tensor]:
        return [image.flatten(0, 1) for image in crops]
