"""Reading lmms-eval's chat messages: what is image, what video, what text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from vzip.errors import PromptError, UnsupportedModelError
from vzip.json_files import whole_text
from vzip.media.images import load_image
from vzip.media.video import VideoSource


def read_messages(
    messages: list[dict[str, Any]], task: str, doc_id: int, placeholders: Mapping[str, str]
) -> tuple[list[Image.Image], list[VideoSource], list[dict[str, Any]]]:
    """Splits lmms-eval chat messages into images and videos, in order, and turns for ``apply_chat_template``.

    Args:
        messages, task, doc_id: of one question.
        placeholders: what the model takes (``image``, ``video``) and the token that stands for it in a prompt.

    Raises:
        UnsupportedModelError: the question has audio, or a video that the model does not take.
        PromptError: a question's text holds a placeholder itself, or an image or video is not one.
    """
    images: list[Image.Image] = []
    videos: list[VideoSource] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_as_image(part["url"], task, doc_id))
                parts.append({"type": "image"})
            elif part["type"] == "video" and "video" in placeholders:
                videos.append(_as_video(part["url"], task, doc_id))
                parts.append({"type": "video"})
            elif part["type"] == "text":
                _refuse_placeholders(part["text"], task, doc_id, placeholders)
                parts.append({"type": "text", "text": whole_text(part["text"])})
            else:
                takes = "text, images and videos" if "video" in placeholders else "text and images"
                raise UnsupportedModelError(
                    f"task {task}, question {doc_id}: holds {part['type']}; with this model vzip evaluates {takes}."
                )
        turns.append({"role": message["role"], "content": parts})
    return images, videos, turns


def _refuse_placeholders(text: str, task: str, doc_id: int, placeholders: Mapping[str, str]) -> None:
    for kind, token in placeholders.items():
        if token in text:
            article = "an" if kind == "image" else "a"
            raise PromptError(
                f"task {task}, question {doc_id}: its text contains {token!r}, which marks where {article} {kind} goes."
                " Images and videos come from doc_to_visual; take the marker out in doc_to_text."
            )


def _as_image(image: object, task: str, doc_id: int) -> Image.Image:
    if isinstance(image, str | Image.Image):
        return load_image(image)
    raise PromptError(
        f"task {task}, question {doc_id}: doc_to_visual returned a {type(image).__name__}; images are PIL images or"
        " paths of image files."
    )


def _as_video(video: object, task: str, doc_id: int) -> VideoSource:
    if isinstance(video, str | Path) or (
        isinstance(video, list) and all(isinstance(frame, Image.Image) for frame in video)
    ):
        return video
    raise PromptError(
        f"task {task}, question {doc_id}: doc_to_visual returned a video as {type(video).__name__}; videos are paths of"
        " files or lists of PIL images. A part of a file (video_start, video_end) is not read: cut it out beforehand."
    )
