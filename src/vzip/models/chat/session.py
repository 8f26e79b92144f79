"""A dialogue about images and videos: each is encoded once, and each turn computes only what is new.

The checkpoint's chat template lays out the whole dialogue anew each turn. What the key-value cache already holds of it
(the longest common beginning) is kept, the rest is computed, so the model always sees what one pass over the whole
dialogue would show it, even where a template or the tokenizer writes earlier turns differently than they were produced.
What a text-aware method keeps depends on the question: its images are encoded anew for each turn's question, and all
from the first of them on is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, ProcessorMixin, TextStreamer

from vzip.compressors.base import Compressor
from vzip.errors import ConfigError, PromptError, nearest
from vzip.json_files import whole_text
from vzip.media.video import VideoSource
from vzip.pruners.base import Pruner
from vzip.pruners.context import CacheStages, PrunedRun, pruning, refuse_generation

from ..families import Adapter
from ..families.finite import check_embeddings, refusing_not_finite
from ..generation import max_positions, only_new, refuse_unserved
from .layout import ChatLayout, EncodedVisual, message

DEFAULT_MAX_NEW_TOKENS = 256
GENERATION_SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "min_new_tokens")


class Vlm(Protocol):
    """What a dialogue needs of ``CompressedVlm``."""

    model: PreTrainedModel
    adapter: Adapter
    processor: ProcessorMixin | None

    @property
    def pruner(self) -> Pruner | None: ...

    @property
    def device(self) -> torch.device: ...

    def preprocess_images(
        self, images: Sequence[Image.Image], num_images: Sequence[int] | None = None
    ) -> dict[str, Tensor]: ...

    def preprocess_videos(self, videos: Sequence[VideoSource]) -> dict[str, Tensor]: ...

    @property
    def compressor(self) -> Compressor: ...


class ChatSession:
    """One dialogue; made by ``CompressedVlm.chat``.

    Whatever fails in a turn, or interrupts it, leaves the dialogue as it was before. If the wrapper's compressor is
    replaced, images and videos that are already there keep their tokens, or the text-aware method that encodes them
    anew. A pruner drops tokens of the images that come with a turn (or are encoded anew) in that turn, for good; if it
    is replaced, what it dropped stays dropped.

    Attributes:
        messages: the turns so far, as the chat template gets them.
        visuals: the images and videos of these turns, in order.
        pending: those added for the next question.
    """

    def __init__(self, vlm: Vlm, system_prompt: str | None = None) -> None:
        """Begins a dialogue.

        Raises:
            ConfigError: the wrapper has no processor, or the processor has no chat template.
        """
        self._vlm = vlm
        self._layout = ChatLayout(vlm.processor, vlm.adapter)
        processor: Any = vlm.processor
        self._tokenizer = processor.tokenizer
        self._system_prompt = system_prompt
        self.reset()

    def reset(self) -> None:
        """Forgets all turns, images and videos; the system prompt stays."""
        prompt = self._system_prompt
        self.messages: list[dict[str, Any]] = [message("system", prompt)] if prompt else []
        self.visuals: list[EncodedVisual] = []
        self.pending: list[EncodedVisual] = []
        # Without the model's configuration every layer keeps all positions, so that it can always be cut back.
        self._cache = DynamicCache()
        self._held = CacheStages()
        self._cached_ids: list[int] = []

    @property
    def num_cached_tokens(self) -> int:
        """Text and visual tokens of the dialogue that need not be computed again."""
        return len(self._cached_ids)

    @property
    def cache_bytes(self) -> int:
        """Memory of the keys and values that the dialogue holds at this moment, in bytes."""
        held = (tensor for layer in self._cache.layers for tensor in (layer.keys, layer.values))
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @torch.no_grad()
    def add_image(self, image: Image.Image, num_images: int = 1) -> EncodedVisual:
        """Encodes an image for the next question (of a text-aware method once that is asked).

        Args:
            image: of any mode and size.
            num_images: how many come with that question; LLaVA-OneVision cuts only one that is alone into tiles. What
                earlier and later questions show does not count, so that no image is encoded again.

        Raises:
            ImageError: an image that cannot be used.
        """
        self.pending.append(self._encode(image, num_images))
        return self.pending[-1]

    @torch.no_grad()
    def add_video(self, video: VideoSource) -> EncodedVisual:
        """Encodes a video, a file or its frames as images, for the next question; see ``add_image``.

        Raises:
            UnsupportedModelError: the model has no video tower.
            VideoError: a video that cannot be used.
            MissingPackageError: PyAV is not installed.
        """
        self.pending.append(self._encode_video(video))
        return self.pending[-1]

    @torch.no_grad()
    def ask(
        self,
        question: str,
        images: Sequence[Image.Image] = (),
        videos: Sequence[VideoSource] = (),
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[], None] | None = None,
        **settings: Any,
    ) -> str:
        """Asks; returns the answer, greedy unless asked otherwise.

        Args:
            question: the user's text, without placeholders.
            images: images that come with it, after what ``add_image`` and ``add_video`` have added.
            videos: videos that come with it, after those.
            max_new_tokens: most tokens of the answer.
            on_text: called with each further piece of the answer as soon as its words are complete.
            on_token: called with each new token; what it raises ends the turn, which is then forgotten. At the first
                the cache holds the dialogue up to the answer.
            **settings: of ``GENERATION_SETTINGS``, as for ``generate``.

        Raises:
            ConfigError: another setting, or fewer than one new token; a generation_config.json that asks for what
                cannot work from compressed images.
            PromptError: a question that is empty or holds a placeholder; a dialogue longer than the model can read.
            ImageError, VideoError: an image or video that cannot be used.
            UnsupportedModelError: a video for a model without a video tower.
        """
        question = whole_text(question)
        self._check(question, max_new_tokens, settings)
        refuse_unserved(settings, self._vlm.model.generation_config)
        new = [self._encode(image, len(images)) for image in images] + [*map(self._encode_video, videos)]
        pending = [*self.pending, *new]
        messages = [*self.messages, message("user", question, pending)]
        visuals = [*self.visuals, *pending]
        ids = self._layout.lay_out(messages, visuals)
        positions = self._layout.positions(ids, visuals)
        reached = len(ids) if positions is None else max(len(ids), int(positions.max()) + 1)
        self._check_length(reached, max_new_tokens)
        visuals = [visual if visual.encode is None else visual.encode(question) for visual in visuals]
        ids = self._layout.lay_out(messages, visuals)  # now it is known how many tokens each run of a video has
        if changed := [ids.index(number) for number in self._layout.numbers_shown(visuals)]:
            self._cached_ids = self._cached_ids[: min(changed)]
        new_ids = self._generate(ids, visuals, (on_text, on_token), {"max_new_tokens": max_new_tokens, **settings})
        answer = self._layout.read(new_ids)
        self.messages = [*messages, message("assistant", answer)]
        self.visuals, self.pending = visuals, []
        return answer

    def _encode(self, image: Image.Image, num_images: int = 1) -> EncodedVisual:
        """An image that comes with others, or alone."""
        prepared = self._vlm.preprocess_images([image], [num_images])
        return self._encode_inputs("image", {name: value.to(self._vlm.device) for name, value in prepared.items()})

    def _encode_video(self, video: VideoSource) -> EncodedVisual:
        inputs = {name: value.to(self._vlm.device) for name, value in self._vlm.preprocess_videos([video]).items()}
        return self._encode_inputs("video", inputs)

    def _encode_inputs(self, kind: Literal["image", "video"], inputs: dict[str, Tensor]) -> EncodedVisual:
        adapter, compressor = self._vlm.adapter, self._vlm.compressor
        visual = adapter.read_inputs(**inputs)
        of_images, of_videos = visual.num_placeholders
        num_vanilla, (shape,) = [*of_images, *of_videos][0], visual.shapes
        texts = adapter.video_texts(inputs) if kind == "video" else None
        written = None if texts is None else texts[0]

        def encode(question: str | None, again: Callable[[str], EncodedVisual] | None = None) -> EncodedVisual:
            asked = visual if question is None else adapter.asked(visual, compressor, [question], self._vlm.processor)
            (encoded,) = adapter.encode(asked, compressor)
            check_embeddings(self._vlm.model, [encoded.rows], inputs)
            places, planes = encoded.place_index, encoded.planes
            num_tokens = len(encoded.rows)
            return EncodedVisual(kind, num_tokens, encoded.rows, num_vanilla, shape, places, planes, again, written)

        if not compressor.reads_text:
            return encode(None)

        def for_question(question: str) -> EncodedVisual:
            return encode(question, for_question)

        num_tokens = compressor.num_visual_tokens(shape)
        return EncodedVisual(kind, num_tokens, None, num_vanilla, shape, encode=for_question, written=written)

    def _check(self, question: str, max_new_tokens: int, settings: dict[str, Any]) -> None:
        self._layout.check_question(question)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: must be 1 or more.")
        for name in settings:
            if name not in GENERATION_SETTINGS:
                raise ConfigError(
                    f"ask({name}=...): no setting of a dialogue{nearest(name, GENERATION_SETTINGS)}; allowed are"
                    f" max_new_tokens, {', '.join(GENERATION_SETTINGS)}."
                )

    def _check_length(self, num_tokens: int, max_new_tokens: int) -> None:
        limit = max_positions(self._vlm.model.config)
        if limit is not None and num_tokens + max_new_tokens > limit:
            raise PromptError(
                f"The dialogue would be {num_tokens} tokens long and its answer up to {max_new_tokens}, but the model"
                f" reads {limit}: lower max_new_tokens, use a smaller budget, or start again with reset()."
            )

    def _generate(
        self,
        ids: list[int],
        visuals: list[EncodedVisual],
        told: tuple[Callable[[str], None] | None, Callable[[], None] | None],
        settings: dict[str, Any],
    ) -> list[int]:
        """Continues ``ids`` and returns the new ones; the cache then holds all that was computed."""
        # One token at least must be computed, since its output is the first of the answer.
        self._cached_ids = self._cached_ids[: min(_common_beginning(self._cached_ids, ids), len(ids) - 1)]
        self._cut_cache()
        device = self._vlm.device
        embeddings = self._layout.embed(ids, visuals, lambda tokens: self._vlm.adapter.embed_tokens(tokens.to(device)))
        if (positions := self._layout.positions(ids, visuals)) is not None:
            settings = {"position_ids": positions.to(device), **settings}
        settings = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, **settings}
        shown_ids = self._layout.written(ids, self._vlm.model.config.get_text_config().vocab_size)
        try:
            deeper = self._vlm.adapter.language_context(
                self._layout.visual_index(ids), self._layout.planes(ids, visuals)
            )
            with deeper, self._pruning(ids, settings) as run:  # a pruner must find what enters deeper
                output: Tensor = self._vlm.model.generate(
                    shown_ids.to(embeddings.device),
                    inputs_embeds=embeddings,  # all of it: Hugging Face leaves out what the cache holds
                    attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device),
                    past_key_values=self._cache,
                    streamer=_Streamer(self._tokenizer, *told) if any(told) else None,
                    **refusing_not_finite(self._vlm.model, settings),
                )
                new_ids: list[int] = only_new(output, len(ids))[0].tolist()
                if run is not None:
                    run.check_forwards(len(new_ids))
            whole = [*ids, *self._layout.as_written(new_ids)]
            self._cached_ids = whole[: self._cache.get_seq_length()]  # the last one was not computed on
        finally:
            self._cut_cache()
        return new_ids

    @contextmanager
    def _pruning(self, ids: list[int], settings: dict[str, Any]) -> Iterator[PrunedRun | None]:
        """The wrapper's pruner at work, if any; also where only an earlier turn was pruned, since the cache is."""
        pruner = self._vlm.pruner
        if pruner is None and not self._held.is_pruned:
            yield None
            return
        refuse_generation(settings, self._vlm.model.generation_config)
        if not self._held.is_pruned:
            self._held = CacheStages(len(self._cached_ids))
        with pruning(pruner, self._vlm.adapter.decoder, self._layout.visual_index(ids), self._held) as run:
            yield run

    def _cut_cache(self) -> None:
        """Cuts every layer back to ``_cached_ids``; after a turn that failed half way, layers differ in length."""
        self._held.crop(self._cache, len(self._cached_ids))


class _Streamer(TextStreamer):
    """Hands complete words on, from the first that is not blank, and tells of each token."""

    def __init__(
        self, tokenizer: Any, on_text: Callable[[str], None] | None, on_token: Callable[[], None] | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._on_token = on_text, on_token
        self._begun = False

    def put(self, value: Tensor) -> None:
        is_prompt = self.next_tokens_are_prompt
        super().put(value)
        if self._on_token is not None and not is_prompt:
            self._on_token()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            if self._on_text is not None:
                self._on_text(text)


def _common_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading items are equal."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
