"""LLaVA-OneVision (``LlavaOnevisionForConditionalGeneration``): one image in tiles, several images, videos.

An image that is alone in its prompt is cut as LLaVA-NeXT's are; without compression more tiles than the checkpoint
allows (9) are shrunk together, bilinearly. What is left of a crop after selection is no grid that could be shrunk, so
compressed crop by crop they are not; a method whose budget is the image's chooses among what has been shrunk. Each of
several images is one crop and a newline. A video's frames are pooled after the projector, two patches by two, and a
method chooses among the pooled ones, its *units*; one newline ends the video.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlavaOnevisionForConditionalGeneration, LlavaProcessor, PreTrainedModel

from vzip.compressors.base import Compressor
from vzip.compressors.vision import OF_PATCHES, Signal, VisionOutput, VisionShape
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.media.images import Preprocess, load_image
from vzip.media.video import DEFAULT_NUM_FRAMES, VideoSource, load_video

from ...towers.structure import TowerGeometry
from ..base import Stage, TowerRun, VisualInputs, check_pixel_values, no_stage
from ..llava_next.adapter import Grid, LlavaNextAdapter, unpadded
from ..options import FamilyOptions
from ..places import VisualTokens
from .images import prepare_frames, prepare_images

_SHRINK_FROM = 1.1  # how much longer than allowed a mosaic's side must be


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """LLaVA-NeXT's crops of one image; several images; videos through the same tower."""

    model_class = LlavaOnevisionForConditionalGeneration
    input_names = ("pixel_values", "image_sizes", "tile_grids", "batch_num_images", "pixel_values_videos")
    has_video = True
    default_num_frames: ClassVar[int] = DEFAULT_NUM_FRAMES
    cannot_use: ClassVar[Mapping[str, str]] = {
        "pruned": "its vision tower (SigLIP) has no CLS token, whose attention says what to drop"
    }

    def __init__(self, model: PreTrainedModel, options: FamilyOptions | None = None) -> None:
        super().__init__(model, options)
        self.video_token_id = int(model.config.video_token_id)
        self.frame_tower, self.frame_offset = self.tower, self.stock_offset
        self.max_tiles = _max_tiles(model.config)

    @classmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        _max_tiles(config)
        return super().check_config(config)

    @classmethod
    def load_processor(cls, directory: Path) -> Any:
        """Tokenizer, image processor and chat template: Hugging Face's own needs torchvision, for its video part."""
        return LlavaProcessor.from_pretrained(directory, trust_remote_code=False)

    @property
    def video_tower(self) -> nn.Module:
        """The vision tower, which sees each frame alone."""
        return self.vision_tower

    @property
    def pooled_grid(self) -> Grid:
        """(rows, cols) of a frame's pooled patches."""
        return pooled_grid(self.geometry.grid)

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        return self.prepare_among(images, [1] * len(images), image_processor, preprocess)

    def prepare_among(
        self, images: Sequence[Image.Image], num_images: Sequence[int], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        opened, is_alone = [load_image(image) for image in images], [number == 1 for number in num_images]
        return prepare_images(opened, is_alone, image_processor, preprocess, self.pinpoints, self.image_side)

    def prepare_videos(
        self, videos: Sequence[VideoSource], processor: Any, num_frames: int | None
    ) -> dict[str, Tensor]:
        num_frames = self.default_num_frames if num_frames is None else num_frames
        side = self.image_side
        frames = [prepare_frames(load_video(video, num_frames), processor.image_processor, side) for video in videos]
        return {"pixel_values_videos": torch.stack(frames)}

    def blank_videos(self, num_videos: int, num_frames: int) -> dict[str, Tensor]:
        side = self.image_side
        return {"pixel_values_videos": torch.ones(num_videos, num_frames, 3, side, side)}

    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        if "pixel_values" not in tensors and (counts := tensors.get("batch_num_images")) is not None and counts.any():
            raise PromptError(f"batch_num_images={counts.tolist()}: it counts images of prompts, and none are given.")
        return super().image_shapes(tensors)

    def _are_tiled(self, tensors: Mapping[str, Tensor]) -> list[bool]:
        """Of each image: alone in its prompt by ``batch_num_images``, else by ``tile_grids``, else all."""
        pixel_values, counts, grids = (tensors.get(n) for n in ("pixel_values", "batch_num_images", "tile_grids"))
        assert pixel_values is not None
        num_images, max_crops = pixel_values.shape[:2]
        if counts is not None:
            of_prompts = counts.flatten().tolist()
            if sum(of_prompts) != num_images:
                raise PromptError(
                    f"batch_num_images={of_prompts}: must be the images of each prompt that has any, together the"
                    f" {num_images} of pixel_values."
                )
            return [number == 1 and max_crops > 1 for number in of_prompts for _ in range(number)]
        if grids is not None and grids.ndim == 2 and len(grids) == num_images:
            return [max_crops > 1 and any(grid) for grid in grids.tolist()]
        return super()._are_tiled(tensors)

    def _layouts(
        self, num_images: int, image_sizes: Tensor | None, tile_grids: Tensor | None
    ) -> list[tuple[Grid, Grid]]:
        if tile_grids is not None and tile_grids.ndim == 2:  # (0, 0) says that there are no tiles
            tile_grids = tile_grids.masked_fill((tile_grids == 0).all(dim=1, keepdim=True), 1)
        return super()._layouts(num_images, image_sizes, tile_grids)

    def _num_written(self, size: Grid, is_tiled: bool) -> int:
        return super()._num_written(size, is_tiled) if is_tiled else self.geometry.num_patches + 1

    def _shrunk(self, size: Grid, grid: Grid) -> Grid | None:
        """Rows and columns that the unmodified model shrinks an image's mosaic to; None: it does not."""
        rows, cols = (len(each) for each in unpadded(size, *self._stitched(grid)))
        # Bit for bit Hugging Face's arithmetic.
        ratio = math.sqrt(rows * cols / (self.max_tiles * self.geometry.grid[0] ** 2))
        return (int(rows // ratio), int(cols // ratio)) if ratio > _SHRINK_FROM else None

    def _num_vanilla(self, size: Grid, grid: Grid) -> int:
        if (shrunk := self._shrunk(size, grid)) is None:
            return super()._num_vanilla(size, grid)
        return self.geometry.num_patches + shrunk[0] * (shrunk[1] + 1)

    def whole_index(self, shape: VisionShape) -> Tensor | None:
        """As LLaVA-NeXT's; where the mosaic is shrunk the patch in whose place each of its cells is."""
        if shape.kind == "video":
            return functional.pad(torch.arange(shape.num_vanilla - 1), (0, 1), value=-1)
        index = super().whole_index(shape)
        if shape.num_crops == 1 or index is None or (shrunk := self._shrunk(*self._layout(shape))) is None:
            return index
        size, grid = self._layout(shape)
        rows, cols = unpadded(size, *self._stitched(grid))
        num_patches = self.geometry.num_patches
        mosaic = index[num_patches:].view(len(rows), len(cols) + 1)[:, :-1]
        y, x = (_scaled(torch.arange(few), many, few) for few, many in zip(shrunk, mosaic.shape, strict=True))
        return torch.cat([index[:num_patches], functional.pad(mosaic[y][:, x], (0, 1), value=-1).flatten()])

    def pack_whole(self, shape: VisionShape, rows: Tensor, newline: Tensor, index: Tensor | None) -> Tensor:
        is_tiled = shape.kind == "image" and shape.num_crops > 1
        shrunk = self._shrunk(*self._layout(shape)) if is_tiled else None
        if shrunk is None or not rows.is_floating_point():
            return super().pack_whole(shape, rows, newline, index)
        size, grid = self._layout(shape)
        wide, end = (rows[:, None], newline[None]) if rows.ndim == 1 else (rows, newline)
        base, tiles = wide.split([self.geometry.num_patches, len(wide) - self.geometry.num_patches])
        mosaic = tiles.view(*grid, *self.geometry.grid, -1).permute(4, 0, 2, 1, 3).contiguous()
        mosaic = mosaic.flatten(1, 2).flatten(2, 3)
        lines, columns = unpadded(size, *self._stitched(grid))
        mosaic = mosaic[:, lines.start : lines.stop, columns.start : columns.stop]
        mosaic = functional.interpolate(mosaic[None], shrunk, mode="bilinear")[0]
        mosaic = torch.cat([mosaic, end[:, None, None].expand(*mosaic.shape[:-1], 1)], dim=-1)
        packed = torch.cat([base, mosaic.flatten(1, 2).transpose(0, 1)])
        return packed[:, 0] if rows.ndim == 1 else packed

    def _stitched_places(self, shape: VisionShape, y: Tensor, x: Tensor | None) -> Tensor:
        size, grid = self._layout(shape)
        if (shrunk := self._shrunk(size, grid)) is None:
            return super()._stitched_places(shape, y, x)
        rows, cols = unpadded(size, *self._stitched(grid))

        def shrink(number: Tensor, own: range, few: int) -> Tensor:
            return _scaled((number - own.start).clamp(min=0, max=len(own) - 1), few, len(own))

        line = shrink(y, rows, shrunk[0]) * (shrunk[1] + 1)
        return self.geometry.num_patches + line + (shrunk[1] if x is None else shrink(x, cols, shrunk[1]))

    def unit_places(self, shape: VisionShape, device: torch.device) -> Tensor:
        if shape.kind == "video":
            return torch.arange(shape.num_vanilla - 1, device=device).view(shape.num_crops, -1)
        return super().unit_places(shape, device)

    def newline_places(self, shape: VisionShape) -> Tensor:
        return torch.tensor([shape.num_vanilla - 1]) if shape.kind == "video" else super().newline_places(shape)

    def pack(self, shape: VisionShape, tokens: Tensor, kept: Tensor) -> Tensor:
        if shape.kind == "video":
            return torch.cat([tokens.flatten(0, 1), self.newline(tokens)[None]])
        return super().pack(shape, tokens, kept)

    def video_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        if (frames := tensors.get("pixel_values_videos")) is None:
            return []
        check_pixel_values(frames, 5, "[videos, frames, 3, height, width]", "pixel_values_videos")
        num_videos, num_frames = frames.shape[:2]
        return [video_shape(self.geometry.grid, num_frames)] * num_videos

    def video_pixels(self, visual: VisualInputs) -> Tensor:
        return visual.tensors["pixel_values_videos"].flatten(0, 1)

    def video_output(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> VisionOutput:
        pixels = self.video_pixels(visual)
        with stage("tower"):
            vision = (run or self.run_tower)(self.tower, pixels, signals, self.stock_offset)
        with stage("projector"):
            return self.pooled(vision)

    def pooled(self, vision: VisionOutput) -> VisionOutput:
        """Frames as the tower gives them -> their units: projected rows, and the signals, pooled alike."""
        first = int(self.geometry.has_cls)
        projected = self.projector(vision.hidden[:, self.stock_offset :])
        pool = partial(_pool, grid=self.geometry.grid)

        def of_units(signal: Signal, value: Tensor) -> Tensor:
            value = value.to(projected.device)  # the projector may be elsewhere than the tower
            return pool(value[..., None])[..., 0] if signal.name in OF_PATCHES else pool(value[:, first:])

        return replace(
            vision,
            hidden=pool(projected),
            has_cls=False,
            grid=self.pooled_grid,
            attention=None if vision.attention is None else of_units(Signal("attention"), vision.attention),
            keys=None if vision.keys is None else of_units(Signal("keys"), vision.keys),
            stock_offset=0,
            signals={signal: of_units(signal, value) for signal, value in vision.signals.items()},
            fixed=False,
        )

    def encode(
        self, visual: VisualInputs, compressor: Compressor, run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[VisualTokens]:
        if visual.videos and compressor.tower_use != "whole":
            raise ConfigError(
                f"compressor={type(compressor).__name__} decides within the vision tower which patches are left, and"
                f" {self.model_class.__name__} pools a video's patches behind it, two by two, so there is no whole grid"
                " to pool. It serves images of this model; for videos use another compressor."
            )
        return super().encode(visual, compressor, run, stage)


def video_shape(grid: Grid, num_frames: int) -> VisionShape:
    """A video's, for a tower of that grid."""
    (rows, cols), num_added = pooled_grid(grid), 1
    num_vanilla = num_frames * rows * cols + num_added
    # Not fixed: a budget for images, whose crops have four times as many units, may keep all of a frame.
    return VisionShape("video", num_frames, (rows, cols), False, num_vanilla, num_added, fixed=False)


def pooled_grid(grid: Grid) -> Grid:
    """Rows and columns of a frame's units."""
    rows, cols = (math.ceil(side / 2) for side in grid)
    return rows, cols


def _scaled(number: Tensor, new: int, old: int) -> Tensor:
    """Which of ``new`` equal parts of a line the middle of one of its ``old`` parts is in."""
    return (2 * number + 1) * new // (2 * old)


def _pool(rows: Tensor, grid: Grid) -> Tensor:
    """``[N, P, E]`` of a grid -> ``[N, P', E]``: half as many rows and columns, bilinear, as the unmodified model."""
    cells = rows.view(len(rows), *grid, -1).permute(0, 3, 1, 2).contiguous()
    halved = functional.interpolate(cells, pooled_grid(grid), mode="bilinear")
    return halved.permute(0, 2, 3, 1).flatten(1, 2)


def _max_tiles(config: Any) -> int:
    """Most tiles of an image that enter as they are.

    Raises:
        UnsupportedModelError: a setting that names no number.
    """
    found = re.fullmatch(r"anyres_max_([1-9]\d*)", str(config.vision_aspect_ratio))
    if found is None:
        raise UnsupportedModelError(
            f"vision_aspect_ratio={config.vision_aspect_ratio!r}: must be anyres_max_N, N being the most tiles that"
            " enter as they are (anyres_max_9). It is a setting of the checkpoint's config.json."
        )
    return int(found[1])
