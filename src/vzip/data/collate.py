"""From samples to the tensors of a training step, in worker processes: images decoded, words tokenized and padded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.compressors.base import Compressor
from vzip.compressors.vision import VisionShape
from vzip.errors import ImageError, PromptError, UnsupportedModelError, VideoError
from vzip.media.images import load_image
from vzip.media.video import VideoSource, load_video
from vzip.models.devices import sent
from vzip.models.splice import IGNORED_LABEL

from .conversations import Encoded, Template, encode, truncate
from .llava_record import Turn


@dataclass(frozen=True)
class TrainingSample:
    """What is learned from together: images and videos, and one or more conversations about all of them.

    Several conversations about the same images (questions asked independently) share one pass of the vision tower.
    """

    id: str
    images: Sequence[Path | Image.Image]
    dialogues: Sequence[Sequence[Turn]]
    videos: Sequence[VideoSource] = ()


class TrainingSet(Protocol):
    """Samples by number; lengths and images known without reading them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TrainingSample: ...

    @property
    def lengths(self) -> np.ndarray:
        """A measure of each sample's length, for grouping: ``[samples]``."""

    @property
    def has_images(self) -> np.ndarray:
        """Whether each sample has an image or video: bool ``[samples]``."""

    @property
    def image_groups(self) -> np.ndarray:
        """A number for each sample, the same for samples about the same images: int64 ``[samples]``."""

    def describe(self) -> str:
        """What is trained on, for people."""


