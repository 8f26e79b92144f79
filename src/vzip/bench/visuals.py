"""What a prompt shows, family by family: single pictures, the crops of one picture, the frames of one video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vzip.errors import ConfigError
from vzip.media.images import prepare_pictures
from vzip.models.families import Adapter, LlavaNextAdapter, MiniGeminiAdapter, VideoLlavaAdapter
from vzip.models.towers.structure import Tower, find_tower

PICTURE_SIZE = (640, 480)


class Visuals:
    """Pictures for a vision tower that is measured alone.

    Attributes:
        num_crops: inputs of the vision tower in each prompt.
        num_files: pictures made for each prompt.
        picture_size: their (width, height).
        tower_module: the vision tower that reads them, as Hugging Face's module.
        tower: the same, taken apart.
        stock_offset: first row of its output that the unmodified model uses.
    """

    def __init__(self, tower_module: nn.Module, num_crops: int) -> None:
        self.num_crops = self.num_files = num_crops
        self.picture_size = PICTURE_SIZE
        self.tower_module = tower_module
        self.tower: Tower = find_tower(tower_module)
        self.stock_offset = int(self.tower.geometry.has_cls)

    def describe(self) -> str:
        """What each prompt shows, in words."""
        return f"{self.num_crops} picture{'s' if self.num_crops > 1 else ''}"

    def prepare(self, pictures: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        """The batch's pictures -> the model's inputs."""
        return prepare_pictures(pictures, image_processor, "llava")

    def crops(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs -> ``[N, 3, h, w]``, one row an input of the vision tower."""
        return inputs["pixel_values"]

    def tower_inputs(self, crops: Tensor) -> Tensor:
        """Crops as the vision tower takes them."""
        return crops


class Pictures(Visuals):
    """Pictures of one crop each, for a whole model.

    Attributes:
        adapter: of the model.
        num_placeholders: in each prompt.
        placeholder: id of the placeholder.
    """

    def __init__(self, adapter: Adapter, num_crops: int) -> None:
        super().__init__(adapter.vision_tower, num_crops)
        self.adapter = adapter
        self.stock_offset = adapter.stock_offset
        self.num_placeholders = num_crops
        self.placeholder = adapter.image_token_id

    def vanilla_tokens(self) -> int:
        """Visual tokens of each prompt in the unmodified model."""
        return sum(self.adapter.expanded_lengths(self.num_crops, None))

    def prepare(self, pictures: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        return self.adapter.prepare_pictures(pictures, image_processor, "llava")

    def crops(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.adapter.crops(**self._arranged(inputs))[0]

    def tower_inputs(self, crops: Tensor) -> Tensor:
        return self.adapter.low_res(crops) if isinstance(self.adapter, MiniGeminiAdapter) else crops

    def pack(self, projected: Tensor, kept: Tensor | None, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Projected tokens ``[N, K, d_text]`` -> for each placeholder ``[num_visual_tokens, d_text]``.

        ``kept`` as ``Adapter.pack`` takes it, for all crops: ``[N, num_kept]``, or None without compression.
        """
        arranged = self._arranged(inputs)
        each = self.num_crops // self.num_placeholders
        return self.adapter.pack(
            projected.split(each),
            arranged["image_sizes"],
            None if kept is None else kept.split(each),
            arranged["tile_grids"],
        )

    def _arranged(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return {name: inputs.get(name) for name in ("pixel_values", "image_sizes", "tile_grids")}


class Crops(Pictures):
    """LLaVA-NeXT: one picture, of a shape that is cut into so many crops and has no padding."""

    def __init__(self, adapter: LlavaNextAdapter, num_crops: int) -> None:
        super().__init__(adapter, num_crops)
        side = adapter.geometry.image_size
        # Where a wide and a tall picture have as many crops: the wide one, which the checkpoints list first.
        sizes = reversed(adapter.pinpoints)
        by_count = {1 + height // side * (width // side): (width, height) for height, width in sizes}
        if num_crops not in by_count:
            allowed = ", ".join(map(str, sorted(by_count)))
            raise ConfigError(
                f"num_crops={num_crops}: LLaVA-NeXT cuts its picture into a base crop and tiles, by this checkpoint's"
                f" resolutions {allowed} crops; choose one of these"
            )
        self.num_placeholders = self.num_files = 1
        self.picture_size = by_count[num_crops]

    def describe(self) -> str:
        return f"one picture in {self.num_crops} crops"

    def vanilla_tokens(self) -> int:
        width, height = self.picture_size
        return self.adapter.expanded_lengths(1, torch.tensor([[height, width]]))[0]


class Frames(Pictures):
    """Video-LLaVA: one video, through the tower for videos."""

    def __init__(self, adapter: VideoLlavaAdapter, num_crops: int) -> None:
        super().__init__(adapter, num_crops)
        self.num_placeholders = 1
        self.tower_module, self.tower = adapter.video_tower, adapter.frame_tower
        self.stock_offset = adapter.frame_offset
        assert adapter.video_token_id is not None
        self.placeholder = adapter.video_token_id

    def describe(self) -> str:
        return f"one video of {self.num_crops} frames"

    def vanilla_tokens(self) -> int:
        return self.adapter.video_lengths(torch.empty(1, self.num_crops, 3, 0, 0))[0]

    def prepare(self, pictures: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        videos = [pictures[start : start + self.num_crops] for start in range(0, len(pictures), self.num_crops)]
        return self.adapter.prepare_videos(videos, image_processor, self.num_crops)

    def crops(self, inputs: dict[str, Tensor]) -> Tensor:
        return inputs["pixel_values_videos"].flatten(0, 1)

    def pack(self, projected: Tensor, kept: Tensor | None, inputs: dict[str, Tensor]) -> list[Tensor]:
        return [video.flatten(0, 1) for video in projected.split(self.num_crops)]


def visuals_of(adapter: Adapter, num_crops: int) -> Pictures:
    """What the prompts of a model show.

    Raises:
        ConfigError: a number of crops that the family does not make.
    """
    if isinstance(adapter, LlavaNextAdapter):
        return Crops(adapter, num_crops)
    if isinstance(adapter, VideoLlavaAdapter):
        return Frames(adapter, num_crops)
    return Pictures(adapter, num_crops)
