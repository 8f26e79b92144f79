"""LLaVA-1.5 (``LlavaForConditionalGeneration``): one crop an image, its tokens used as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ..towers import TowerGeometry, check_select_layer, geometry_from_config
from .base import Adapter, check_pixel_values


class LlavaAdapter(Adapter):
    """CLIP or SigLIP tower, two-layer projector, any language model."""

    model_class = LlavaForConditionalGeneration

    @classmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        geometry = geometry_from_config(config.vision_config)
        geometry.num_layers_to_run(cls.read_select_layer(config))
        return geometry

    @staticmethod
    def read_select_layer(config: Any) -> int:
        return check_select_layer(config.vision_feature_layer)

    @staticmethod
    def read_stock_offset(config: Any) -> int:
        # "default" cuts row 0 whatever the tower: CLS in CLIP, and in SigLIP, which has none, the first patch.
        return 1 if config.vision_feature_select_strategy == "default" else 0

    @staticmethod
    def read_image_token_id(config: Any) -> int:
        return config.image_token_id

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.vision_tower")

    @property
    def projector(self) -> nn.Module:
        return self.model.get_submodule("model.multi_modal_projector")

    @property
    def language_model(self) -> nn.Module:
        return self.model.get_submodule("model.language_model")

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
