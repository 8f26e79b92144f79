"""Conversations as token ids and labels: which words the loss counts.

The loss counts the assistant's words and the token that ends them, nothing else: no system prompt, no user turn, no
image. A conversation is rendered to text in pieces, the whole text is tokenized at once (as evaluation tokenizes its
prompts), and a token counts if all of its characters lie in a piece that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vzip.errors import ConfigError, PromptError, nearest
from vzip.models.splice import IGNORED_LABEL
from vzip.models.tokens import tokenize

from .llava_record import IMAGE_PLACEHOLDER, Turn


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation's text; ``is_target``: the loss counts it."""

    text: str
    is_target: bool = False


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation: one placeholder token an image or video, labels -100 where the loss does not count.

    Attributes:
        ids: tokens.
        labels: as long as ``ids``; the token itself, or -100.
        num_images: placeholders of images among ``ids``.
        num_videos: placeholders of videos.
    """

    ids: list[int]
    labels: list[int]
    num_images: int
    num_videos: int = 0

    @property
    def num_targets(self) -> int:
        """Tokens the loss counts."""
        return sum(label != IGNORED_LABEL for label in self.labels)


def place_images(text: str) -> str:
    """Moves a turn's placeholder to its beginning, on a line of its own, as LLaVA's training does.

    Turns with several placeholders stay as they are: their order among the words carries meaning.
    """
    if text.count(IMAGE_PLACEHOLDER) != 1:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def vicuna_v1(turns: Sequence[Turn], system_prompt: str | None, processor: Any) -> list[Piece]:
    """LLaVA-1.5's form: ``SYSTEM USER: question ASSISTANT: answer</s>USER: ...``."""
    pieces = [Piece(f"{system_prompt} ")] if system_prompt else []
    end = processor.tokenizer.eos_token
    for turn in turns:
        text = place_images(turn.text)
        if turn.role == "user":
            pieces.append(Piece(f"USER: {text} ASSISTANT:"))
        else:
            pieces.append(Piece(f" {text}{end}", is_target=True))
    return pieces


def plain(turns: Sequence[Turn], system_prompt: str | None, processor: Any) -> list[Piece]:
    """LLaVA's first stage: the image and its caption, ended by a new line; the question is left out.

    Raises:
        PromptError: the conversation is not one question with an image and one answer.
    """
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in turns[0].text:
        raise PromptError(
            f"train.template=plain is for an image and its caption (2 turns), but this conversation has {len(turns)}"
            f" turns and {turns[0].text.count(IMAGE_PLACEHOLDER)} images in the first: use train.template=vicuna_v1."
        )
    return [Piece(IMAGE_PLACEHOLDER * turns[0].text.count(IMAGE_PLACEHOLDER)), Piece(f"{turns[1].text}\n", True)]


def chat(turns: Sequence[Turn], system_prompt: str | None, processor: Any) -> list[Piece]:
    """The checkpoint's own chat template, which evaluation uses too.

    A turn's only image goes first, as in ``place_images``; several stay where they stand among the words.

    Raises:
        ConfigError: the template cannot be trained with: it does not continue its own prompts, or ends no answer.
        PromptError: it moves the images of a turn whose order among the words carries meaning.
    """
    end = processor.tokenizer.eos_token
    messages: list[dict[str, Any]] = []
    if system_prompt:
        messages.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    pieces: list[Piece] = []
    done = ""
    for turn in turns:
        content = _content(turn.text)
        messages.append({"role": turn.role, "content": content})
        is_user = turn.role == "user"
        text = processor.apply_chat_template(messages, add_generation_prompt=is_user, tokenize=False)
        if not text.startswith(done) or (not is_user and end not in text[len(done) :]):
            fault = f"writes no {end} after an answer" if end not in text else "changes a prompt that is answered"
            raise ConfigError(
                f"train.template=chat: the checkpoint's chat template {fault}, so it cannot be trained with. Use"
                " train.template=vicuna_v1."
            )
        new, done = text[len(done) :], text
        if turn.text.count(IMAGE_PLACEHOLDER) > 1:
            _check_order(new, content, getattr(processor, "image_token", IMAGE_PLACEHOLDER))
        if is_user:
            pieces.append(Piece(new))
        else:
            stop = new.index(end) + len(end)
            pieces += [Piece(new[:stop], is_target=True), Piece(new[stop:])]
    return pieces


