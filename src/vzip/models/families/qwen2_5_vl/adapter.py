"""Qwen2.5-VL: images of any size, windowed attention, 2 x 2 patches to a visual token, positions in three axes.

Visual tokens are selected after the merger, each image by itself. A token keeps the position ids of its place, a
contextual token those of its target, as the file for Qwen2.5-VL that VisionZip's authors published does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from vzip.compressors.base import Compressor
from vzip.compressors.vision import Signal, VisionOutput, VisionShape
from vzip.errors import ConfigError, PromptError
from vzip.media.images import Preprocess
from vzip.media.video import VideoSource

from ..base import Adapter, Group, Stage, TowerRun, VisualInputs, no_stage
from ..decoder import MRopeDecoder
from ..options import FamilyOptions, check_layer
from .processing import IMAGE_TOKEN, VIDEO_TOKEN, load_processor, prepare_images
from .tower import Grid, UnitTower, check_signal
from .videos import VideoRules, settings_of


class Qwen2_5VlAdapter(Adapter):
    """Images and videos; a budget is each temporal step's, which shows two frames.

    Attributes:
        published_name: of the models, for messages.
    """

    published_name: ClassVar[str] = "Qwen2.5-VL"
    model_class: ClassVar[type[PreTrainedModel]] = Qwen2_5_VLForConditionalGeneration
    input_names: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_grid_thw",
        "mm_token_type_ids",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    written_image = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
    written_video = f"<|vision_start|>{VIDEO_TOKEN}<|vision_end|>"
    has_video = True
    samples_by_time = True
    video_rules: ClassVar[type[VideoRules]] = VideoRules
    keeps_places = True
    position_axes = 3
    preprocesses = ("hf",)
    templates = ("chat",)
    decoder_class = MRopeDecoder
    cannot_capture = "its images have any size, and which patches attend to which is laid out on the host"

    def __init__(self, model: PreTrainedModel, options: FamilyOptions | None = None) -> None:
        super().__init__(model, options)
        self.tower = UnitTower.of(self.vision_tower, model.config.vision_config)
        self.video_token_id: int = model.config.video_token_id

    @classmethod
    def check_config(cls, config: Any) -> None:
        UnitTower.of(nn.Identity(), config.vision_config)

    @classmethod
    def check_options(cls, options: FamilyOptions, num_frames: int | None = None) -> None:
        super().check_options(options, num_frames)
        if num_frames is not None and options.fps is not None:
            raise ConfigError(
                f"model.num_frames={num_frames} with model.fps={options.fps}: set one of them, a number of frames a"
                " video or a number a second; null leaves the other to it."
            )
        if num_frames is not None and num_frames < 2:
            raise ConfigError(
                f"model.num_frames={num_frames}: a temporal step of {cls.published_name} shows 2 frames, so 2 or more."
            )

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
    def least_projected(self) -> tuple[int, ...]:
        return self.tower.merge_size**2, self.model.config.vision_config.hidden_size

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

    def shown(self, visual: VisualInputs) -> list[Tensor]:
        config, merge, shape = self.model.config.vision_config, self.tower.merge_size, visual.shapes[0]
        rows, cols = shape.grid
        pixels = visual.tensors["pixel_values" if visual.images else "pixel_values_videos"]
        # Each merge unit's patches follow one another; an image fills the temporal steps of a patch with itself.
        patches = pixels[: shape.num_crops * rows * cols * merge**2].view(
            shape.num_crops,
            rows,
            cols,
            merge,
            merge,
            config.in_channels,
            config.temporal_patch_size,
            config.patch_size,
            config.patch_size,
        )[..., 0, :, :]
        height, width = self._pixels(rows, cols)
        return list(patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, config.in_channels, height, width))

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

    def blank_videos(self, num_videos: int, num_frames: int) -> dict[str, Tensor]:
        """Frames of about 250 visual tokens a temporal step."""
        steps, side = -(-num_frames // self._frames_per_step), 16 * self.tower.merge_size
        return {
            "pixel_values_videos": torch.ones(num_videos * steps * side**2, self._values_of_a_patch()),
            "video_grid_thw": torch.tensor([[steps, side, side]] * num_videos),
        }

    @property
    def _frames_per_step(self) -> int:
        return int(self.model.config.vision_config.temporal_patch_size)

    def prepare_videos(
        self, videos: Sequence[VideoSource], processor: Any, num_frames: int | None
    ) -> dict[str, Tensor]:
        config = self.model.config.vision_config
        return self.video_rules.of(settings_of(processor), config, self.options, num_frames).prepare(videos)

    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        return [self._shape("image", grid) for grid in self._grids(tensors, "pixel_values", "image_grid_thw")]

    def video_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        grids = self._grids(tensors, "pixel_values_videos", "video_grid_thw")
        seconds = tensors.get("second_per_grid_ts")
        if seconds is None:
            return [self._shape("video", grid) for grid in grids]
        if tuple(seconds.shape) != (len(grids),):
            raise PromptError(
                f"second_per_grid_ts has shape {tuple(seconds.shape)}: must be [videos], the seconds of a temporal step"
                f" of each of the {len(grids)} in video_grid_thw."
            )
        return [self._shape("video", grid, each) for grid, each in zip(grids, seconds.tolist(), strict=True)]

    def _grids(self, tensors: Mapping[str, Tensor], pixels: str, name: str) -> list[Grid]:
        """Grids of all images or of all videos; ``pixels`` and ``name`` are the processor's names of both tensors."""
        pixel_values, grid_thw = tensors.get(pixels), tensors.get(name)
        if pixel_values is None and grid_thw is None:
            return []
        what = name.partition("_")[0]
        if pixel_values is None or grid_thw is None:
            helper = " and preprocess_images return" if what == "image" else " returns"
            raise PromptError(
                f"{pixels if pixel_values is None else name} is missing: {self.published_name}'s processor{helper}"
                f" both, the patches of all {what}s and the grid of each."
            )
        merge = self.tower.merge_size
        if grid_thw.ndim != 2 or grid_thw.shape[1] != 3 or grid_thw.is_floating_point():
            raise PromptError(
                f"{name} is {grid_thw.dtype} of shape {tuple(grid_thw.shape)}: must be integers [{what}s, 3],"
                f" the (temporal steps, rows, columns) of patches of each {what}."
            )
        grids: list[Grid] = [(step, row, col) for step, row, col in grid_thw.tolist()]
        most = 1 if what == "image" else math.inf
        if bad := [g for g in grids if not 1 <= g[0] <= most or min(g) < 1 or g[1] % merge or g[2] % merge]:
            steps = "an image has 1 temporal step" if what == "image" else "a video has 1 temporal step or more"
            raise PromptError(
                f"{name} holds {bad[0]}: {steps}, and its rows and columns of patches are multiples of {merge}."
            )
        expected = (sum(step * row * col for step, row, col in grids), self._values_of_a_patch())
        if tuple(pixel_values.shape) != expected:
            raise PromptError(
                f"{pixels} has shape {tuple(pixel_values.shape)}: must be [patches, values of a patch], here"
                f" {list(expected)}, since {name} counts {expected[0]} patches."
            )
        return grids

    def _shape(self, kind: Literal["image", "video"], grid: Grid, seconds: float | None = None) -> VisionShape:
        steps, rows, cols = grid[0], grid[1] // self.tower.merge_size, grid[2] // self.tower.merge_size
        num_units = steps * rows * cols
        return TimedShape(kind, steps, (rows, cols), False, num_units, fixed=False, seconds_per_step=seconds)

    def image_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        return self._outputs(visual.tensors["pixel_values"], visual.images, signals, stage)

    def video_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        return self._outputs(visual.tensors["pixel_values_videos"], visual.videos, signals, stage)

    def _outputs(
        self, pixel_values: Tensor, shapes: Sequence[VisionShape], signals: frozenset[Signal], stage: Stage
    ) -> list[Group]:
        with stage("tower"):
            vision = self._run(pixel_values, [self._grid(shape) for shape in shapes], signals)
        groups: dict[tuple[int, int], list[int]] = {}
        for number, shape in enumerate(shapes):
            groups.setdefault(shape.grid, []).append(number)
        return [(members, _of_members(vision, shapes, members, grid)) for grid, members in groups.items()]

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
        ids, types = list[int](), list[int]()
        shapes = [segment for segment in segments if isinstance(segment, VisionShape)]
        for segment in segments:
            if isinstance(segment, VisionShape):
                ids += [self.image_token_id if segment.kind == "image" else self.video_token_id] * segment.num_vanilla
                types += [1 if segment.kind == "image" else 2] * segment.num_vanilla
            else:
                ids += segment
                types += [0] * len(segment)
        if not ids:  # a prompt that is all padding
            return torch.zeros(3, 0, dtype=torch.int64)
        arguments: dict[str, Tensor] = {}
        for kind in ("image", "video"):
            if own := [shape for shape in shapes if shape.kind == kind]:
                arguments[f"{kind}_grid_thw"] = torch.tensor([self._grid(shape) for shape in own])
        seconds = [shape.seconds_per_step for shape in shapes if isinstance(shape, TimedShape)]
        if timed := [each for each in seconds if each is not None]:
            arguments["second_per_grid_ts"] = torch.tensor(timed)
        model: Any = self.model.get_submodule("model")
        found: Tensor = model.get_rope_index(torch.tensor([ids]), torch.tensor([types]), **arguments)[0]
        return found[:, 0]


@dataclass(frozen=True)
class TimedShape(VisionShape):
    """Of an image, or of a video whose temporal steps last ``seconds_per_step`` (None: what the model takes)."""

    seconds_per_step: float | None = None


def _of_members(
    vision: VisionOutput, shapes: Sequence[VisionShape], members: Sequence[int], grid: tuple[int, int]
) -> VisionOutput:
    """Images (or the temporal steps of videos) of one grid, out of what the tower made of all: ``[N, U, ...]``."""
    sizes = [shape.num_vanilla for shape in shapes]

    def own(values: Tensor) -> Tensor:
        parts = values[0].split(sizes)
        return torch.cat([parts[number].unflatten(0, (shapes[number].num_crops, -1)) for number in members])

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
