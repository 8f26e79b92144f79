"""The images and videos of questions: each encoded once for all questions of a section, many in a pass of the tower.

What goes through the vision tower together is settled by the section's questions alone, not by what is still kept or
answered already: an image alone and an image among others may differ in the last bits of their tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vzip.errors import ConfigError, ImageError, VideoError
from vzip.media.images import load_image
from vzip.models.devices import pinned, sent
from vzip.models.families.places import EncodedVisuals

from .batching import cut

if TYPE_CHECKING:
    from vzip.media.video import VideoSource
    from vzip.models.vlm import CompressedVlm

# What reading images and videos raises where they are missing or damaged; anything else ends the run at once.
# Pillow raises SyntaxError for a broken PNG.
UNUSABLE = (ImageError, VideoError, OSError, SyntaxError, Image.DecompressionBombError)
BYTES_PER_GIB = 1024**3


@dataclass(frozen=True)
class Visual:
    """An image or video as a question shows it.

    Attributes:
        source: the image, or what ``preprocess_videos`` takes.
        num_beside: images of the prompt, which some families show otherwise where there are several.
        asked: the question, where the compressor reads it; else None.
        key: equal for what becomes equal visual tokens: the content's digest and all of the above.
    """

    source: Image.Image | VideoSource
    num_beside: int = 1
    asked: str | None = None
    key: Hashable = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (*_content(self.source), self.num_beside, self.asked))

    @property
    def kind(self) -> Literal["image", "video"]:
        return "image" if isinstance(self.source, Image.Image) else "video"


def _content(source: Image.Image | VideoSource) -> tuple[Hashable, ...]:
    """Of pixels a digest; of a video's file where it is, its size and when it was written."""
    if isinstance(source, Image.Image):
        return source.mode, source.size, hashlib.blake2b(source.tobytes(), digest_size=32).digest()
    if isinstance(source, str | Path):
        path = Path(source)
        state = path.stat() if path.is_file() else None  # one that is missing is refused where it is opened
        return str(source), *(() if state is None else (state.st_size, state.st_mtime_ns))
    return ("frames", *(_content(load_image(frame)) for frame in source))  # of a palette image the indices say nothing


@dataclass
class _Pass:
    """What goes through the vision tower together: images, then videos.

    Attributes:
        visuals: by key.
        inputs: the processor's outputs in host memory, for a GPU pinned; None: not made, or no longer needed.
        written: of each video what prompts have in its place, where the family writes it; None: not known yet.
    """

    visuals: dict[Hashable, Visual]
    inputs: dict[str, Tensor] | None = None
    written: dict[Hashable, str] | None = None

    def of_kind(self, kind: str) -> dict[Hashable, Visual]:
        return {key: visual for key, visual in self.visuals.items() if visual.kind == kind}