class ImageEncoder(Protocol):
    """What the collator must know of the model: preprocessing, and the visual tokens that it will make."""

    @property
    def num_frames(self) -> int:
        """Frames taken of a video."""

    def preprocess_images(self, images: Sequence[Image.Image], num_images: Sequence[int]) -> dict[str, Tensor]:
        """Of each image it is told how many its sample has."""

    def expected_num_tokens(self, inputs: dict[str, Tensor]) -> list[int]:
        """Visual tokens of each image of ``preprocess_images``' result, or of each video of ``preprocess_videos``'."""

    def preprocess_videos(self, videos: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class KeptImage:
    """An image of which the visual tokens before the projector are kept on disk (``vzip.train.features``).

    Without tensors: each would hold a file descriptor open on its way from a worker process.

    Attributes:
        path: of their file.
        shape: of the image.
        num_tokens: visual tokens that it becomes.
        content: of the file; None: there is none yet.
        inputs: what to make it of then: ``pixel_values`` and what else the family needs, of this image alone.
    """

    path: Path
    shape: VisionShape
    num_tokens: int
    content: bytes | None = None
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


class ImageCache(Protocol):
    """Where features of images are kept."""

    def look_up(self, source: str | Path | Image.Image, num_images: int) -> KeptImage:
        """An image's; of each it is told how many its sample has. ImageError: it cannot be read."""


@dataclass
class Batch:
    """Samples as tensors; S sequences (conversations) of up to T tokens, padded on the right.

    Attributes:
        ids: the samples' ids.
        sample_of: for each sequence the sample it belongs to.
        input_ids, attention_mask, labels: int64 ``[S, T]``; one placeholder an image or video.
        images: ``pixel_values`` and what else the family needs, each image once; empty without images.
        kept: each image, where features are kept on disk; ``images`` is empty then.
        image_of: for each placeholder, in order, the image it stands for.
        num_visual_tokens: of each image, as the compressor must make them.
        videos, video_of, num_video_tokens: the same of videos.
        rows: the sequences of each row of the language model, where those about the same images share one; else None.
        skipped: ids of samples left out because an image or video could not be read.
        cut_off: ids of samples of which ``max_length`` left a conversation without any target.
        compressor: what makes the visual tokens; None: the model's own.
    """

    ids: list[str]
    sample_of: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    images: dict[str, Tensor] = field(default_factory=dict)
    image_of: list[int] = field(default_factory=list)
    num_visual_tokens: list[int] = field(default_factory=list)
    videos: dict[str, Tensor] = field(default_factory=dict)
    video_of: list[int] = field(default_factory=list)
    num_video_tokens: list[int] = field(default_factory=list)
    rows: list[list[int]] | None = None
    skipped: list[str] = field(default_factory=list)
    cut_off: list[str] = field(default_factory=list)
    compressor: Compressor | None = None
    kept: list[KeptImage] = field(default_factory=list)

    @property
    def num_targets(self) -> int:
        """Tokens the loss counts: the first position has nothing before it that could predict it."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    @property
    def num_targets_by_sample(self) -> list[int]:
        """The same of each sample, over all of its conversations."""
        counts = [0] * len(self.ids)
        for sample, count in zip(
            self.sample_of, (self.labels[:, 1:] != IGNORED_LABEL).sum(dim=1).tolist(), strict=True
        ):
            counts[sample] += count
        return counts

    def to(self, device: torch.device) -> Batch:
        """The same on another device; this one stays, so that a step's waiting batches take no room there."""
        return self._with(partial(sent, device=device))

    def pin_memory(self) -> Batch:
        """The same in pinned memory, from which ``to`` need not wait for a GPU; torch's ``DataLoader`` calls it."""
        return self._with(lambda tensors: {name: tensor.pin_memory() for name, tensor in tensors.items()})

    def _with(self, moved: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Batch:
        text: Any = moved({name: getattr(self, name) for name in ("input_ids", "attention_mask", "labels")})
        return replace(self, **text, images=moved(self.images), videos=moved(self.videos))


@dataclass(frozen=True)
class Collator:
    """Turns samples into a ``Batch``.

    Attributes:
        processor: the checkpoint's.
        encoder: what is known of the model (``CompressedVlm`` seen through ``vzip.train.objective``).
        template: how conversations are written.
        system_prompt: text before each conversation, or None.
        image_token_id: id of the placeholder.
        max_length: tokens a conversation may have, visual tokens counted.
        skip_unreadable: leave a sample with an unreadable image or video out instead of raising.
        video_token_id: id of a video's placeholder; None for a model that learns from images alone.
        compressor: of its batches, by which ``encoder`` counts; None: the model's own.
        features: where the features of images are kept, of this compressor; None: nowhere.
        share_images: encode an image file once for all samples of a batch, and put conversations about the same images
            into one row, up to ``max_length`` tokens (``vzip.models.sharing``).
    """

    processor: Any
    encoder: ImageEncoder
    template: Template
    system_prompt: str | None
    image_token_id: int
    max_length: int
    skip_unreadable: bool = False
    video_token_id: int | None = None
    compressor: Compressor | None = None
    features: ImageCache | None = None
    share_images: bool = False

    def __call__(self, samples: Sequence[TrainingSample]) -> Batch:
        """Raises ImageError, VideoError or PromptError, naming the sample, for one that cannot be used.

        UnsupportedModelError: it has a video, and the model learns from images alone.
        """
        empty = torch.zeros(0, 0, dtype=torch.int64)
        batch = Batch([], [], empty, empty, empty, compressor=self.compressor)
        sequences: list[Encoded] = []
        images: list[Any] = []
        num_images: list[int] = []
        videos: list[list[Image.Image]] = []
        known: dict[tuple[Path, ...], range] = {}
        for sample in samples:
            self._check_videos(sample)
            files = tuple(each for each in sample.images if isinstance(each, Path))
            files = files if self.share_images and len(files) == len(sample.images) else ()
            own = known.get(files)
            try:
                sources = sample.images if own is None else ()
                opened = [self._opened(source, len(sample.images)) for source in sources]
                decoded = [load_video(source, self.encoder.num_frames) for source in sample.videos]
            except (ImageError, VideoError) as error:
                if not self.skip_unreadable:
                    raise type(error)(f"sample {sample.id}: {error}") from error
                batch.skipped.append(sample.id)
                continue
            batch.ids.append(sample.id)
            if own is None:
                own = range(len(images), len(images) + len(opened))
                known |= {files: own} if files else {}
            for turns in sample.dialogues:
                batch.sample_of.append(len(batch.ids) - 1)
                batch.image_of += own
                batch.video_of += range(len(videos), len(videos) + len(decoded))
                sequences.append(self._encode(sample, turns))
            images += opened
            num_images += [len(opened)] * len(opened)
            videos += decoded
        if self.features is not None:
            batch.kept, batch.num_visual_tokens = images, [image.num_tokens for image in images]
        elif images:
            batch.images = self.encoder.preprocess_images(images, num_images)
            batch.num_visual_tokens = self.encoder.expected_num_tokens(batch.images)
        if videos:
            batch.videos = self.encoder.preprocess_videos(videos)
            batch.num_video_tokens = self.encoder.expected_num_tokens(batch.videos)
        self._truncate(batch, sequences)
        if self.share_images:
            batch.rows = self._rows(batch, sequences)
        self._pad(batch, sequences)
        return batch

    def _opened(self, source: Path | Image.Image, num_images: int) -> Image.Image | KeptImage:
        return load_image(source) if self.features is None else self.features.look_up(source, num_images)

    def _check_videos(self, sample: TrainingSample) -> None:
        if sample.videos and self.video_token_id is None:
            raise UnsupportedModelError(
                f"sample {sample.id}: has a video, and this model's training takes images only. Train Video-LLaVA with"
                " it (model=video_llava_7b), or take the sample out."
            )

    def _encode(self, sample: TrainingSample, turns: Sequence[Turn]) -> Encoded:
        try:
            pieces = self.template(turns, self.system_prompt, self.processor)
            encoded = encode(pieces, self.processor.tokenizer, self.image_token_id, self.video_token_id)
        except PromptError as error:
            raise PromptError(f"sample {sample.id}: {error}") from error
        for name, num_placeholders, files in (
            ("image", encoded.num_images, sample.images),
            ("video", encoded.num_videos, sample.videos),
        ):
            if num_placeholders != len(files):
                raise PromptError(
                    f"sample {sample.id}: {num_placeholders} <{name}> placeholders but {len(files)} {name}s; each"
                    f" {name} needs one."
                )
        return encoded

    def _truncate(self, batch: Batch, sequences: list[Encoded]) -> None:
        """Cuts the sequences in place; what fell away of images and videos is encoded for nothing, which is rare."""
        images, videos = iter(batch.image_of), iter(batch.video_of)
        batch.image_of, batch.video_of = [], []
        for number, whole in enumerate(sequences):
            own, own_videos = list(islice(images, whole.num_images)), list(islice(videos, whole.num_videos))
            cut = truncate(
                whole,
                [batch.num_visual_tokens[image] for image in own],
                self.image_token_id,
                self.max_length,
                [batch.num_video_tokens[video] for video in own_videos],
                self.video_token_id,
            )
            sequences[number] = cut
            id = batch.ids[batch.sample_of[number]]
            if whole.num_targets and not cut.num_targets and id not in batch.cut_off:
                batch.cut_off.append(id)
            batch.image_of += own[: cut.num_images]
            batch.video_of += own_videos[: cut.num_videos]

    def _rows(self, batch: Batch, sequences: list[Encoded]) -> list[list[int]]:
        """Which sequences share a row: they begin alike up to their last image or video, and learn nothing of that.

        The token after it is no target either, or what is shared would have to foretell several.
        """
        placeholders = (self.image_token_id, self.video_token_id)
        images, videos = iter(batch.image_of), iter(batch.video_of)
        rows: list[list[int]] = []
        open_rows: dict[tuple[tuple[int, ...], ...], tuple[list[int], int]] = {}
        for number, sequence in enumerate(sequences):
            own, own_videos = tuple(islice(images, sequence.num_images)), tuple(islice(videos, sequence.num_videos))
            end = max((place + 1 for place, token in enumerate(sequence.ids) if token in placeholders), default=0)
            shared = end - len(own) - len(own_videos)
            shared += sum(batch.num_visual_tokens[image] for image in own)
            shared += sum(batch.num_video_tokens[video] for video in own_videos)
            alone = not end or any(label != IGNORED_LABEL for label in sequence.labels[: end + 1])
            key = (own, own_videos, tuple(sequence.ids[:end]))
            row, length = open_rows.get(key, ([], shared))
            length += len(sequence.ids) - end
            if alone or not row or length > self.max_length:
                row, length = [], shared + len(sequence.ids) - end
                rows.append(row)
            row.append(number)
            if not alone:
                open_rows[key] = (row, length)
        return rows

    def _pad(self, batch: Batch, sequences: list[Encoded]) -> None:
        longest = max((len(sequence.ids) for sequence in sequences), default=0)
        shape = (len(sequences), longest)
        batch.input_ids = torch.zeros(shape, dtype=torch.int64)
        batch.attention_mask = torch.zeros(shape, dtype=torch.int64)
        batch.labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            length = len(sequence.ids)
            batch.input_ids[row, :length] = torch.tensor(sequence.ids, dtype=torch.int64)
            batch.attention_mask[row, :length] = 1
            batch.labels[row, :length] = torch.tensor(sequence.labels, dtype=torch.int64)
