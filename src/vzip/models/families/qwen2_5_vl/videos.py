"""From video files to what Qwen's video processors return, without torchvision, which these need.

Which frames are taken, how large they become and how they are cut into patches are the rules of transformers'
``Qwen2VLVideoProcessor`` and (``Qwen3VideoRules``) ``Qwen3VLVideoProcessor``, bit for bit: torch resizes as torchvision
does.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vzip.errors import UnsupportedModelError, VideoError
from vzip.media.video import SampledVideo, VideoSource, read_video

from ..options import FamilyOptions

# Where a checkpoint says how it takes videos, in the order in which transformers looks.
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Transformers refuses more oblong images and frames: at 28 pixels high, 200:1 is 5600 wide.
MAX_ASPECT_RATIO = 200
UNKNOWN_FPS = 24.0  # transformers takes this for a file that does not say


def read_settings(directory: Path) -> dict[str, Any]:
    """What a checkpoint's files say of videos; empty where they say nothing, and the class's own values hold."""
    if (file := directory / "processor_config.json").is_file():
        nested = json.loads(file.read_text(encoding="utf-8")).get("video_processor")
        if nested is not None:
            return dict(nested)
    for name in _FILES:
        if (file := directory / name).is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
    return {}


def settings_of(processor: Any) -> dict[str, Any]:
    """The same of a processor: ours, or Hugging Face's with its own part for videos."""
    video_processor = getattr(processor, "video_processor", None)
    return dict(processor.video_settings if video_processor is None else video_processor.to_dict())


