"""A dialogue about pictures: each picture is encoded once, and each turn computes only what is new.

The checkpoint's chat template lays out the whole dialogue anew each turn. What the key-value cache already holds of it
(the longest common beginning) is kept, the rest is computed, so the model always sees what one pass over the whole
dialogue would show it, even where a template or the tokenizer writes earlier turns differently than they were produced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from vzip.errors import ConfigError, PromptError, nearest

if TYPE_CHECKING:
    from .compressed_vlm import CompressedVlm

DEFAULT_MAX_NEW_TOKENS = 256
GENERATION_SETTINGS = ("do_sample", "temperature", "top_p", "top_k", "min_new_tokens")
# In place of a placeholder that the model itself wrote: equal to no token, so it is never taken for a picture.
_NOT_A_PICTURE = -1


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as the language model gets it.

    Attributes:
        tokens: ``[num_visual_tokens, d_text]``.
        num_vanilla_tokens: visual tokens it would have without compression.
    """

    tokens: Tensor
    num_vanilla_tokens: int

    @property
    def num_visual_tokens(self) -> int:
        return self.tokens.shape[0]


class ChatSession:
    """One dialogue; made by ``CompressedVlm.chat``.

    Whatever fails in a turn, or interrupts it, leaves the dialogue as it was before. If the wrapper's compressor is
    replaced, pictures that are already encoded keep their tokens.

    Attributes:
        messages: the turns so far, as the chat template gets them.
        pictures: the pictures of these turns, in order.
        pending: pictures added for the next question.
    """

    def __init__(self, vlm: CompressedVlm, system_prompt: str | None = None) -> None:
        """Begins a dialogue.

        Raises:
            ConfigError: the wrapper has no processor, or the processor has no chat template.
        """
        processor: Any = vlm.processor
        if processor is None or not processor.chat_template:
            missing = "processor" if processor is None else "chat template"
            raise ConfigError(
                f"chat: the wrapper has no {missing}, and the checkpoint's chat template is what lays out a dialogue."
                " Use load_vlm on a directory with the processor's files and chat_template.jinja, or give CompressedVlm"
                " a processor whose chat_template is set."
            )
        self._vlm = vlm
        self._processor = processor
        self._system_prompt = system_prompt
        self.reset()

    def reset(self) -> None:
        """Forgets all turns and pictures; the system prompt stays."""
        prompt = self._system_prompt
        self.messages: list[dict[str, Any]] = [_message("system", prompt)] if prompt else []
        self.pictures: list[EncodedPicture] = []
        self.pending: list[EncodedPicture] = []
        # Without the model's configuration every layer keeps all positions, so that it can always be cut back.
        self._cache = DynamicCache()
        self._cached_ids: list[int] = []

    @property
    def num_cached_tokens(self) -> int:
        """Text and visual tokens of the dialogue that need not be computed again."""
        return len(self._cached_ids)

    @torch.no_grad()
    def add_image(self, image: Image.Image) -> EncodedPicture:
        """Encodes a picture for the next question.

        Raises:
            ImageError: a picture that cannot be used.
        """
        picture = self._encode(image)
        self.pending.append(picture)
        return picture

    @torch.no_grad()
    def ask(
        self,
        question: str,
        images: Sequence[Image.Image] = (),
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        on_text: Callable[[str], None] | None = None,
        **settings: Any,
    ) -> str:
        """Asks; returns the answer, greedy unless asked otherwise.

        Args:
            question: the user's text, without placeholders.
            images: pictures that come with it, after those of ``add_image``.
            max_new_tokens: most tokens of the answer.
            on_text: called with each further piece of the answer as soon as its words are complete.
            **settings: of ``GENERATION_SETTINGS``, as for ``generate``.

        Raises:
            ConfigError: another setting, or fewer than one new token.
            PromptError: a question that is empty or holds the placeholder; a dialogue longer than the model can read.
            ImageError: a picture that cannot be used.
        """
        self._check(question, max_new_tokens, settings)
        pending = [*self.pending, *(self._encode(image) for image in images)]
        messages = [*self.messages, _message("user", question, len(pending))]
        pictures = [*self.pictures, *pending]
        ids = self._lay_out(messages, pictures)
        self._check_length(len(ids), max_new_tokens)
        new_ids = self._generate(ids, pictures, on_text, {"max_new_tokens": max_new_tokens, **settings})
        answer = self._read(new_ids)
        self.messages = [*messages, _message("assistant", answer)]
        self.pictures, self.pending = pictures, []
        return answer

    def _encode(self, image: Image.Image) -> EncodedPicture:
        inputs = {name: value.to(self._vlm.device) for name, value in self._vlm.preprocess_images([image]).items()}
        tokens = self._vlm.encode_images(**inputs)[0]
        layout = {name: inputs.get(name) for name in ("image_sizes", "tile_grids")}
        return EncodedPicture(tokens, self._vlm.adapter.expanded_lengths(1, **layout)[0])

    def _check(self, question: str, max_new_tokens: int, settings: dict[str, Any]) -> None:
        if not question.strip():
            raise PromptError("The question is empty: ask something; pictures alone are no turn.")
        if self._processor.image_token in question:
            raise PromptError(
                f"The question holds {self._processor.image_token!r}, which marks where a picture goes: leave it out"
                " and give the picture in images= or add_image."
            )
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: must be 1 or more.")
        for name in settings:
            if name not in GENERATION_SETTINGS:
                raise ConfigError(
                    f"ask({name}=...): no setting of a dialogue{nearest(name, GENERATION_SETTINGS)}; allowed are"
                    f" max_new_tokens, {', '.join(GENERATION_SETTINGS)}."
                )

    def _check_length(self, num_tokens: int, max_new_tokens: int) -> None:
        limit = getattr(self._vlm.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and num_tokens + max_new_tokens > limit:
            raise PromptError(
                f"The dialogue would be {num_tokens} tokens long and its answer up to {max_new_tokens}, but the model"
                f" reads {limit}: lower max_new_tokens, use a smaller budget, or start again with reset()."
            )

    def _lay_out(self, messages: list[dict[str, Any]], pictures: list[EncodedPicture]) -> list[int]:
        """Token ids of the whole dialogue, with as many placeholders for each picture as it has visual tokens."""
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        tokenizer = self._processor.tokenizer
        # A template that writes the first token itself must not get another from the tokenizer.
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        placeholder = self._vlm.adapter.image_token_id
        ids: list[int] = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        if ids.count(placeholder) != len(pictures):
            raise PromptError(
                f"The chat template wrote {ids.count(placeholder)} {self._processor.image_token} placeholders for"
                f" {len(pictures)} pictures: it must write one for each content item of type image."
            )
        lengths = iter([picture.num_visual_tokens for picture in pictures])
        return [token for i in ids for token in ([i] * next(lengths) if i == placeholder else [i])]

    def _generate(
        self,
        ids: list[int],
        pictures: list[EncodedPicture],
        on_text: Callable[[str], None] | None,
        settings: dict[str, Any],
    ) -> list[int]:
        """Continues ``ids`` and returns the new ones; the cache then holds all that was computed."""
        # One token at least must be computed, since its output is the first of the answer.
        self._cached_ids = self._cached_ids[: min(_common_beginning(self._cached_ids, ids), len(ids) - 1)]
        self._cut_cache()
        embeddings = self._embed(ids, pictures)
        try:
            new_ids: list[int] = self._vlm.model.generate(
                inputs_embeds=embeddings,  # all of it: Hugging Face leaves out what the cache holds
                attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device),
                past_key_values=self._cache,
                streamer=None if on_text is None else _Streamer(self._processor.tokenizer, on_text),
                **{"do_sample": False, "num_beams": 1, "num_return_sequences": 1, **settings},
            )[0].tolist()
            placeholder = self._vlm.adapter.image_token_id
            written = [_NOT_A_PICTURE if i == placeholder else i for i in new_ids]
            self._cached_ids = [*ids, *written][: self._cache.get_seq_length()]  # the last one was not computed on
        finally:
            self._cut_cache()
        return new_ids

    def _cut_cache(self) -> None:
        """Cuts every layer back to ``_cached_ids``; after a turn that failed half way, layers differ in length."""
        for layer in self._cache.layers:
            surplus = int(layer.get_seq_length()) - len(self._cached_ids)
            if surplus > 0:
                layer.crop(-surplus)

    def _embed(self, ids: list[int], pictures: list[EncodedPicture]) -> Tensor:
        """``[1, T, d_text]``: text embeddings, with the visual tokens in the places of the placeholders."""
        tokens = torch.tensor([ids], device=self._vlm.device)
        is_picture = tokens == self._vlm.adapter.image_token_id
        embeddings: Tensor = self._vlm.adapter.embed_tokens(tokens.masked_fill(is_picture, 0))
        if pictures:
            embeddings[is_picture] = torch.cat([picture.tokens for picture in pictures]).to(embeddings)
        return embeddings

    def _read(self, new_ids: list[int]) -> str:
        """The answer as text, without a placeholder: the next turn would take it for a picture."""
        text = self._processor.tokenizer.decode(new_ids, skip_special_tokens=True)
        return text.replace(self._processor.image_token, "").strip()


class _Streamer(TextStreamer):
    """Hands complete words on, from the first that is not blank."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            self._on_text(text)


def _message(role: str, text: str, num_images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]}


def _common_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading items are equal."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))
