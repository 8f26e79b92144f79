"""What a prompt shows, family by family: single images, the crops of one image, the frames of one video."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from vzip.compressors import VisionShape
from vzip.errors import ConfigError
from vzip.media.images import prepare_images
from vzip.models.families import (
    Adapter,
    FamilyOptions,
    InternVlAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    Qwen2_5VlAdapter,
    VideoLlavaAdapter,
)
from vzip.models.families.internvl.processing import MAX_TILES
from vzip.models.families.llava_base import LlavaBase
from vzip.models.towers.structure import Tower, find_tower

IMAGE_SIZE = (640, 480)


class Visuals:
    """Images for a vision tower that is measured alone.

    Attributes:
        num_crops: inputs of the vision tower in each prompt.
        num_files: images made for each prompt.
        image_size: their (width, height).
        tower_module: the vision tower that reads them, as Hugging Face's module.
        tower: the same, taken apart.
        has_tower: whether it is; otherwise only the family runs it.
        stock_offset: first row of its output that the unmodified model uses.
    """

    has_tower = True

    def __init__(self, tower_module: nn.Module, num_crops: int) -> None:
        self.num_crops = self.num_files = num_crops
        self.image_size = IMAGE_SIZE
        self.tower_module = tower_module
        if self.has_tower:
            self.tower: Tower = find_tower(tower_module)
            self.stock_offset = int(self.tower.geometry.has_cls)

    def describe(self) -> str:
        """What each prompt shows, in words."""
        return f"{self.num_crops} image{'s' if self.num_crops > 1 else ''}"

    def prepare(self, images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        """The batch's images -> the model's inputs."""
        return prepare_images(images, image_processor, "llava")

    def tower_inputs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs -> ``[N, 3, h, w]``, one row an input of the vision tower, as it takes them."""
        return inputs["pixel_values"]


