"""Video-LLaVA (``VideoLlavaForConditionalGeneration``): pictures and videos, each through a vision tower of its own.

A video is a row of frames: each is scored, selected from and merged by itself, and the frames' tokens follow each
other. Without compression a frame keeps its CLS token and a picture does not, as in Hugging Face's class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn
from transformers import LlavaProcessor, VideoLlavaForConditionalGeneration

from vzip.compressors.base import Compressor
from vzip.errors import PromptError
from vzip.media.images import Preprocess
from vzip.media.video import VideoSource, prepare_videos

from ...towers.structure import Tower, find_tower
from ..llava.adapter import LlavaAdapter

_LAYOUT = "[videos, frames, 3, height, width]"


class VideoLlavaAdapter(LlavaAdapter):
    """An image tower and a video tower of the same kind, one projector, any language model."""

    model_class = VideoLlavaForConditionalGeneration
    has_video = True
    # All rows of the tower: Hugging Face's class cuts CLS off pictures only, whatever its select strategy.
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
    def load_processor(cls, directory: Path) -> Any:
        """Tokenizer, image processor and chat template.

        Hugging Face's ``VideoLlavaProcessor`` cannot be made without torchvision, for its video processor. Frames go
        through the image processor here, and ``LlavaProcessor`` reads the same files without that part.
        """
        return LlavaProcessor.from_pretrained(directory)

    def prepare_pictures(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        prepared = super().prepare_pictures(images, image_processor, preprocess)
        # The processor's own name for them, which Hugging Face is about to change.
        return {"pixel_values" if name == "pixel_values_images" else name: value for name, value in prepared.items()}

    def prepare_videos(self, videos: Sequence[VideoSource], image_processor: Any, num_frames: int) -> dict[str, Tensor]:
        return {"pixel_values_videos": prepare_videos(videos, image_processor, num_frames)}

    def video_lengths(self, pixel_values_videos: Tensor) -> list[int]:
        if pixel_values_videos.ndim != 5 or pixel_values_videos.shape[1] == 0:
            raise PromptError(
                f"pixel_values_videos has shape {tuple(pixel_values_videos.shape)}: this model takes {_LAYOUT} with at"
                " least one frame, as preprocess_videos and its Hugging Face processor return them."
            )
        num_videos, num_frames = pixel_values_videos.shape[:2]
        num_rows = self.geometry.num_patches + int(self.geometry.has_cls)
        return [num_frames * (num_rows - self.frame_offset)] * num_videos

    def encode_videos(self, pixel_values_videos: Tensor, compressor: Compressor) -> list[Tensor]:
        num_videos = len(self.video_lengths(pixel_values_videos))
        frames = pixel_values_videos.flatten(0, 1)
        vision = self.run_through_cache(
            self.frame_tower, frames, compressor.requires, self.frame_offset, compressor.score_layer
        )
        projected = self.projector(compressor(vision).tokens)
        return list(projected.reshape(num_videos, -1, projected.shape[-1]))
