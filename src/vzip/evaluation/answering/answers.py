"""Questions that are ready for the model -> answers; a batch that does not fit the memory is halved."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from vzip.errors import DeviceMemoryError
from vzip.models.generation import PromptTooLongError
from vzip.results.token_count import check_token_counts

from .batching import cut
from .generation import cut_at
from .questions import Chunk, Key, LoadedQuestion, NamingTheQuestion, names_of, write_prompts
from .visuals import EncodedCache, Visuals

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm

logger = logging.getLogger(__name__)


@dataclass
class SampleLog:
    """What happened to one question.

    Attributes:
        prompt: the text given to the tokenizer, one placeholder an image or video.
        answer: the answer given to the scorer.
        num_visual_tokens: measured, one number an image, then one a video.
        layers: with a pruner, measured: ``cache_lengths`` of each layer after the prompt, and for each image, then
            for each video, the visual tokens that each layer attended to; else None.
    """

    prompt: str
    answer: str
    num_visual_tokens: list[int]
    layers: dict[str, Any] | None = None


class Answerer:
    """Generates.

    Args:
        vlm: the wrapper to ask.
        chunk_size: questions generated at once, at most.
        seed: sampled answers are drawn from it and the chunk's first question, so that they do not depend on what was
            drawn before: they are the same in an interrupted run, and in one of several processes.
        cache: visual tokens of images and videos that further questions may show.

    Attributes:
        chunk_size: smaller than at the beginning once memory did not suffice.
        problems: why questions could not be answered: prompts longer than the model reads.
    """

    def __init__(self, vlm: CompressedVlm, chunk_size: int, seed: int, cache: EncodedCache) -> None:
        self.vlm = vlm
        self.chunk_size = chunk_size
        self.seed = seed
        self.cache = cache
        self.problems: dict[Key, str] = {}
        self.tokenizer: Any = vlm.processor.tokenizer  # type: ignore[union-attr]

    def answer(self, chunks: Sequence[Chunk], visuals: Visuals) -> tuple[list[SampleLog], list[int]]:
        """The answers to all questions of the chunks, in order, and how many were generated at once each time.

        ``visuals`` are those of the chunks' section. Questions that are found to be too long are left out and stand in
        ``problems``.

        Raises:
            DeviceMemoryError: not even one question alone fits.
            TokenCountError: another number of visual tokens than the budget's entered the language model.
            Anything else that the model raises, with a note that names the questions.
        """
        logs: list[SampleLog] = []
        sizes: list[int] = []
        waiting = deque(chunks)
        while waiting:
            chunk = waiting.popleft()
            size = self.chunk_size
            if len(chunk.loaded) <= self.chunk_size:
                try:
                    answered = self._generate_if_it_fits(chunk, visuals)
                except PromptTooLongError as error:
                    # One by one, so that no answer's length depends on what else is asked.
                    if len(chunk.loaded) == 1:
                        answered = self._generate_what_fits(chunk, visuals, error)
                        logs += answered
                        sizes += [1] * len(answered)
                        continue
                    size = 1
                else:
                    if answered is not None:
                        logs += answered
                        sizes.append(len(answered))
                        continue
                    self._halve(chunk.loaded, visuals)
                    size = self.chunk_size
            parts = cut(range(len(chunk.loaded)), size)
            waiting.extendleft(Chunk([chunk.loaded[i] for i in part]) for part in reversed(parts))
        return logs, sizes

    def _generate_what_fits(self, chunk: Chunk, visuals: Visuals, error: PromptTooLongError) -> list[SampleLog]:
        """Answers one question as far as the model reads; if that is not even its prompt, it is a problem."""
        question = chunk.loaded[0].question
        if error.room < 1:
            self.problems[question.key] = str(error)
            return []
        logger.warning("%s: %s Its answer is cut there.", question.name, error)
        answered = self._generate_if_it_fits(chunk, visuals, error.room)
        while answered is None:
            self._halve(chunk.loaded, visuals)
            answered = self._generate_if_it_fits(chunk, visuals, error.room)
        return answered

    def _generate_if_it_fits(self, chunk: Chunk, visuals: Visuals, most: int | None = None) -> list[SampleLog] | None:
        """None where memory did not suffice; what was allocated is free again once this has returned.

        Args:
            chunk: questions.
            visuals: of their section.
            most: tokens of an answer; None: as the questions' settings say.
        """
        if visuals.pass_size > self.chunk_size:
            visuals.arrange(self.chunk_size)
        try:
            with NamingTheQuestion(names_of(chunk.loaded)):
                return self._generate(chunk, visuals, most)
        except torch.OutOfMemoryError:
            return None

    def _halve(self, loaded: Sequence[LoadedQuestion], visuals: Visuals) -> None:
        at_once = max(len(loaded), visuals.pass_size)
        self.cache.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if at_once == 1:
            one = loaded[0]
            raise DeviceMemoryError(
                f"{one.question.name}: the device's memory does not suffice for this question alone"
                f" ({len(one.images)} images, {len(one.videos)} videos, {len(one.prompt)} characters). Use a smaller"
                " budget, model.dtype=bfloat16, model.quantization=4bit or a larger device; answers so far are kept."
            )
        self.chunk_size = (at_once + 1) // 2
        logger.warning(
            "out of memory with %d questions at once (the first: %s): going on with %d",
            at_once,
            loaded[0].question.name,
            self.chunk_size,
        )

    def _generate(self, chunk: Chunk, visuals: Visuals, most: int | None) -> list[SampleLog]:
        loaded = chunk.loaded
        prompts = write_prompts(self.vlm, loaded, visuals) if chunk.prompts is None else chunk.prompts
        settings = loaded[0].question.settings
        kwargs = dict(settings.kwargs)
        if most is not None:
            kwargs["max_new_tokens"] = most
        if self.tokenizer.pad_token_id is not None:
            kwargs["pad_token_id"] = self.tokenizer.pad_token_id
        encoded = visuals.encoded([one.shown for one in loaded], self.cache)
        if kwargs["do_sample"]:
            torch.manual_seed(_seed_of(self.seed, loaded[0]))
        with torch.no_grad():
            new_tokens = self.vlm.generate(**prompts, encoded=encoded, **kwargs)
        num_images, num_videos = [len(one.images) for one in loaded], [len(one.videos) for one in loaded]
        measured = check_token_counts(self.vlm, {"encoded": encoded}, num_images, num_videos)
        texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        layers = _layers(self.vlm, num_images, num_videos)
        return [
            SampleLog(one.prompt, cut_at(text, settings.until), counts, of_layers)
            for one, text, counts, of_layers in zip(loaded, texts, measured, layers, strict=True)
        ]


def _layers(vlm: CompressedVlm, num_images: list[int], num_videos: list[int]) -> list[dict[str, Any] | None]:
    """What each layer saw of each question just answered; None where nothing was dropped inside the language model."""
    run = vlm.last_pruned
    if run is None:
        return [None] * len(num_images)
    images, videos = iter(run.visual_schedule[: sum(num_images)]), iter(run.visual_schedule[sum(num_images) :])
    return [
        {"cache_lengths": lengths, "visual_tokens": [*islice(images, own), *islice(videos, own_videos)]}
        for lengths, own, own_videos in zip(run.cache_lengths, num_images, num_videos, strict=True)
    ]


def _seed_of(seed: int, first: LoadedQuestion) -> int:
    digest = hashlib.sha256(repr((seed, first.question.key)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def count_sizes(sizes: Counter[int]) -> dict[str, int]:
    """Questions at once and how often, as a record has it: the largest first."""
    return {str(size): sizes[size] for size in sorted(sizes, reverse=True)}
