"""What the LLaVA families share: the same parts under the same names, the same settings in ``config.json``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vzip.compressors.base import Compressor
from vzip.compressors.vision import Signal, VisionOutput
from vzip.pruners.base import Pruner

from ..towers.planned import run_planned
from ..towers.structure import Tower, TowerGeometry, check_select_layer, find_tower, geometry_from_config
from ..towers.tap import run_tower
from .base import Adapter, Group, Stage, TowerRun, VisualInputs, no_stage
from .options import FamilyOptions, check_fit


class LlavaBase(Adapter):
    """A CLIP or SigLIP tower whose crops are all of one size, a two-layer projector, any language model.

    Attributes:
        geometry: of the vision tower.
        tower: the vision tower taken apart.
        select_layer: the tower's layer the model was trained on.
        stock_offset: first row of the tower's output the unmodified model uses (1: it drops row 0).
    """

    cannot_use: ClassVar[Mapping[str, str]] = {}

    def __init__(self, model: PreTrainedModel, options: FamilyOptions | None = None) -> None:
        super().__init__(model, options)
        self.geometry = self.check_config(model.config)
        self.tower: Tower = self.take_apart()
        self.select_layer: int = self.read_select_layer(model.config)
        self.stock_offset: int = self.read_stock_offset(model.config)

    @classmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        geometry = geometry_from_config(config.vision_config)
        geometry.num_layers_to_run(cls.read_select_layer(config))
        return geometry

    @classmethod
    def num_visual_of_any(cls, config: Any, pruner: Pruner) -> int:
        if cls.has_tiles or cls.has_video:
            return super().num_visual_of_any(config, pruner)
        geometry = cls.check_config(config)
        return geometry.num_patches + int(geometry.has_cls) - cls.read_stock_offset(config)

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

    def take_apart(self) -> Tower:
        """The vision tower's parts."""
        return find_tower(self.vision_tower)

    @property
    def image_side(self) -> int:
        """Side in pixels of a crop as the processor makes it."""
        return self.geometry.image_size

    def shown(self, visual: VisualInputs) -> list[Tensor]:
        pixels = self.image_crops(visual) if visual.images else self.video_pixels(visual)
        return list(pixels[: visual.shapes[0].num_crops])

    def blank_images(self, num_images: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.ones(num_images, 3, self.image_side, self.image_side)}

    @abstractmethod
    def image_crops(self, visual: VisualInputs) -> Tensor:
        """All crops of all images as one batch ``[crops, 3, h, w]``; raises PromptError as ``read_inputs``."""

    def image_pixels(self, visual: VisualInputs) -> Tensor:
        """The crops as the vision tower takes them, ``[crops, 3, h, w]``."""
        return self.image_crops(visual)

    def video_pixels(self, visual: VisualInputs) -> Tensor:
        """The frames of all videos as the video tower takes them, ``[frames, 3, h, w]``."""
        raise self._no_video()

    def valid_units(self, visual: VisualInputs) -> Tensor | None:
        """Bool ``[crops, U]`` of the images: False for units that show mere padding. None: all show something."""
        return None

    def image_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        return [(range(len(visual.images)), self.image_output(visual, signals, run, stage))]

    def video_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        return [(range(len(visual.videos)), self.video_output(visual, signals, run, stage))]

    def run_tower(
        self, tower: Tower, pixel_values: Tensor, signals: frozenset[Signal], stock_offset: int
    ) -> VisionOutput:
        """Runs a tower of the model on ``[N, 3, h, w]`` up to the select layer; see ``towers.tap.run_tower``.

        Or takes its output from ``tower_cache``, never where gradients are wanted.
        """

        def run(reads: frozenset[Signal]) -> VisionOutput:
            return run_tower(tower, pixel_values, self.select_layer, reads, stock_offset)

        can_score = tower.geometry.num_layers_to_run(self.select_layer) > 0
        if self.tower_cache is None or torch.is_grad_enabled() or not can_score:
            return run(signals)
        return self.tower_cache.look_up(pixel_values, (id(tower), self.select_layer), signals, run)

    def run_for(self, compressor: Compressor) -> TowerRun | None:
        if compressor.tower_use == "whole":
            return None

        def run(tower: Tower, pixel_values: Tensor, signals: frozenset[Signal], stock_offset: int) -> VisionOutput:
            plan = compressor.plan(tower.geometry.shape())
            assert plan is not None
            # Never to or from `tower_cache`, whose outputs any method may take.
            return run_planned(tower, pixel_values, self.select_layer, plan, stock_offset)

        return run

    def image_output(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> VisionOutput:
        """The vision tower's output for all crops of all images, as ``encode``'s arguments say."""
        pixels = self.image_pixels(visual)
        with stage("tower"):
            vision = (run or self.run_tower)(self.tower, pixels, signals, self.stock_offset)
        return replace(vision, valid=self.valid_units(visual), project=self.projector)

    def video_output(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> VisionOutput:
        """The same for all frames of all videos."""
        raise self._no_video()

    def tokens_per_crop(self, compressor: Compressor) -> int:
        """Visual tokens of an image of one crop, what the family adds left out."""
        return compressor.num_tokens(self.geometry.shape(self.options.drop_cls))

    def check_compressor(self, compressor: Compressor) -> None:
        """Raises ConfigError if the compressor does not fit the vision tower or the family's options."""
        check_fit(compressor, self.geometry, self.options)
