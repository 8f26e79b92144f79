"""From samples to the tensors of a training step, in worker processes: pictures decoded, words tokenized and padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vzip.errors import ImageError, PromptError

from .conversations import IGNORED_LABEL, Encoded, Template, encode, truncate
from .images import load_image
from .llava_record import Turn


@dataclass(frozen=True)
class TrainingSample:
    """What is learned from together: pictures, and one or more conversations about all of them.

    Several conversations about the same pictures (questions asked independently) share one pass of the vision tower.
    """

    id: str
    images: Sequence[Path | Image.Image]
    dialogues: Sequence[Sequence[Turn]]


class TrainingSet(Protocol):
    """Samples by number; lengths and pictures known without reading them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TrainingSample: ...

    @property
    def lengths(self) -> np.ndarray:
        """A measure of each sample's length, for grouping: ``[samples]``."""

    @property
    def has_images(self) -> np.ndarray:
        """Whether each sample has a picture: bool ``[samples]``."""

    def describe(self) -> str:
        """What is trained on, for people."""


class PictureEncoder(Protocol):
    """What the collator must know of the model: preprocessing, and the visual tokens that it will make."""

    def preprocess_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]: ...

    def expected_num_tokens(self, inputs: dict[str, Tensor]) -> list[int]:
        """Visual tokens of each picture of ``preprocess_images``' result."""


@dataclass
class Batch:
    """Samples as tensors; S sequences (conversations) of up to T tokens, padded on the right.

    Attributes:
        ids: the samples' ids.
        sample_of: for each sequence the sample it belongs to.
        input_ids, attention_mask, labels: int64 ``[S, T]``; one placeholder a picture.
        pictures: ``pixel_values`` and what else the family needs, each picture once; empty without pictures.
        picture_of: for each placeholder, in order, the picture it stands for.
        num_visual_tokens: of each picture, as the compressor must make them.
        skipped: ids of samples left out because a picture could not be read.
    """

    ids: list[str]
    sample_of: list[int]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pictures: dict[str, Tensor] = field(default_factory=dict)
    picture_of: list[int] = field(default_factory=list)
    num_visual_tokens: list[int] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def num_targets(self) -> int:
        """Tokens the loss counts: the first position has nothing before it that could predict it."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    def to(self, device: torch.device) -> Batch:
        """The same on another device; this one stays, so that a step's waiting batches take no room there."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            pictures={name: tensor.to(device) for name, tensor in self.pictures.items()},
        )


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
        skip_unreadable: leave a sample with an unreadable picture out instead of raising.
    """

    processor: Any
    encoder: PictureEncoder
    template: Template
    system_prompt: str | None
    image_token_id: int
    max_length: int
    skip_unreadable: bool = False

    def __call__(self, samples: Sequence[TrainingSample]) -> Batch:
        """Raises ImageError or PromptError, naming the sample, for one that cannot be used."""
        empty = torch.zeros(0, 0, dtype=torch.int64)
        batch = Batch([], [], empty, empty, empty)
        sequences: list[Encoded] = []
        pictures: list[Image.Image] = []
        for sample in samples:
            try:
                opened = [load_image(source) for source in sample.images]
            except ImageError as error:
                if not self.skip_unreadable:
                    raise ImageError(f"sample {sample.id}: {error}") from error
                batch.skipped.append(sample.id)
                continue
            batch.ids.append(sample.id)
            for turns in sample.dialogues:
                batch.sample_of.append(len(batch.ids) - 1)
                batch.picture_of += range(len(pictures), len(pictures) + len(opened))
                sequences.append(self._encode(sample, turns))
            pictures += opened
        if pictures:
            batch.pictures = self.encoder.preprocess_images(pictures)
            batch.num_visual_tokens = self.encoder.expected_num_tokens(batch.pictures)
        self._truncate(batch, sequences)
        self._pad(batch, sequences)
        return batch

    def _encode(self, sample: TrainingSample, turns: Sequence[Turn]) -> Encoded:
        try:
            encoded = encode(
                self.template(turns, self.system_prompt, self.processor), self.processor.tokenizer, self.image_token_id
            )
        except PromptError as error:
            raise PromptError(f"sample {sample.id}: {error}") from error
        if encoded.num_images != len(sample.images):
            raise PromptError(
                f"sample {sample.id}: {encoded.num_images} <image> placeholders but {len(sample.images)} pictures; each"
                " picture needs one."
            )
        return encoded

    def _truncate(self, batch: Batch, sequences: list[Encoded]) -> None:
        """Cuts the sequences in place; the pictures that fell away are encoded for nothing, which is rare."""
        kept: list[int] = []
        start = 0
        for number, whole in enumerate(sequences):
            mine = batch.picture_of[start : start + whole.num_images]
            lengths = [batch.num_visual_tokens[picture] for picture in mine]
            sequences[number] = truncate(whole, lengths, self.image_token_id, self.max_length)
            kept += mine[: sequences[number].num_images]
            start += whole.num_images
        batch.picture_of = kept

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