@dataclass(frozen=True)
class VideoRules:
    """How Qwen2.5-VL takes videos.

    Attributes:
        patch_size, merge_size: of the vision tower, in pixels and in patches.
        frames_per_step: frames that one temporal step shows.
        smallest, largest: pixels that a frame has at least and at most.
        num_frames: how many are taken; None: ``fps``.
        fps: how many are taken of each second.
        min_frames, max_frames: bounds of what ``fps`` comes to.
        mean, std: of each colour, 0 to 1.
        caps_pixels: whether long videos get smaller frames (``cap_pixels_per_frame``).
        max_video_tokens: what decides how small.
        frame_smallest, frame_largest: pixels of a frame that the user asks for; None: by all the others.
    """

    smallest: int = 128 * 28 * 28
    largest: int = 768 * 28 * 28
    patch_size: int = 14
    merge_size: int = 2
    frames_per_step: int = 2
    num_frames: int | None = None
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    mean: Sequence[float] = _CLIP[0]
    std: Sequence[float] = _CLIP[1]
    caps_pixels: bool = False
    max_video_tokens: int = 128_000
    frame_smallest: int | None = None
    frame_largest: int | None = None

    takes_bounds: ClassVar[bool] = True  # min_pixels and max_pixels in the files stand for ``size``
    times_name: ClassVar[str] = "second_per_grid_ts"

    @classmethod
    def of(
        cls, settings: Mapping[str, Any], vision_config: Any, options: FamilyOptions, num_frames: int | None
    ) -> VideoRules:
        """By a checkpoint's files (``read_settings``), its configuration, and what the user has set.

        Raises:
            UnsupportedModelError: files that leave out a step, or resize in another way.
        """
        for name, needed in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", 3)):
            if settings.get(name, needed) not in (needed, None):
                raise UnsupportedModelError(
                    f"the checkpoint's files set {name}={settings[name]!r} for videos: only {needed!r} is served."
                )
        size = settings.get("size") or {}
        names: dict[str, Any] = {
            "smallest": size.get("shortest_edge"),
            "largest": size.get("longest_edge"),
            "num_frames": settings.get("num_frames"),
            "fps": settings.get("fps"),
            "min_frames": settings.get("min_frames"),
            "max_frames": settings.get("max_frames"),
            "mean": settings.get("image_mean"),
            "std": settings.get("image_std"),
            "caps_pixels": settings.get("cap_pixels_per_frame"),
            "max_video_tokens": settings.get("max_video_tokens"),
        }
        if cls.takes_bounds:
            bounds = {"smallest": settings.get("min_pixels"), "largest": settings.get("max_pixels")}
            names |= {name: value for name, value in bounds.items() if value is not None}
        rules = cls(
            patch_size=vision_config.patch_size,
            merge_size=vision_config.spatial_merge_size,
            frames_per_step=vision_config.temporal_patch_size,
            **{name: value for name, value in names.items() if value is not None},
        )
        if num_frames is not None:
            rules = replace(rules, num_frames=num_frames)
        elif options.fps is not None:
            rules = replace(rules, num_frames=None, fps=options.fps)
        return replace(
            rules,
            frame_smallest=options.min_frame_pixels,
            frame_largest=options.max_frame_pixels,
        )

    def sample(self, num_available: int, fps: float | None) -> list[int]:
        """The numbers of the frames taken of a file; of one with less than a temporal step its first, repeated.

        More frames than a file has are never asked for: transformers refuses that, here all of them are taken.
        """
        step = self.frames_per_step
        most = num_available // step * step
        if most == 0:
            return [0] * step
        wanted = num_available / (fps or UNKNOWN_FPS) * self.fps
        if self.num_frames is not None:
            num_taken = min(round(self.num_frames / step) * step, most)
        else:
            limit = min(self.max_frames // step * step, most)
            num_taken = math.floor(min(max(wanted, self.min_frames), limit) / step) * step
        return torch.arange(0, num_available, num_available / max(num_taken, step)).int().tolist()

    def of_images(self, num_available: int, _fps: float | None) -> list[int]:
        """The same of frames given as images: all, which are taken to be ``fps`` a second, unless counts are set."""
        return list(range(num_available)) if self.num_frames is None else self.sample(num_available, self.fps)

    def frame_size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """(height, width) to which frames are resized."""
        smallest, largest, factor = self.smallest, self.largest, self.patch_size * self.merge_size
        if self.caps_pixels:
            total = int(self.max_video_tokens * factor * factor * 0.9)
            share = total * self.frames_per_step // num_frames
            largest = max(min(largest, share), int(smallest * 1.05))
        return _fitted(height, width, factor, *self._bounds(smallest, largest))

    def _bounds(self, smallest: int, largest: int, num_frames: int = 1) -> tuple[int, int]:
        """The bounds of so many frames; where the user has set one, another that contradicts it does not hold."""
        if self.frame_smallest is not None:
            smallest = self.frame_smallest * num_frames
            largest = largest if largest >= smallest else sys.maxsize
        if self.frame_largest is not None:
            largest = self.frame_largest * num_frames
            smallest = smallest if smallest <= largest else 1
        return smallest, largest

    def read(self, source: VideoSource) -> SampledVideo:
        """Frames of a file, or of images.

        Raises:
            VideoError: frames that are more oblong than 200:1, or of several sizes; and as ``read_video``.
        """
        is_file = isinstance(source, str | Path)
        video = read_video(source, self.sample if is_file else self.of_images)
        width, height = video.frames[0].size
        if any(frame.size != (width, height) for frame in video.frames):
            raise VideoError("The frames of a video are of several sizes: give images of one size.")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise VideoError(
                f"{source if is_file else 'A video'}: frames of {width} x {height} pixels are more oblong than"
                f" {MAX_ASPECT_RATIO}:1, which Qwen's video processor does not take. Crop the video."
            )
        fps = (video.fps or UNKNOWN_FPS) if is_file else self.fps
        return replace(video, fps=fps)

    def pixels(self, frames: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int, int]]:
        """``[patches, values of a patch]`` of a video, and its (temporal steps, rows, columns) of patches."""
        values = torch.stack([torch.from_numpy(np.array(frame)) for frame in frames]).permute(0, 3, 1, 2)
        height, width = self.frame_size(values.shape[2], values.shape[3], len(frames))
        if (height, width) != tuple(values.shape[-2:]):
            values = functional.interpolate(
                values.contiguous(), (height, width), mode="bicubic", align_corners=False, antialias=True
            )
        mean, std = (torch.tensor(each).mul(255).view(3, 1, 1) for each in (self.mean, self.std))
        values = values.float().sub_(mean).div_(std)
        if missing := -len(frames) % self.frames_per_step:  # the last frame fills the last step
            values = torch.cat([values, values[-1:].expand(missing, -1, -1, -1)])
        steps, side, merge = len(values) // self.frames_per_step, self.patch_size, self.merge_size
        rows, cols = height // side, width // side
        cut = values.view(
            steps, self.frames_per_step, 3, rows // merge, merge, side, cols // merge, merge, side
        )  # time, time within a step, colour, then rows and columns of units, of patches in one, of pixels
        patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(steps * rows * cols, -1)
        return patches, (steps, rows, cols)

    def prepare(self, sources: Sequence[VideoSource]) -> dict[str, Tensor]:
        """Videos -> ``pixel_values_videos``, ``video_grid_thw`` and the times of their temporal steps."""
        patches, grids, times = list[Tensor](), list[tuple[int, int, int]](), list[Tensor]()
        for source in sources:
            video = self.read(source)
            own, grid = self.pixels(video.frames)
            patches.append(own)
            grids.append(grid)
            times.append(self.times(video))
        return {
            "pixel_values_videos": torch.cat(patches),
            "video_grid_thw": torch.tensor(grids),
            self.times_name: torch.cat(times),
        }

    def times(self, video: SampledVideo) -> Tensor:
        """Of Qwen2.5-VL: how many seconds a temporal step lasts, ``[1]``."""
        assert video.fps is not None
        sampled_fps = len(video.frame_index) / video.num_available * video.fps
        return torch.tensor([self.frames_per_step / sampled_fps])