def _content(text: str) -> list[dict[str, Any]]:
    """A turn as chat templates take it: its words and images in their order."""
    words = text.split(IMAGE_PLACEHOLDER)
    if len(words) == 2:
        return [{"type": "image"}, {"type": "text", "text": "".join(words).strip()}]
    content: list[dict[str, Any]] = []
    for number, own in enumerate(words):
        content += [{"type": "image"}] if number else []
        if own.strip() or len(words) == 1:
            content.append({"type": "text", "text": own})
    return content


def _check_order(text: str, content: Sequence[Mapping[str, Any]], image_token: str) -> None:
    """Raises PromptError unless a turn's text has the parts of its content one after the other."""
    position = 0
    for item in content:
        part = image_token if item["type"] == "image" else item["text"].strip()
        found = text.find(part, position)
        if found < 0:
            raise PromptError(
                f"train.template=chat: the checkpoint's chat template does not write {part!r} where the turn has it, so"
                " images or words would change places. Use train.template=vicuna_v1, which keeps them."
            )
        position = found + len(part)


Template = Callable[[Sequence[Turn], str | None, Any], list[Piece]]
TEMPLATES: Mapping[str, Template] = {"vicuna_v1": vicuna_v1, "plain": plain, "chat": chat}


def find_template(name: str) -> Template:
    """The template of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in TEMPLATES:
        raise ConfigError(f"train.template={name}: must be one of {', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}.")
    return TEMPLATES[name]


def encode(pieces: Sequence[Piece], tokenizer: Any, image_token_id: int, video_token_id: int | None = None) -> Encoded:
    """Tokenizes the pieces as one text and labels the tokens of the target pieces, placeholders left out.

    A video's placeholder stays where the text has it.

    Raises:
        ConfigError: a tokenizer that cannot say which characters a token covers.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} cannot tell which characters a token covers, which training needs: save the"
            " checkpoint with a fast tokenizer (a tokenizer.json)."
        )
    ids, covered = tokenize(tokenizer, "".join(piece.text for piece in pieces), with_spans=True)
    spans: list[tuple[int, int]] = []
    position = 0
    for piece in pieces:
        if piece.is_target:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    labels, number = [], 0
    for token, (start, stop) in zip(ids, covered, strict=True):
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        within = number < len(spans) and spans[number][0] <= start < stop <= spans[number][1]
        labels.append(token if within and token not in (image_token_id, video_token_id) else IGNORED_LABEL)
    num_videos = 0 if video_token_id is None else ids.count(video_token_id)
    return Encoded(ids, labels, ids.count(image_token_id), num_videos)


def truncate(
    encoded: Encoded,
    image_lengths: Sequence[int],
    image_token_id: int,
    max_length: int,
    video_lengths: Sequence[int] = (),
    video_token_id: int | None = None,
) -> Encoded:
    """Cuts a conversation off at ``max_length`` tokens, visual tokens counted, and never within an image or video.

    One that would not fit whole goes, with everything after it.

    Args:
        encoded: the conversation.
        image_lengths: visual tokens of each of its images, in order.
        image_token_id: id of the placeholder.
        max_length: tokens that may enter the language model.
        video_lengths, video_token_id: the same for its videos.
    """
    remaining = {image_token_id: iter(image_lengths)}
    if video_token_id is not None:
        remaining[video_token_id] = iter(video_lengths)
    length = kept = 0
    for token in encoded.ids:
        length += next(remaining[token]) if token in remaining else 1
        if length > max_length:
            break
        kept += 1
    ids = encoded.ids[:kept]
    num_videos = 0 if video_token_id is None else ids.count(video_token_id)
    return Encoded(ids, encoded.labels[:kept], ids.count(image_token_id), num_videos)
