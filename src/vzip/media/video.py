"""Reading video files: frames chosen by a family's own rule, Video-LLaVA's spread evenly over all of them.

Frames are decoded with PyAV and go through the checkpoint's image processor, so neither torchvision nor a video
processor is needed. They are counted by decoding, not read from the file's header, which may be wrong or silent.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vzip.errors import ConfigError, VideoError
from vzip.installed import missing_package
from vzip.paths import expanded, is_file, is_folder, shown

from .images import DECODER_ERRORS, MAX_HF_ASPECT_RATIO, MAX_PIXELS, call_processor, is_heic, load_image

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_NUM_FRAMES = 8  # Video-LLaVA's own, in training and evaluation

# Titles and other names in a file are of any encoding; nothing here reads them.
_ANY_TITLE: dict[str, Any] = {"metadata_errors": "replace"}

VideoSource = str | Path | Sequence[Image.Image]
# From how many frames there are, and how many a second (None: unknown), the numbers of those to take, ascending.
Sampling = Callable[[int, float | None], Sequence[int]]


@dataclass(frozen=True)
class SampledVideo:
    """Frames taken of a video.

    Attributes:
        frames: upright RGB images of one size.
        frame_index: the number of each among the video's own frames.
        num_available: how many frames the video has.
        fps: how many of these it shows a second on average; None: not known.
    """

    frames: list[Image.Image]
    frame_index: list[int]
    num_available: int
    fps: float | None


def check_num_frames(num_frames: object) -> int:
    """The number of frames if it is a whole number of at least 1; ConfigError otherwise."""
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise ConfigError(f"model.num_frames={num_frames!r}: must be a whole number of frames a video, 1 or more.")
    return num_frames


def sample_indices(num_available: int, num_frames: int) -> list[int]:
    """Frames to take of ``num_available``: evenly spread, the first and the last among them.

    The rule of Video-LLaVA's scripts (``linspace`` over the frame numbers, rounded down). Where there are fewer frames
    than asked for, frames repeat, so that every video gives the same number. It counts frames, not seconds: in a file
    of variable rate, stretches with many frames get more of the sample.
    """
    return np.linspace(0, num_available - 1, num_frames, dtype=int).tolist()


def load_video(source: VideoSource, num_frames: int = DEFAULT_NUM_FRAMES) -> list[Image.Image]:
    """Reads ``num_frames`` frames of a video as upright RGB images; see ``sample_indices`` for which.

    Args:
        source: a video file of any format FFmpeg reads, or a video's frames as images.
        num_frames: images to return.

    Returns:
        ``num_frames`` images of the video's own size.

    Raises:
        VideoError: no such file, empty, not a video, without an image stream or frames, damaged or cut off.
        ImageError: images were given, and one of them cannot be used.
        ConfigError: ``num_frames`` is not a whole number of at least 1.
        MissingPackageError: PyAV is not installed.
    """
    check_num_frames(num_frames)
    sampled = read_video(source, lambda num_available, _: sample_indices(num_available, num_frames))
    if isinstance(source, str | Path):
        for frame in sampled.frames:
            _refuse_oblong(expanded(source), frame)
    return sampled.frames


def read_video(source: VideoSource, sampling: Sampling) -> SampledVideo:
    """Reads frames of a video; see ``load_video``, whose errors it raises.

    Args:
        source: a video file of any format FFmpeg reads, or a video's frames as images.
        sampling: which frames to take; a number may come several times.
    """
    if not isinstance(source, str | Path):
        if not isinstance(source, Sequence):
            raise VideoError(f"A video was given as {type(source).__name__}: it is a path or a list of PIL images.")
        if len(source) == 0:
            raise VideoError("The video given is an empty list of images: at least one frame is needed.")
        chosen = list(sampling(len(source), None))
        return SampledVideo([load_image(source[index]) for index in chosen], chosen, len(source), None)
    av, path = _import_av(), _existing_file(source)
    with _named_errors(av, path):
        num_listed, fps = _count_packets(av, path)
        chosen = list(sampling(num_listed, fps))
        frames, num_decoded = _decode(av, path, chosen)
        if num_decoded == 0:
            raise VideoError(f"{path}: none of its {num_listed} frames can be decoded.")
        if num_decoded != num_listed:  # frames that are never shown, or several in a packet
            chosen = list(sampling(num_decoded, fps))
            frames, _ = _decode(av, path, chosen)
    return SampledVideo(frames, chosen, num_decoded, fps)


def check_video(path: Path) -> None:
    """Raises as ``load_video`` for a file that is no video, or whose first frame cannot be read; the rest is not."""
    av, path = _import_av(), _existing_file(path)
    with _named_errors(av, path):
        num_listed, _ = _count_packets(av, path)
        if _decode(av, path, [0], first_only=True)[1] == 0:
            raise VideoError(f"{path}: none of its {num_listed} frames can be decoded.")


def prepare_videos(videos: Sequence[VideoSource], image_processor: Any, num_frames: int) -> Tensor:
    """Videos -> ``pixel_values_videos`` ``[videos, num_frames, 3, h, w]`` float32.

    Frames are not padded to a square: Video-LLaVA's scripts resize a frame's short side and cut its centre out, which
    is what the checkpoint's image processor does. (They resize by torch's bilinear, the processor by bicubic, and they
    mirror half of the videos at random, in evaluation too, which is not done here.)

    Args:
        videos: at least one; see ``load_video``.
        image_processor: the checkpoint's Hugging Face image processor.
        num_frames: frames of each.

    Raises:
        as ``load_video``.
    """
    import torch  # only here: the commands that only read videos need not wait for it

    return torch.stack([pixels(load_video(video, num_frames), image_processor) for video in videos])


def pixels(images: Sequence[Image.Image], image_processor: Any) -> Tensor:
    """``[images, 3, h, w]``, by whichever name Video-LLaVA's image processor returns them."""
    values = call_processor(image_processor, images)
    return values["pixel_values"] if "pixel_values" in values else values["pixel_values_images"]