class Images(Visuals):
    """Images of one crop each, for a whole model.

    Attributes:
        adapter: of the model.
        num_placeholders: in each prompt.
        text_between: whether text stands between them.
        placeholder: id of the placeholder.
    """

    adapter: Adapter
    text_between = False

    def __init__(self, adapter: LlavaBase, num_crops: int) -> None:
        super().__init__(adapter.vision_tower, num_crops)
        self.adapter = adapter
        self.stock_offset = adapter.stock_offset
        self.num_placeholders = num_crops
        self.placeholder = adapter.image_token_id

    def prepare(self, images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        return self.adapter.prepare_images(images, image_processor, "llava")

    def tower_inputs(self, inputs: dict[str, Tensor]) -> Tensor:
        assert isinstance(self.adapter, LlavaBase)
        return self.adapter.image_pixels(self.adapter.read_inputs(**inputs))

    def blank(self) -> dict[str, Tensor]:
        """A prompt's inputs without data."""
        assert isinstance(self.adapter, LlavaBase)
        side = self.adapter.image_side
        return {"pixel_values": torch.empty(self.num_crops, 3, side, side, device="meta")}

    def shapes(self) -> list[VisionShape]:
        """Of what a prompt shows."""
        return self.adapter.read_inputs(**self.blank()).shapes


class Crops(Images):
    """LLaVA-NeXT, LLaVA-OneVision: one image, of a shape that is cut into so many crops and has no padding."""

    def __init__(self, adapter: LlavaNextAdapter, num_crops: int) -> None:
        super().__init__(adapter, num_crops)
        side = adapter.geometry.image_size
        # Where a wide and a tall image have as many crops: the wide one, which the checkpoints list first.
        sizes = reversed(adapter.pinpoints)
        by_count = {1 + height // side * (width // side): (width, height) for height, width in sizes}
        if num_crops not in by_count:
            allowed = ", ".join(map(str, sorted(by_count)))
            raise ConfigError(
                f"num_crops={num_crops}: {adapter.model_class.__name__} cuts its image into a base crop and tiles,"
                f" by this checkpoint's resolutions {allowed} crops; choose one of these"
            )
        self.num_placeholders = self.num_files = 1
        self.image_size = by_count[num_crops]

    def describe(self) -> str:
        return f"one image in {self.num_crops} crops"

    def blank(self) -> dict[str, Tensor]:
        width, height = self.image_size
        pixels = next(iter(super().blank().values()))
        return {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}


class Tiles(Images):
    """InternVL: one wide image in a row of tiles, and its thumbnail."""

    def __init__(self, adapter: InternVlAdapter, num_crops: int) -> None:
        super().__init__(adapter, num_crops)
        allowed = [1, *range(3, MAX_TILES + 2)]
        if num_crops not in allowed:
            raise ConfigError(
                f"num_crops={num_crops}: InternVL makes one tile of an image, or 2 to {MAX_TILES} and a thumbnail;"
                f" choose one of {', '.join(map(str, allowed))}"
            )
        self.num_placeholders = self.num_files = 1
        self.image_size = (max(num_crops - 1, 1) * adapter.image_side, adapter.image_side)

    def describe(self) -> str:
        return f"one image in {self.num_crops} tiles, its thumbnail one of them" if self.num_crops > 1 else "one image"

    def prepare(self, images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        return self.adapter.prepare_images(images, image_processor, self.adapter.check_preprocess(None))

    def blank(self) -> dict[str, Tensor]:
        return {**super().blank(), "num_patches": torch.tensor([self.num_crops])}


class Frames(Images):
    """Video-LLaVA, LLaVA-Video: one video, through the tower for videos."""

    def __init__(self, adapter: VideoLlavaAdapter | LlavaOnevisionAdapter, num_crops: int) -> None:
        super().__init__(adapter, num_crops)
        self.num_placeholders = 1
        self.tower_module, self.tower = adapter.video_tower, adapter.frame_tower
        self.stock_offset = adapter.frame_offset
        assert adapter.video_token_id is not None
        self.placeholder = adapter.video_token_id

    def describe(self) -> str:
        return f"one video of {self.num_crops} frames"

    def blank(self) -> dict[str, Tensor]:
        return {"pixel_values_videos": next(iter(super().blank().values()))[None]}

    def prepare(self, images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        videos = [images[start : start + self.num_crops] for start in range(0, len(images), self.num_crops)]
        processor = SimpleNamespace(image_processor=image_processor)  # all that these families need of one
        return self.adapter.prepare_videos(videos, processor, self.num_crops)

    def tower_inputs(self, inputs: dict[str, Tensor]) -> Tensor:
        assert isinstance(self.adapter, LlavaBase)
        return self.adapter.video_pixels(self.adapter.read_inputs(**inputs))


class AnySize(Images):
    """Qwen2.5-VL, Qwen3-VL: one image of about a thousand visual tokens."""

    has_tower = False

    def __init__(self, adapter: Adapter, num_crops: int) -> None:
        Visuals.__init__(self, adapter.vision_tower, num_crops)
        self.adapter = adapter
        self.num_placeholders, self.placeholder = 1, adapter.image_token_id
        *_, height, width = adapter.shown(adapter.read_inputs(**adapter.blank_images(1)))[0].shape
        self.image_size = (width, height)

    def describe(self) -> str:
        return f"an image of {self.image_size[0]} x {self.image_size[1]}"

    def prepare(self, images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        return self.adapter.prepare_images(images, image_processor, self.adapter.check_preprocess(None))

    def blank(self) -> dict[str, Tensor]:
        return self.adapter.blank_images(1)


class Steps(AnySize):
    """Qwen2.5-VL, Qwen3-VL: one video of so many temporal steps, each of about 250 visual tokens."""

    adapter: Qwen2_5VlAdapter

    def __init__(self, adapter: Qwen2_5VlAdapter, num_crops: int) -> None:
        Visuals.__init__(self, adapter.vision_tower, num_crops)
        self.adapter, config = adapter, adapter.model.config.vision_config
        assert adapter.video_token_id is not None
        self.placeholder, self.text_between = adapter.video_token_id, adapter.writes_steps
        self.num_placeholders = num_crops if adapter.writes_steps else 1
        self.num_files = num_crops * config.temporal_patch_size
        _, rows, cols = self.blank()["video_grid_thw"][0].tolist()
        self.image_size = (cols * config.patch_size, rows * config.patch_size)

    def describe(self) -> str:
        return f"a video of {self.num_files} frames of {self.image_size[0]} x {self.image_size[1]}"

    def blank(self) -> dict[str, Tensor]:
        return self.adapter.blank_videos(1, self.num_files)

    def prepare(self, images: Sequence[Image.Image], image_processor: Any) -> dict[str, Tensor]:
        num_pixels = self.image_size[0] * self.image_size[1]
        as_they_are = FamilyOptions(min_frame_pixels=num_pixels, max_frame_pixels=num_pixels)
        rules = self.adapter.video_rules.of({}, self.adapter.model.config.vision_config, as_they_are, None)
        videos = [images[start : start + self.num_files] for start in range(0, len(images), self.num_files)]
        return rules.prepare(videos)


def visuals_of(adapter: Adapter, num_crops: int, medium: Literal["image", "video"] = "image") -> Images:
    """What the prompts of a model show.

    Raises:
        ConfigError: a number of crops that the family does not make.
    """
    if isinstance(adapter, LlavaOnevisionAdapter) and medium == "video":
        return Frames(adapter, num_crops)
    if isinstance(adapter, LlavaNextAdapter):
        return Crops(adapter, num_crops)
    if isinstance(adapter, InternVlAdapter):
        return Tiles(adapter, num_crops)
    if isinstance(adapter, VideoLlavaAdapter):
        return Frames(adapter, num_crops)
    if isinstance(adapter, LlavaBase):
        return Images(adapter, num_crops)
    if num_crops > 1 and isinstance(adapter, Qwen2_5VlAdapter):
        return Steps(adapter, num_crops)
    return AnySize(adapter, num_crops)
