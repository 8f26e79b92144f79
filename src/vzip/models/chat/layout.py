"""A dialogue as token ids: the chat template's text, with each image and video as so many tokens of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vzip.compressors.vision import VisionShape
from vzip.errors import ConfigError, PromptError

from ..families import Adapter
from ..families.places import Piece, Placement, placement_of, shown_part
from ..generation import prompt_ids
from ..tokens import check_vocabulary, tokenize

Medium = Literal["image", "video"]
# In place of a placeholder that the model itself wrote: equal to no token, so it is never taken for an image.
_NOT_SHOWN = -1
# In place of a token of the first image or video of the dialogue; of the next, the number below, and so on. So two
# dialogues agree in a token only where the same image is shown.
_FIRST_SHOWN = -2


@dataclass(frozen=True)
class EncodedVisual:
    """An image or video as the language model gets it.

    Attributes:
        medium: ``image`` or ``video``.
        num_visual_tokens: as the language model gets it.
        tokens: ``[num_visual_tokens, d_text]``; None where a text-aware method still waits for a question.
        num_vanilla_tokens: visual tokens it would have without compression.
        shape: of the image or video.
        place_index: int64 ``[num_visual_tokens]``, the places its tokens take, of a family that keeps places.
        planes: ``[num_visual_tokens, F]``, what of each enters at deeper layers, or None.
        encode: encodes it for another question; None: it is the same for all.
        written: what the dialogue has in place of its placeholder, of a video in several runs; None: that.
    """

    medium: Medium
    num_visual_tokens: int
    tokens: Tensor | None
    num_vanilla_tokens: int
    shape: VisionShape
    place_index: Tensor | None = None
    planes: Tensor | None = None
    encode: Callable[[str], EncodedVisual] | None = None
    written: str | None = None

    @property
    def units_of_runs(self) -> list[tuple[int, int] | None]:
        """``Piece.units`` of each run of placeholders that stands for it."""
        if self.written is None:
            return [None]
        length = self.shape.num_vanilla // self.shape.num_crops
        return [(first, first + length) for first in range(0, self.shape.num_vanilla, length)]

    @property
    def places(self) -> Tensor | None:
        """``place_index``; of one that still waits for a question any: the text behind it has its own."""
        return torch.arange(self.num_visual_tokens) if self.tokens is None else self.place_index


class ChatLayout:
    """What turns messages into ids; ``placeholders`` are the model's, by medium: id and text.

    Args:
        processor: the checkpoint's.
        adapter: of the model.

    Raises:
        ConfigError: no processor, or one without a chat template.
    """

    def __init__(self, processor: Any, adapter: Adapter) -> None:
        if processor is None or not processor.chat_template:
            missing = "processor" if processor is None else "chat template"
            raise ConfigError(
                f"chat: the wrapper has no {missing}, and the checkpoint's chat template is what lays out a dialogue."
                " Use load_vlm on a directory with the processor's files and chat_template.jinja, or give CompressedVlm"
                " a processor whose chat_template is set."
            )
        self._processor, self._adapter = processor, adapter
        self._vocab_size: int | None = getattr(adapter.embed_tokens, "num_embeddings", None)
        ids: dict[Medium, int | None] = {"image": adapter.image_token_id, "video": adapter.video_token_id}
        self.placeholders: dict[Medium, tuple[int, str]] = {
            medium: (token, processor.tokenizer.convert_ids_to_tokens(token))
            for medium, token in ids.items()
            if token is not None
        }

    def check_question(self, question: str) -> None:
        """Raises PromptError for a question that is empty or holds a placeholder."""
        if not question.strip():
            raise PromptError("The question is empty: ask something; images alone are no turn.")
        for medium, (_, text) in self.placeholders.items():
            if text in question:
                article = "an" if medium == "image" else "a"
                raise PromptError(
                    f"The question holds {text!r}, which marks where {article} {medium} goes: leave it out and give"
                    f" the {medium} in {medium}s= or add_{medium}."
                )

    def lay_out(self, messages: Sequence[dict[str, Any]], visuals: Sequence[EncodedVisual]) -> list[int]:
        """Ids of the whole dialogue, each visual token as the number that stands for its image or video.

        Raises:
            PromptError: a template that writes another number of placeholders than there are images or videos; words
                that the text embedding does not have.
        """
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        text = self._with_times(text, visuals)
        ids, _ = tokenize(self._processor.tokenizer, text)
        if self._vocab_size is not None:
            placeholders = [token for token, _ in self.placeholders.values()]
            check_vocabulary([i for i in ids if i not in placeholders], self._vocab_size, "The dialogue")
        shown = {}
        for medium, (token, written) in self.placeholders.items():
            own = [number for number, visual in enumerate(visuals) if visual.medium == medium]
            runs = [(number, units) for number in own for units in visuals[number].units_of_runs]
            if ids.count(token) != len(runs):
                raise PromptError(
                    f"The chat template wrote {ids.count(token)} {written} placeholders for {len(runs)}"
                    f" {medium}s (or their temporal steps): it must write one for each content item of type {medium}."
                )
            shown[token] = iter(runs)
        self._media = [visual.medium for visual in visuals]
        places = [visual.places for visual in visuals]
        placement = Placement([], [visual.shape.num_vanilla for visual in visuals], places)
        laid_out: list[int] = []
        self._pieces = list[Piece]()
        for is_text, run in itertools.groupby(ids, lambda token: token not in shown):
            if is_text:
                self._pieces.append(Piece(len(laid_out), len(laid_out) + len(own := list(run))))
                laid_out += own
                continue
            for token in run:
                number, units = next(shown[token])
                start, piece = len(laid_out), Piece(0, 0, number, units)
                here = placement.own(piece).indices(visuals[number].num_visual_tokens)
                laid_out += [_FIRST_SHOWN - number] * len(range(*here))
                self._pieces.append(replace(piece, start=start, stop=len(laid_out)))
        return laid_out

    def _with_times(self, text: str, visuals: Sequence[EncodedVisual]) -> str:
        """The template's text with what a video is written as, where that is more than its placeholder."""
        written = [visual.written for visual in visuals if visual.medium == "video"]
        if not any(written):
            return text
        _, placeholder = self.placeholders["video"]
        parts = text.split(placeholder)
        if len(parts) != len(written) + 1:
            return text  # refused by whoever counts
        between = [placeholder if each is None else each for each in written]
        return "".join(itertools.chain(*zip(parts, [*between, ""], strict=True)))

    def embed(
        self, ids: Sequence[int], visuals: Sequence[EncodedVisual], embed_tokens: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``[1, T, d_text]`` of ``lay_out``'s ids: text embeddings, with the visual tokens in their places."""
        tokens = torch.tensor([ids])
        is_shown = tokens <= _FIRST_SHOWN
        embeddings = embed_tokens(tokens.masked_fill(is_shown, 0))
        order = dict.fromkeys(_FIRST_SHOWN - i for i in ids if i <= _FIRST_SHOWN)
        if order:
            shown = torch.cat([rows for number in order if (rows := visuals[number].tokens) is not None])
            embeddings[is_shown.to(embeddings.device)] = shown.to(embeddings)
        return embeddings

    @staticmethod
    def planes(ids: Sequence[int], visuals: Sequence[EncodedVisual]) -> Tensor | None:
        """``PreparedInputs.planes`` of ``lay_out``'s ids."""
        order = dict.fromkeys(_FIRST_SHOWN - i for i in ids if i <= _FIRST_SHOWN)
        found = [planes for number in order if (planes := visuals[number].planes) is not None]
        return torch.cat(found) if found else None

    def positions(self, ids: Sequence[int], visuals: Sequence[EncodedVisual]) -> Tensor | None:
        """Position ids ``[1, T]`` or ``[axes, 1, T]`` of ``lay_out``'s last ids; None: generate counts them."""
        axes = self._adapter.position_axes
        if not self._adapter.keeps_places:
            return None if axes == 1 else torch.arange(len(ids)).expand(axes, 1, -1)
        pieces = self._pieces
        vanilla = self._adapter.positions(
            [ids[p.start : p.stop] if p.visual is None else shown_part(visuals[p.visual].shape, p) for p in pieces]
        )
        placement = placement_of([vanilla], [v.shape for v in visuals], [visual.places for visual in visuals])
        assert placement is not None
        kept = placement.kept(0, pieces, torch.device("cpu"))
        return kept if axes == 1 else kept[:, None]

    @staticmethod
    def numbers_shown(visuals: Sequence[EncodedVisual]) -> list[int]:
        """What ``lay_out`` writes for each image and video that every question changes."""
        return [_FIRST_SHOWN - number for number, visual in enumerate(visuals) if visual.encode is not None]

    @staticmethod
    def visual_index(ids: Sequence[int]) -> Tensor:
        """int64 ``[1, T]`` of ``lay_out``'s ids: the number of the image or video that each is of, -1: text."""
        tokens = torch.tensor([ids])
        return torch.where(tokens <= _FIRST_SHOWN, _FIRST_SHOWN - tokens, -1)

    def written(self, ids: Sequence[int], vocab_size: int) -> Tensor:
        """``[1, T]`` of ``lay_out``'s last ids, each visual token as its placeholder; see ``prompt_ids``."""
        tokens = torch.tensor(ids)
        placeholders = torch.tensor([self.placeholders[medium][0] for medium in self._media], dtype=torch.int64)
        return prompt_ids(self.visual_index(ids), tokens[tokens > _FIRST_SHOWN], placeholders, vocab_size)

    def as_written(self, new_ids: Sequence[int]) -> list[int]:
        """An answer's ids; a placeholder among them stands for nothing shown."""
        placeholders = [token for token, _ in self.placeholders.values()]
        return [_NOT_SHOWN if i in placeholders else i for i in new_ids]

    def read(self, new_ids: Sequence[int]) -> str:
        """The answer as text, without placeholders: the next turn would take them for images or videos."""
        text = self._processor.tokenizer.decode(new_ids, skip_special_tokens=True)
        for _, written in self.placeholders.values():
            text = text.replace(written, "")
        return text.strip()


def message(role: str, text: str, visuals: Sequence[EncodedVisual] = ()) -> dict[str, Any]:
    """A turn as chat templates take it."""
    return {"role": role, "content": [*({"type": visual.medium} for visual in visuals), {"type": "text", "text": text}]}
