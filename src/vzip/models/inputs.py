"""From prompts, images and videos to tensors: the part of ``CompressedVlm`` that needs the checkpoint's processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from vzip.errors import ConfigError, PromptError
from vzip.media.images import Preprocess
from vzip.media.video import VideoSource

from .devices import execution_device, sent
from .families import Adapter
from .tokens import tokenize

# A kind's name, how prompts write it, its token's id and, for each prompt, how many there are.
Placeholders = tuple[str, str, int, Sequence[int]]


class InputBuilder:
    """Makes the arguments of ``prepare``, ``forward`` and ``generate``; see ``CompressedVlm`` for the attributes."""

    adapter: Adapter
    processor: ProcessorMixin | None
    preprocess: Preprocess
    num_frames: int | None

    @property
    def device(self) -> torch.device:
        """Where the text embedding is, and so where inputs go."""
        return execution_device(self.adapter.embed_tokens)

    def preprocess_images(
        self, images: Sequence[Image.Image], num_images: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Images -> ``pixel_values``, by the rule in ``preprocess``, and what else the family needs with them.

        LLaVA-NeXT: also ``image_sizes``, and with ``"llava"`` ``tile_grids``, since where several grids serve an image
        equally well LLaVA's choice and Hugging Face's differ. LLaVA-OneVision: both. InternVL: also ``num_patches``,
        the tiles of each.

        Args:
            images: of any mode and size.
            num_images: for each how many images its prompt has, since LLaVA-OneVision cuts only one that is alone into
                tiles; None: each is.

        Raises:
            ConfigError: the wrapper has no processor.
            ImageError: an image that cannot be used.
        """
        image_processor = self._need_processor("preprocess_images").image_processor
        num_images = [1] * len(images) if num_images is None else num_images
        return self.adapter.prepare_among(images, num_images, image_processor, self.preprocess)

    def preprocess_videos(self, videos: Sequence[VideoSource]) -> dict[str, Tensor]:
        """Videos -> ``pixel_values_videos``, and what else the family needs with them; see ``vzip.media.video``.

        Video-LLaVA: ``[videos, num_frames, 3, h, w]``, frames evenly spread. Qwen2.5-VL and Qwen3-VL: frames by the
        rule of their processor, ``video_grid_thw``, and ``second_per_grid_ts`` (Qwen3-VL: ``step_times``, the seconds
        of each temporal step, which ``build_inputs`` writes into prompts).

        Args:
            videos: files, or frames as images.

        Raises:
            ConfigError: the wrapper has no processor.
            UnsupportedModelError: the model has no video tower.
            VideoError: a video that cannot be used.
            MissingPackageError: PyAV is not installed.
        """
        return self.adapter.prepare_videos(videos, self._need_processor("preprocess_videos"), self.num_frames)

    def build_inputs(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Image.Image]] | None = None,
        videos: Sequence[Sequence[VideoSource]] | None = None,
    ) -> dict[str, Tensor]:
        """Prompts, images and videos -> keyword arguments for ``prepare``, ``forward`` and ``generate``.

        Args:
            texts: prompts, with one ``<image>`` (Qwen: ``<|vision_start|><|image_pad|><|vision_end|>``, InternVL:
                ``<img><IMG_CONTEXT></img>``) for each of their images, one ``<video>`` (Qwen:
                ``<|vision_start|><|video_pad|><|vision_end|>``) for each of their videos. For Qwen3-VL the time of each
                temporal step is written in, as its processor does.
            images: for each prompt its images, in the order of the placeholders; None: no images.
            videos: for each prompt its videos, likewise; see ``preprocess_videos``.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, T]``, padded on the left, on the model's device; ``pixel_values``
            (and ``image_sizes``, ``tile_grids``) if there are images, ``pixel_values_videos`` if there are videos.

        Raises:
            ConfigError: the wrapper has no processor.
            PromptError: a prompt whose placeholders do not match its images or videos.
            ImageError, VideoError: an image or video that cannot be used.
            UnsupportedModelError: videos for a model without a video tower.
        """
        for name, each in (("images", images), ("videos", videos)):
            if isinstance(texts, str) or any(isinstance(own, Image.Image | str | Path) for own in each or ()):
                raise PromptError(
                    f"build_inputs(texts, {name}): texts is a list of prompts, {name} a list with a list for each"
                    f" prompt: build_inputs([prompt], {name}=[[first, second]])."
                )
        images = [[]] * len(texts) if images is None else images
        videos = [[]] * len(texts) if videos is None else videos
        inputs = self.write_prompts(texts, [*map(len, images)], [*map(len, videos)])
        if flat := [image for of_prompt in images for image in of_prompt]:
            inputs |= self.preprocess_images(flat, [len(of_prompt) for of_prompt in images for _ in of_prompt])
        if flat_videos := [video for own in videos for video in own]:
            of_videos = self.preprocess_videos(flat_videos)
            if (written := self.adapter.video_texts(of_videos)) is not None:
                inputs |= self.write_prompts(texts, [*map(len, images)], [*map(len, videos)], written)
            inputs |= of_videos
        return sent(inputs, self.device)

    def write_prompts(
        self,
        texts: Sequence[str],
        num_images: Sequence[int],
        num_videos: Sequence[int],
        written: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Prompts alone -> ``input_ids`` and ``attention_mask`` ``[B, T]``, on the CPU; see ``build_inputs``.

        Args:
            texts: prompts.
            num_images, num_videos: of each prompt.
            written: of each video what prompts have in its place (``Adapter.video_texts``); None: its placeholder.

        Raises:
            ConfigError, PromptError: as ``build_inputs``.
        """
        tokenizer = self._need_processor("build_inputs").tokenizer
        adapter = self.adapter
        placeholders: list[Placeholders] = [("image", adapter.written_image, adapter.image_token_id, num_images)]
        if adapter.video_token_id is not None:
            placeholders.append(("video", adapter.written_video, adapter.video_token_id, num_videos))
        inputs = encode_prompts(tokenizer, texts, placeholders)
        if written is None:
            return inputs
        token, number = tokenizer.convert_ids_to_tokens(adapter.video_token_id), iter(written)
        texts = [re.sub(re.escape(token), lambda _: next(number), text) for text in texts]
        return encode_prompts(tokenizer, texts)

    def _need_processor(self, what: str) -> Any:
        if self.processor is None:
            raise ConfigError(
                f"{what} needs the checkpoint's processor, and this wrapper has none: pass processor= to CompressedVlm,"
                " or use load_vlm on a directory that holds the processor's and tokenizer's files."
            )
        return self.processor


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], placeholders: Sequence[Placeholders] = ()
) -> dict[str, Tensor]:
    """Prompts -> ``input_ids`` and ``attention_mask``, int64 ``[B, T]``, padded on the left.

    Args:
        tokenizer: the checkpoint's.
        texts: prompts.
        placeholders: of each kind, to be held against the prompts.

    Raises:
        PromptError: a prompt with another number of placeholders than images or videos.
    """
    rows = [tokenize(tokenizer, text)[0] for text in texts]
    for kind in placeholders:
        _check_counts(kind, rows)
    longest = max((len(row) for row in rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    if tokenizer.pad_token_id is not None:
        ids.fill_(tokenizer.pad_token_id)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[number, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _check_counts(kind: Placeholders, rows: list[list[int]]) -> None:
    name, written, token_id, per_prompt = kind
    if len(rows) != len(per_prompt):
        raise PromptError(f"{len(rows)} prompts but {len(per_prompt)} lists of {name}s: one list a prompt is needed.")
    for number, (row, own) in enumerate(zip(rows, per_prompt, strict=True)):
        if row.count(token_id) != own:
            raise PromptError(
                f"Prompt {number} holds {row.count(token_id)} {written} placeholders but {own} {name}s were given"
                f" for it: write {written} once for each {name}."
            )