class Visuals:
    """What the questions of a section show, each image and video once.

    Args:
        vlm: the wrapper that encodes.

    Attributes:
        pass_size: of how many questions the new images and videos go through the tower together, at most.
        largest: bytes of the visual tokens of one image or video, at most; 0 before anything is preprocessed.
    """

    def __init__(self, vlm: CompressedVlm) -> None:
        self.vlm = vlm
        self.pass_size = 1
        self.largest = 0
        self._visuals: dict[Hashable, Visual] = {}
        self._of_questions: list[list[Hashable]] = []
        self._passes: list[_Pass] = []
        self._pass_of: dict[Hashable, _Pass] = {}

    def add(self, of_question: Sequence[Visual]) -> tuple[Hashable, ...]:
        """What one question shows; returns the keys."""
        new = {visual.key: visual for visual in of_question if visual.key not in self._visuals}
        self._visuals |= new
        if new:
            self._of_questions.append(list(new))
        return tuple(visual.key for visual in of_question)

    @property
    def num_bytes(self) -> int:
        """Memory that all visual tokens need, at most."""
        return self.largest * len(self._visuals)

    def source(self, key: Hashable) -> Image.Image | VideoSource:
        """The one object that is kept of all that are alike."""
        return self._visuals[key].source

    def arrange(self, most: int) -> None:
        """Settles what goes through the tower together: what each ``most`` questions are the first to show."""
        positions = cut(range(len(self._of_questions)), most)
        parts = [[key for number in part for key in self._of_questions[number]] for part in positions]
        self.pass_size = min(most, max(1, len(self._of_questions)))
        self._passes = [
            _Pass({key: self._visuals[key] for kind in ("image", "video") for key in part if self._is(key, kind)})
            for part in parts
        ]
        self._pass_of = {key: one for one in self._passes for key in one.visuals}

    def _is(self, key: Hashable, kind: str) -> bool:
        return self._visuals[key].kind == kind

    def preprocess(self) -> dict[Hashable, BaseException]:
        """Makes the inputs of every pass.

        Returns:
            what cannot be used, and why; it is left out of its pass.
        """
        unusable: dict[Hashable, BaseException] = {}
        for one in self._passes:
            try:
                self._preprocess(one)
            except UNUSABLE:
                unusable |= self._leave_out(one)
                self._preprocess(one)
        return unusable

    def _leave_out(self, one: _Pass) -> dict[Hashable, BaseException]:
        """Takes what cannot be used out of a pass."""
        unusable: dict[Hashable, BaseException] = {}
        for key, visual in list(one.visuals.items()):
            try:
                self._preprocess(_Pass({key: visual}))
            except UNUSABLE as error:
                unusable[key] = error
                del one.visuals[key]
        for own in self._of_questions:  # should it be arranged anew
            own[:] = [key for key in own if key not in unusable]
        return unusable

    def _preprocess(self, one: _Pass) -> None:
        images, videos = one.of_kind("image").values(), one.of_kind("video")
        try:
            inputs: dict[str, Tensor] = {}
            if images:
                sources: Any = [visual.source for visual in images]
                inputs |= self.vlm.preprocess_images(sources, [visual.num_beside for visual in images])
            one.written = {}
            if videos:
                files: Any = [visual.source for visual in videos.values()]
                of_videos = self.vlm.preprocess_videos(files)
                one.written = dict(zip(videos, self.vlm.adapter.video_texts(of_videos) or (), strict=False))
                inputs |= of_videos
            one.inputs = pinned(inputs, self.vlm.device)
            if inputs:
                self.largest = max(self.largest, *self.vlm.visual_bytes(**inputs))
        except torch.OutOfMemoryError:  # tried again when their turn comes
            one.inputs = None

    def written(self, keys: Sequence[Hashable]) -> list[str] | None:
        """Of these videos what prompts have in their place; None: the placeholder."""
        for key in keys:
            if self._pass_of[key].written is None:
                self._preprocess(self._pass_of[key])
        texts = [text for key in keys if (text := (self._pass_of[key].written or {}).get(key)) is not None]
        return texts or None

    def encoded(self, shown: Sequence[Sequence[Hashable]], cache: EncodedCache) -> EncodedVisuals:
        """Images, then videos, of questions as they are shown, those that are not kept from the vision tower.

        Args:
            shown: of each question the keys.
            cache: what is kept.

        Raises:
            as ``CompressedVlm.encode``; torch.OutOfMemoryError.
        """
        keys = list(chain(*shown))
        found: dict[Hashable, EncodedVisuals] = {}
        for key in dict.fromkeys(keys):
            if key not in found:
                found |= self._encode(self._pass_of[key], cache)
        cache.num_shown += len(keys)
        return EncodedVisuals(
            list(chain(*(found[key].images for key in keys))), list(chain(*(found[key].videos for key in keys)))
        )

    def _encode(self, one: _Pass, cache: EncodedCache) -> Mapping[Hashable, EncodedVisuals]:
        if (kept := cache.find(one.visuals)) is not None:
            return kept
        if one.inputs is None:
            self._preprocess(one)
        if one.inputs is None:
            raise torch.OutOfMemoryError("the device's memory does not suffice for the pixels")
        asked = [visual.asked for visual in one.visuals.values()]
        with torch.no_grad():
            encoded = self.vlm.encode(asked, **sent(one.inputs, self.vlm.device))
        one.inputs = None
        own = [EncodedVisuals(images=[each]) for each in encoded.images]
        own += [EncodedVisuals(videos=[each]) for each in encoded.videos]
        found = dict(zip(one.visuals, own, strict=True))  # images come first in both
        cache.num_encoded += len(found)
        cache.keep(found, encoded.num_bytes)
        return found


class EncodedCache:
    """Visual tokens by what went through the vision tower together; the least recently shown make room for new ones.

    Of one run, so of one compressor and the same weights. Tokens stay on the device that made them.

    Args:
        max_gib: memory for them; 0 keeps none.

    Attributes:
        num_bytes: memory in use.
        num_encoded, num_shown: images and videos that went through the tower, and that prompts have shown.

    Raises:
        ConfigError: a negative ``max_gib``.
    """

    def __init__(self, max_gib: float) -> None:
        if isinstance(max_gib, bool) or not isinstance(max_gib, int | float) or not max_gib >= 0:
            raise ConfigError(f"eval.visual_cache_gib={max_gib!r}: must be a number of GiB, 0 (off) or more.")
        self.max_gib = max_gib
        self.num_bytes = self.num_encoded = self.num_shown = 0
        self._kept: OrderedDict[tuple[Hashable, ...], tuple[Mapping[Hashable, EncodedVisuals], int]] = OrderedDict()

    def find(self, keys: Collection[Hashable]) -> Mapping[Hashable, EncodedVisuals] | None:
        """The tokens of a pass, by key, where they are kept."""
        if (found := self._kept.get(tuple(keys))) is None:
            return None
        self._kept.move_to_end(tuple(keys))
        return found[0]

    def keep(self, found: Mapping[Hashable, EncodedVisuals], num_bytes: int) -> None:
        """Keeps the tokens of a pass, unless they alone are more than may be kept."""
        most = self.max_gib * BYTES_PER_GIB
        if num_bytes > most:
            return
        while self.num_bytes + num_bytes > most:
            self.num_bytes -= self._kept.popitem(last=False)[1][1]
        self._kept[tuple(found)] = found, num_bytes
        self.num_bytes += num_bytes

    def clear(self) -> None:
        """Gives the memory back."""
        self._kept.clear()
        self.num_bytes = 0
