"""What the LLaVA families share: the same parts under the same names, the same settings in ``config.json``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..towers.structure import TowerGeometry, check_select_layer, geometry_from_config
from .base import Adapter


class LlavaBase(Adapter):
    """A CLIP or SigLIP tower, a two-layer projector, any language model."""

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
