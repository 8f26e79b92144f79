"""Mini-Gemini: one image at two resolutions, mined before it is compressed.

The paper gives counts (64, 128, 192 of 576) and does not say how mining and selection are joined. Here all patches are
mined first, since a query needs its own window, and merged tokens and CLS own none. Scores and keys are the
low-resolution tower's, as for LLaVA-1.5; CLS passes unmined, or is left out (``drop_cls``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vzip.compressors.vision import OF_PATCHES, Signal, VisionOutput
from vzip.errors import PromptError, UnsupportedModelError

from ...towers.structure import TowerGeometry
from ..base import Stage, TowerRun, VisualInputs, no_stage
from ..llava.adapter import LlavaAdapter
from ..original.checkpoint import OriginalCheckpoint
from . import MiniGeminiForConditionalGeneration
from .published import find_published


class MiniGeminiAdapter(LlavaAdapter):
    """CLIP tower, ConvNeXt tower and mining, two-layer projector, any language model."""

    model_class = MiniGeminiForConditionalGeneration
    has_mining = True
    cannot_use: ClassVar[Mapping[str, str]] = {"resized": "each patch mines a window of its own of the larger image"}

    @classmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        geometry = super().check_config(config)
        if not geometry.has_cls or config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_config.model_type={config.vision_config.model_type}, vision_feature_select_strategy="
                f"{config.vision_feature_select_strategy}: Mini-Gemini mines the patches of a tower with CLS, and needs"
                " clip_vision_model and 'default'. They are settings of the checkpoint's config.json."
            )
        stride = config.high_res_config.patch_size * geometry.grid[0]
        if config.high_res_image_size % stride:
            raise UnsupportedModelError(
                f"high_res_image_size={config.high_res_image_size}: each of {geometry.grid[0]} x {geometry.grid[1]}"
                f" patches needs its own window of features, so the side must be a multiple of {stride} pixels. It is a"
                " setting of the checkpoint's config.json (image_size_aux in a published one)."
            )
        return geometry

    @classmethod
    def original(cls, directory: Path) -> OriginalCheckpoint | None:
        return find_published(directory)

    def check_pixels(self, pixel_values: Tensor) -> None:
        super().check_pixels(pixel_values)
        side = self.image_side
        if tuple(pixel_values.shape[1:]) != (3, side, side):
            raise PromptError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: this model takes [images, 3, {side}, {side}], the"
                " high-resolution image, and scales it down for the other tower itself. Prepare images with the"
                " checkpoint's own processor, or with preprocess_images."
            )

    def image_output(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> VisionOutput:
        """Both towers on images: scores and keys of the low-resolution one, its rows mined."""
        vision = super().image_output(visual, signals, run, stage)
        with stage("high_res_tower"):
            highres = self.high_res(self.image_crops(visual))
        with stage("mining"):
            return self.mined(vision, highres)

    @property
    def image_side(self) -> int:
        return self.model.config.high_res_image_size

    def image_pixels(self, visual: VisualInputs) -> Tensor:
        return self.low_res(self.image_crops(visual))

    def low_res(self, pixel_values: Tensor) -> Tensor:
        """The images as the low-resolution tower takes them."""
        model: Any = self.model.get_submodule("model")
        return model.low_res(pixel_values)

    def high_res(self, pixel_values: Tensor) -> Tensor:
        """The high-resolution tower's features of images ``[N, 3, h, w]``: ``[N, c, H, W]``."""
        return self.model.get_submodule("model.high_res_tower")(pixel_values)

    def mined(self, vision: VisionOutput, highres: Tensor) -> VisionOutput:
        """The low-resolution tower's output with its patches mined from ``highres``, CLS as ``drop_cls`` says."""
        model: Any = self.model.get_submodule("model")
        mined = model.mine(vision.hidden[:, 1:], highres)
        if not self.options.drop_cls:
            return replace(vision, hidden=torch.cat([vision.hidden[:, :1], mined], dim=1))
        rows = {signal: value for signal, value in vision.signals.items() if signal.name not in OF_PATCHES}
        return replace(
            vision,
            hidden=mined,
            keys=None if vision.keys is None else vision.keys[:, 1:],
            signals={**vision.signals, **{signal: value[:, 1:] for signal, value in rows.items()}},
            has_cls=False,
            stock_offset=0,
        )
