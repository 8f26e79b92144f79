"""InternVL3: an image in tiles and a thumbnail, 2 x 2 patches of a tile to a visual token.

Visual tokens are selected behind the pixel shuffle, which makes a row of four patches, and before the projector, each
tile by itself. CLS scores them and is no token. A tile's tokens follow one another, tile by tile, the thumbnail last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import InternVLForConditionalGeneration, InternVLVisionConfig

from vzip.compressors.vision import VisionShape
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.media.images import Preprocess

from ...towers.structure import TowerGeometry
from ..base import VisualInputs, check_pixel_values
from ..llava_base import LlavaBase
from ..options import FamilyOptions
from .processing import MAX_TILES, WRITTEN_IMAGE, load_processor, prepare_images


class InternVlAdapter(LlavaBase):
    """Images; a video as Hugging Face's processor writes it, each frame an image of one tile."""

    model_class = InternVLForConditionalGeneration
    input_names: ClassVar[tuple[str, ...]] = ("pixel_values", "num_patches")
    written_image = WRITTEN_IMAGE
    has_tiles = True
    why_no_video = (
        "takes a video only as its processor writes it, each frame an image (prepare, forward, generate): files are not"
        " served yet"
    )
    preprocesses = ("hf",)
    templates: ClassVar[tuple[str, ...]] = ("chat",)
    cannot_use: ClassVar[Mapping[str, str]] = {
        "pruned": "four neighbouring patches become one visual token behind the tower, so none of them can go before"
    }

    @classmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        vision = config.vision_config
        if not isinstance(vision, InternVLVisionConfig):
            raise UnsupportedModelError(
                f"vision_config.model_type={vision.model_type}: InternVL is served with its own vision tower,"
                " internvl_vision. It is a setting of the checkpoint's config.json."
            )
        geometry = super().check_config(config)
        if config.downsample_ratio * geometry.unit_side != 1 or config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"downsample_ratio={config.downsample_ratio}, vision_feature_select_strategy="
                f"{config.vision_feature_select_strategy}: must be {1 / geometry.unit_side} and default, since 2 x 2"
                " patches without CLS become a visual token. They are settings of the checkpoint's config.json."
            )
        if not vision.use_mean_pooling and cls.read_select_layer(config) in (-1, geometry.num_layers):
            raise UnsupportedModelError(
                "vision_config.use_mean_pooling=false: must be true, since a tower that ends in a norm is not served."
                " It is a setting of the checkpoint's config.json."
            )
        return geometry

    @classmethod
    def check_options(cls, options: FamilyOptions, num_frames: int | None = None) -> None:
        super().check_options(options, num_frames)
        if options.drop_padding or options.row_newline:
            raise ConfigError(
                f"model.drop_padding={options.drop_padding}, model.row_newline={options.row_newline}: InternVL's tiles"
                " have neither padding nor newlines, so both must be False; they are options of LLaVA-NeXT."
            )

    @classmethod
    def load_processor(cls, directory: Path) -> Any:
        return load_processor(directory)

    @staticmethod
    def read_stock_offset(config: Any) -> int:
        return 0  # of units, among which is no CLS

    @property
    def num_units(self) -> int:
        """Visual tokens of a tile."""
        return self.geometry.shape().num_units

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        return prepare_images(images, image_processor)

    def blank_images(self, num_images: int) -> dict[str, Tensor]:
        num_crops, side = MAX_TILES + 1, self.image_side
        return {
            "pixel_values": torch.ones(num_images * num_crops, 3, side, side),
            "num_patches": torch.full((num_images,), num_crops),
        }

    def counted(
        self, processor_outputs: Mapping[str, Any], input_ids: Any, attention_mask: Tensor | None
    ) -> Mapping[str, Any]:
        """``num_patches``, which Hugging Face's processor leaves out, from its runs of placeholders.

        Where these are not such runs, each tile is taken for an image.
        """
        pixel_values, given = processor_outputs.get("pixel_values"), processor_outputs.get("num_patches")
        if given is not None or not isinstance(pixel_values, Tensor) or not isinstance(input_ids, Tensor):
            return processor_outputs
        shown = input_ids == self.image_token_id
        if attention_mask is not None and attention_mask.shape == shown.shape:
            shown &= attention_mask.bool()
        runs = [sum(run) for row in shown.tolist() if isinstance(row, list) for found, run in groupby(row) if found]
        counts = torch.tensor(runs, dtype=torch.int64) // self.num_units
        if any(run % self.num_units for run in runs) or int(counts.sum()) != len(pixel_values):
            return processor_outputs
        return {**processor_outputs, "num_patches": counts}

    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        pixel_values, num_patches = tensors.get("pixel_values"), tensors.get("num_patches")
        if pixel_values is None:
            if num_patches is not None:
                raise PromptError("pixel_values is missing: num_patches counts the tiles of each image in it.")
            return []
        check_pixel_values(pixel_values, 4, "[tiles of all images, 3, height, width]")
        counts = [1] * len(pixel_values) if num_patches is None else self._counts(num_patches, len(pixel_values))
        shape = self.geometry.shape()
        return [VisionShape("image", count, shape.grid, False, count * shape.num_units) for count in counts]

    def _counts(self, num_patches: Tensor, num_tiles: int) -> list[int]:
        counts = [] if num_patches.ndim != 1 or num_patches.is_floating_point() else num_patches.tolist()
        if sum(counts) != num_tiles or min(counts, default=1) < 1:
            raise PromptError(
                f"num_patches is {num_patches.dtype} of shape {tuple(num_patches.shape)}"
                + (f", {counts}" if counts else "")
                + f": must be integers [images], the tiles of each (1 or more), {num_tiles} together, as pixel_values"
                " has. preprocess_images returns both; without num_patches they are taken from the prompt's runs of"
                " placeholders."
            )
        return counts

    def overview_index(self, shape: VisionShape) -> int:
        return shape.num_crops - 1  # the thumbnail

    def image_crops(self, visual: VisualInputs) -> Tensor:
        return visual.tensors["pixel_values"]
