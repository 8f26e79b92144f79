"""Qwen2.5-VL: images of any size, windowed attention, 2 x 2 patches to a visual token, positions in three axes.

Visual tokens are selected after the merger, each image by itself. A token keeps the position ids of its place, a
contextual token those of its target, as the file for Qwen2.5-VL that VisionZip's authors published does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from vzip.compressors.base import Compressor
from vzip.compressors.vision import Signal, VisionOutput, VisionShape
from vzip.errors import PromptError
from vzip.media.images import Preprocess

from ..base import Adapter, Group, Stage, TowerRun, VisualInputs, no_stage
from ..options import FamilyOptions, check_layer
from .processing import IMAGE_TOKEN, load_processor, prepare_images
from .tower import Grid, UnitTower, check_signal


class Qwen2_5VlAdapter(Adapter):
    """Images; videos are not served yet.

    Attributes:
        published_name: of the models, for messages.
    """

    published_name: ClassVar[str] = "Qwen2.5-VL"
    model_class: ClassVar[type[PreTrainedModel]] = Qwen2_5_VLForConditionalGeneration
    input_names = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "pixel_values_videos")
    written_image = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
    why_no_video = "takes images only here, for its videos are not served yet"
    keeps_places = True
    preprocesses = ("hf",)

    def __init__(self, model: PreTrainedModel, options: FamilyOptions | None = None) -> None:
        super().__init__(model, options)
        self.tower = UnitTower.of(self.vision_tower, model.config.vision_config)

    @classmethod
    def check_config(cls, config: Any) -> None:
        UnitTower.of(nn.Identity(), config.vision_config)

    @classmethod
    def check_settings(
        cls, config: Any, compressor: Compressor, options: FamilyOptions, num_frames: int | None = None
    ) -> None:
        super().check_settings(config, compressor, options, num_frames)
        _check_signals(UnitTower.of(nn.Identity(), config.vision_config), compressor)

    @classmethod
    def load_processor(cls, directory: Path) -> Any:
        return load_processor(directory)

    @staticmethod
    def read_image_token_id(config: Any) -> int:
        return config.image_token_id

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.visual")

    @property
    def projector(self) -> nn.Module:
        return self.model.get_submodule("model.visual.merger")

    @property
    def language_model(self) -> nn.Module:
        return self.model.get_submodule("model.language_model")

    def check_compressor(self, compressor: Compressor) -> None:
        _check_signals(self.tower, compressor)

    def tokens_per_crop(self, compressor: Compressor) -> None:
        return None

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        return prepare_images(images, image_processor)

    def shown(self, visual: VisualInputs) -> Tensor:
        config, merge = self.model.config.vision_config, self.tower.merge_size
        rows, cols = visual.images[0].grid
        own = visual.tensors["pixel_values"][: rows * cols * merge**2]
        # Each merge unit's patches follow one another; an image fills the temporal steps of a patch with itself.
        patches = own.view(
            rows,
            cols,
            merge,
            merge,
            config.in_channels,
            config.temporal_patch_size,
            config.patch_size,
            config.patch_size,
        )[..., 0, :, :]
        return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(config.in_channels, *self._pixels(rows, cols))

    def _pixels(self, rows: int, cols: int) -> tuple[int, int]:
        side = self.tower.merge_size * self.model.config.vision_config.patch_size
        return rows * side, cols * side

    def _values_of_a_patch(self) -> int:
        config = self.model.config.vision_config
        return int(config.in_channels * config.temporal_patch_size * config.patch_size**2)

    def blank_images(self, num_images: int) -> dict[str, Tensor]:
        side = 32 * self.tower.merge_size
        return {
            "pixel_values": torch.ones(num_images * side**2, self._values_of_a_patch()),
            "image_grid_thw": torch.tensor([[1, side, side]] * num_images),
        }

    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        pixel_values, grid_thw = tensors.get("pixel_values"), tensors.get("image_grid_thw")
        if pixel_values is None and grid_thw is None:
            return []
        if pixel_values is None or grid_thw is None:
            raise PromptError(
                f"{'pixel_values' if pixel_values is None else 'image_grid_thw'} is missing:"
                f" {self.published_name}'s processor and preprocess_images return both, the patches of all images and"
                " the grid of each."
            )
        merge = self.tower.merge_size
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
            raise PromptError(
                f"image_grid_thw is {grid_thw.dtype} of shape {tuple(grid_thw.shape)}: must be integers [images, 3],"
                " the (temporal steps, rows, columns) of patches of each image."
            )
        grids: list[Grid] = [(step, row, col) for step, row, col in grid_thw.tolist()]
        if bad := [grid for grid in grids if grid[0] != 1 or min(grid) < 1 or grid[1] % merge or grid[2] % merge]:
            raise PromptError(
                f"image_grid_thw holds {bad[0]}: an image has 1 temporal step, and its rows and columns of patches are"
                f" multiples of {merge}."
            )
        expected = (sum(row * col for _, row, col in grids), self._values_of_a_patch())
        if tuple(pixel_values.shape) != expected:
            raise PromptError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: must be [patches, values of a patch], here"
                f" {list(expected)}, since image_grid_thw counts {expected[0]} patches."
            )
        return [self._shape(row // merge, col // merge) for _, row, col in grids]

    @staticmethod
    def _shape(rows: int, cols: int) -> VisionShape:
        return VisionShape("image", 1, (rows, cols), has_cls=False, num_vanilla=rows * cols, fixed=False)

    def image_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        grids = [self._grid(shape) for shape in visual.images]
        with stage("tower"):
            vision = self._run(visual.tensors["pixel_values"], grids, signals)
        sizes = [shape.num_units for shape in visual.images]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, shape in enumerate(visual.images):
            groups.setdefault(shape.grid, []).append(number)
        return [(members, _of_images(vision, sizes, members, grid)) for grid, members in groups.items()]

    def _run(self, pixel_values: Tensor, grids: Sequence[Grid], signals: frozenset[Signal]) -> VisionOutput:
        def run(reads: frozenset[Signal]) -> VisionOutput:
            return self.tower.run(pixel_values, grids, reads)

        if self.tower_cache is None or torch.is_grad_enabled():
            return run(signals)
        place = (id(self.vision_tower), tuple(grids))
        return self.tower_cache.look_up(pixel_values, place, signals, run, num_crops=len(grids))

    def _grid(self, shape: VisionShape) -> Grid:
        return shape.num_crops, shape.grid[0] * self.tower.merge_size, shape.grid[1] * self.tower.merge_size

    def positions(self, segments: Sequence[Sequence[int] | VisionShape]) -> Tensor:
        if any(isinstance(one, VisionShape) and isinstance(other, VisionShape) for one, other in pairwise(segments)):
            raise PromptError(
                f"Two images touch in a prompt: {self.published_name} reads one run of placeholders as one image. Put"
                " <|vision_end|><|vision_start|> between them, as the chat template does."
            )
        ids, types, grids = list[int](), list[int](), list[Grid]()
        for segment in segments:
            if isinstance(segment, VisionShape):
                ids += [self.image_token_id] * segment.num_vanilla
                types += [1] * segment.num_vanilla
                grids.append(self._grid(segment))
            else:
                ids += segment
                types += [0] * len(segment)
        if not ids:  # a prompt that is all padding
            return torch.zeros(3, 0, dtype=torch.int64)
        model: Any = self.model.get_submodule("model")
        found: Tensor = model.get_rope_index(
            torch.tensor([ids]), torch.tensor([types]), image_grid_thw=torch.tensor(grids) if grids else None
        )[0]
        return found[:, 0]


def _of_images(
    vision: VisionOutput, sizes: Sequence[int], members: Sequence[int], grid: tuple[int, int]
) -> VisionOutput:
    """Those of some images of one grid, out of what the tower made of all: ``[len(members), U, ...]``."""

    def own(values: Tensor) -> Tensor:
        parts = values[0].split(list(sizes))
        return torch.stack([parts[number] for number in members])

    return VisionOutput(
        own(vision.hidden),
        has_cls=False,
        grid=grid,
        attention=None if vision.attention is None else own(vision.attention),
        keys=None if vision.keys is None else own(vision.keys),
        stock_offset=0,
        signals={signal: own(value) for signal, value in vision.signals.items()},
        fixed=False,
        planes=None if vision.planes is None else own(vision.planes),
    )


def _check_signals(tower: UnitTower, compressor: Compressor) -> None:
    for signal in compressor.reads():
        keys = [name for name, value in vars(compressor).items() if value == signal.layer and name.endswith("layer")]
        key = keys[0] if keys else "the method's own layer"
        check_layer(signal, tower.num_layers, key)
        check_signal(tower, signal, key)
