"""LLaVA-1.5 (``LlavaForConditionalGeneration``): one crop an image, its tokens used as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vzip.compressors.vision import VisionShape

from ..base import VisualInputs, check_pixel_values
from ..llava_base import LlavaBase
from ..original.checkpoint import OriginalCheckpoint
from ..original.llava import find_llava


class LlavaAdapter(LlavaBase):
    """One crop an image."""

    model_class = LlavaForConditionalGeneration

    @classmethod
    def original(cls, directory: Path) -> OriginalCheckpoint | None:
        found = find_llava(directory)
        return None if found is None or found.has_tiles else found

    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        pixel_values = tensors.get("pixel_values")
        if pixel_values is None:
            return []
        self.check_pixels(pixel_values)
        num_vanilla = self.geometry.num_patches + int(self.geometry.has_cls) - self.stock_offset
        has_cls = self.geometry.has_cls and not self.options.drop_cls
        return [VisionShape("image", 1, self.geometry.grid, has_cls, num_vanilla)] * len(pixel_values)

    def check_pixels(self, pixel_values: Tensor) -> None:
        """Raises PromptError for pixels of a shape that no processor of this family makes."""
        check_pixel_values(pixel_values, 4, "[images, 3, height, width]")

    def image_crops(self, visual: VisualInputs) -> Tensor:
        return visual.tensors["pixel_values"]