@dataclass(frozen=True)
class Qwen3VideoRules(VideoRules):
    """How Qwen3-VL takes videos: ``smallest`` and ``largest`` are pixels of all frames together."""

    smallest: int = 128 * 32 * 32
    largest: int = 768 * 32 * 32
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)
    max_video_tokens: int = 768

    takes_bounds: ClassVar[bool] = False
    times_name: ClassVar[str] = "step_times"

    def sample(self, num_available: int, fps: float | None) -> list[int]:
        if num_available < self.frames_per_step:
            return [0] * self.frames_per_step
        num_taken = self.num_frames
        if num_taken is None:
            num_taken = int(num_available / (fps or UNKNOWN_FPS) * self.fps)
            num_taken = min(max(num_taken, self.min_frames), self.max_frames, num_available)
        return np.linspace(0, num_available - 1, min(num_taken, num_available)).round().astype(int).tolist()

    def frame_size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        largest, factor = self.largest, self.patch_size * self.merge_size
        if self.caps_pixels:
            share = min(self.max_video_tokens * factor * factor, largest // num_frames)
            largest = max(share, int(self.smallest * 1.05)) * num_frames
        if min(height, width) < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        bounds = self._bounds(self.smallest, largest, num_frames)
        return _fitted(height, width, factor, *bounds, num_frames, self.frames_per_step)

    def times(self, video: SampledVideo) -> Tensor:
        """Of Qwen3-VL: the middle of each temporal step in seconds, float64 ``[temporal steps]``."""
        assert video.fps is not None
        index, step = list(video.frame_index), self.frames_per_step
        index += index[-1:] * (-len(index) % step)
        seconds = torch.tensor([number / video.fps for number in index], dtype=torch.float64).view(-1, step)
        return (seconds[:, 0] + seconds[:, -1]) / 2


def _fitted(
    height: int, width: int, factor: int, smallest: int, largest: int, num_frames: int = 1, frames_per_step: int = 1
) -> tuple[int, int]:
    """Multiples of ``factor`` near (height, width), of ``smallest`` to ``largest`` pixels in all frames together."""
    rows, cols = (round(side / factor) * factor for side in (height, width))
    num_pixels = round(num_frames / frames_per_step) * frames_per_step * rows * cols
    if num_pixels > largest:
        shrink = math.sqrt(num_frames * height * width / largest)
        rows, cols = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif num_pixels < smallest:
        enlarge = math.sqrt(smallest / (num_frames * height * width))
        rows, cols = (math.ceil(side * enlarge / factor) * factor for side in (height, width))
    return rows, cols