def is_image(path: Path) -> bool:
    """Whether a file is an image for Pillow (an animated one too) rather than a video, by its content."""
    try:
        if is_heic(path):
            return True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.format != "MPEG"  # Pillow recognises these videos but cannot read them
    except (UnidentifiedImageError, OSError):
        return False
    except DECODER_ERRORS:  # Pillow knows its format: reading it says what is wrong
        return True


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise missing_package("Reading videos", "av", error) from error
    return av


def _existing_file(source: str | Path) -> Path:
    if str(source).startswith(("http://", "https://")):
        raise VideoError(f"{source}: videos are read from files; download it first and give the path.")
    path = expanded(source)
    if not is_file(path):
        kind = "is a directory, not a file" if is_folder(path) else "no such video file"
        raise VideoError(f"{shown(path)}: {kind}.")
    return path


@contextmanager
def _named_errors(av: ModuleType, path: Path) -> Iterator[None]:
    """Turns whatever PyAV raises for an unusable file into a VideoError that names it."""
    try:
        if path.stat().st_size == 0:
            raise VideoError(f"{path}: the file is empty (0 bytes).")
        yield
    except VideoError:
        raise
    except PermissionError as error:
        raise VideoError(f"{path}: may not be read ({error.strerror}).") from error
    except (av.FFmpegError, *DECODER_ERRORS) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"{path}: not a video, cut off or damaged ({reason}).") from error


def _image_stream(container: Any, path: Path) -> Any:
    """The file's first video stream, cover images of audio files left out."""
    streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams})) or "none"
        raise VideoError(f"{path}: has no video stream (its streams: {kinds}).")
    return streams[0]


def _count_packets(av: ModuleType, path: Path) -> tuple[int, float | None]:
    """Coded frames in the file, without decoding any, and how many it shows a second.

    Raises:
        VideoError: there are none, or fewer than the file's header lists: FFmpeg would pass over that without a word.
    """
    # Edit lists hide frames on purpose; the header counts those too.
    with av.open(str(path), options={"ignore_editlist": "1"}, **_ANY_TITLE) as container:
        stream = _image_stream(container, path)
        num_packets, end = 0, 0.0
        fps = float(stream.average_rate) if stream.average_rate else None
        for packet in container.demux():
            num_packets += packet.stream.index == stream.index and packet.size > 0
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if num_packets < stream.frames:
            raise VideoError(
                f"{path}: cut off or damaged: its header lists {stream.frames} frames, it holds {num_packets}."
            )
        # Matroska lists no number of frames, but how long the file plays.
        listed = (container.duration or 0) / av.time_base if "matroska" in container.format.name else 0.0
        if num_packets and listed - end > max(1.0, 0.05 * listed):
            raise VideoError(f"{path}: cut off: its header says {listed:.1f} seconds, it ends after {end:.1f}.")
    if num_packets == 0:
        raise VideoError(f"{path}: its video stream holds no frames.")
    return num_packets, fps


def _decode(
    av: ModuleType, path: Path, wanted: Sequence[int], first_only: bool = False
) -> tuple[list[Image.Image], int]:
    """The frames of the ``wanted`` numbers that exist, and how many there are in all (or 1 of them)."""
    kept: dict[int, Image.Image] = {}
    chosen, number = set(wanted), 0
    with av.open(str(path), **_ANY_TITLE) as container:
        stream = _image_stream(container, path)
        if stream.width * stream.height > MAX_PIXELS:
            raise VideoError(
                f"{path}: frames of {stream.width} x {stream.height} pixels: up to {MAX_PIXELS:,} are read. Make it"
                " smaller first."
            )
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if number in chosen:
                kept[number] = _upright(frame)
            number += 1
            if first_only:
                break
    return [kept[index] for index in wanted if index in kept], number


def _upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned as the file says it is to be shown."""
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _refuse_oblong(path: Path, frame: Image.Image) -> None:
    longer, shorter = max(frame.size), min(frame.size)
    if longer > MAX_HF_ASPECT_RATIO * shorter:
        raise VideoError(
            f"{path}: a frame of {frame.width} x {frame.height} pixels is more oblong than {MAX_HF_ASPECT_RATIO}:1;"
            " the processor would enlarge its short side and cut the rest off. Crop the video."
        )
