"""Video-LLaVA (``VideoLlavaForConditionalGeneration``): images and videos, each through a vision tower of its own.

A video is a row of frames: each is scored, selected from and merged by itself, and the frames' tokens follow each
other. Without compression a frame keeps its CLS token and an image does not, as in Hugging Face's class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaProcessor, VideoLlavaForConditionalGeneration

from vzip.compressors.vision import Signal, VisionOutput, VisionShape
from vzip.errors import ConfigError, PromptError
from vzip.media.images import Preprocess, load_image
from vzip.media.video import DEFAULT_NUM_FRAMES, VideoSource, load_video, prepare_videos

from ...towers.structure import Tower, find_tower
from ..base import Stage, TowerRun, VisualInputs, no_stage
from ..llava.adapter import LlavaAdapter
from ..options import FamilyOptions
from ..original.checkpoint import OriginalCheckpoint
from .modeling import PublishedVideoLlavaForConditionalGeneration
from .pixels import frame_pixels, image_pixels
from .published import find_published
from .tower import CLIP_FRAMES

_LAYOUT = "[videos, frames, 3, height, width]"


class VideoLlavaAdapter(LlavaAdapter):
    """An image tower and a video tower of the same kind, one projector, any language model."""

    model_class = VideoLlavaForConditionalGeneration
    input_names = ("pixel_values", "pixel_values_images", "pixel_values_videos")
    has_video = True
    learns_videos = True
    default_num_frames: ClassVar[int] = DEFAULT_NUM_FRAMES
    # All rows of the tower: Hugging Face's class cuts CLS off images only, whatever its select strategy.
    frame_offset: ClassVar[int] = 0

    def __init__(self, model: Any, *args: Any) -> None:
        super().__init__(model, *args)
        self.frame_tower: Tower = find_tower(self.video_tower)
        self.video_token_id = model.config.video_token_id

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.image_tower")

    @property
    def video_tower(self) -> nn.Module:
        """The video tower as Hugging Face's module; it sees each frame alone."""
        return self.model.get_submodule("model.video_tower")

    @classmethod
    def original(cls, directory: Path) -> OriginalCheckpoint | None:
        return None  # its authors' has a video tower that this class lacks

    @classmethod
    def hf_processor(cls, directory: Path) -> Any:
        """Tokenizer, image processor and chat template.

        Hugging Face's ``VideoLlavaProcessor`` cannot be made without torchvision, for its video processor. Frames go
        through the image processor here, and ``LlavaProcessor`` reads the same files without that part.
        """
        return LlavaProcessor.from_pretrained(directory, trust_remote_code=False)

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        prepared = super().prepare_images(images, image_processor, preprocess)
        # The processor's own name for them, which Hugging Face is about to change.
        return {"pixel_values" if name == "pixel_values_images" else name: value for name, value in prepared.items()}

    def blank_videos(self, num_videos: int, num_frames: int) -> dict[str, Tensor]:
        side = self.image_side
        return {"pixel_values_videos": torch.ones(num_videos, num_frames, 3, side, side)}

    def prepare_videos(
        self, videos: Sequence[VideoSource], processor: Any, num_frames: int | None
    ) -> dict[str, Tensor]:
        num_frames = self.default_num_frames if num_frames is None else num_frames
        return {"pixel_values_videos": prepare_videos(videos, processor.image_processor, num_frames)}

    def read_inputs(self, **processor_outputs: Tensor | None) -> VisualInputs:
        """Raises PromptError also where images are given under both of their names."""
        images = processor_outputs.pop("pixel_values_images", None)
        if images is not None:
            if processor_outputs.get("pixel_values") is not None:
                raise PromptError(
                    "pixel_values and pixel_values_images are two names of the same images: give one of them."
                )
            processor_outputs["pixel_values"] = images
        return super().read_inputs(**processor_outputs)

    def video_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        pixel_values_videos = tensors.get("pixel_values_videos")
        if pixel_values_videos is None:
            return []
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[1] == 0:
            raise PromptError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}: this model takes {_LAYOUT} with at"
                " least one frame, as preprocess_videos and its Hugging Face processor return them."
            )
        num_videos, num_frames = pixel_values_videos.shape[:2]
        geometry = self.geometry
        num_rows = geometry.num_patches + int(geometry.has_cls) - self.frame_offset
        return [VisionShape("video", num_frames, geometry.grid, geometry.has_cls, num_frames * num_rows)] * num_videos

    def video_output(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> VisionOutput:
        pixels = self.video_pixels(visual)
        with stage("tower"):
            vision = (run or self.run_tower)(self.frame_tower, pixels, signals, self.frame_offset)
        return replace(vision, project=self.projector)

    def video_pixels(self, visual: VisualInputs) -> Tensor:
        return visual.tensors["pixel_values_videos"].flatten(0, 1)


class PublishedVideoLlavaAdapter(VideoLlavaAdapter):
    """Its authors' model, whose video tower joins the frames of a clip; pixels are those of their scripts."""

    model_class = PublishedVideoLlavaForConditionalGeneration
    cannot_use: ClassVar[Mapping[str, str]] = {"pruned": "each patch attends to its own place in the other frames"}

    @classmethod
    def original(cls, directory: Path) -> OriginalCheckpoint | None:
        return find_published(directory)

    @classmethod
    def check_options(cls, options: FamilyOptions, num_frames: int | None = None) -> None:
        super().check_options(options, num_frames)
        if num_frames is not None and num_frames % CLIP_FRAMES:
            raise ConfigError(
                f"model.num_frames={num_frames}: the video tower of Video-LLaVA as published sees clips of"
                f" {CLIP_FRAMES} frames, so it must be a multiple of {CLIP_FRAMES}. Hugging Face's class takes any"
                " (model=video_llava_7b_hf)."
            )

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        if preprocess == "hf":
            return super().prepare_images(images, image_processor, preprocess)
        return {"pixel_values": image_pixels([load_image(image) for image in images], image_processor)}

    def prepare_videos(
        self, videos: Sequence[VideoSource], processor: Any, num_frames: int | None
    ) -> dict[str, Tensor]:
        num_frames = self.default_num_frames if num_frames is None else num_frames
        made = [frame_pixels(load_video(video, num_frames), processor.image_processor) for video in videos]
        return {"pixel_values_videos": torch.stack(made)}

    def video_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        shapes = super().video_shapes(tensors)
        if shapes and shapes[0].num_crops % CLIP_FRAMES:
            raise PromptError(
                f"pixel_values_videos has {shapes[0].num_crops} frames a video: the video tower sees clips of"
                f" {CLIP_FRAMES}, so it must be a multiple of {CLIP_FRAMES}. preprocess_videos takes as many of a file"
                " as num_frames says."
            )
        return shapes
