"""lmms-eval's requests as questions: told apart, read, and made ready for the model."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vzip.errors import ImageError, VideoError
from vzip.evaluation.answering.messages import read_messages

from .batching import cut
from .generation import GenerationSettings, settings_for

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from vzip.media.video import VideoSource
    from vzip.models.vlm import CompressedVlm

# Task, number of the row in its data, and which time the row is asked (tasks may repeat a question).
Key = tuple[str, int, int]
# What reading a row's images and videos raises where they are missing or damaged; anything else ends the run at once.
# Pillow raises SyntaxError for a broken PNG.
UNUSABLE = (ImageError, VideoError, OSError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        key: see ``Key``.
        settings: how its answer is generated.
        text: what is asked, known without opening images.
        request: lmms-eval's.
    """

    key: Key
    settings: GenerationSettings
    text: str
    request: Instance

    @property
    def name(self) -> str:
        return f"task {self.key[0]}, question {self.key[1]}"

    @property
    def digest(self) -> str:
        """Changes with the text and with how the answer is generated."""
        return hashlib.sha256(repr((self.text, self.settings)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LoadedQuestion:
    """A question with its images and videos opened.

    Attributes:
        question: the question.
        prompt: as the chat template writes it, with a placeholder for each image and video.
        asked: the last turn's text alone, which text-aware methods read.
        images, videos: in the order of their placeholders.
    """

    question: Question
    prompt: str
    asked: str
    images: list[Image.Image]
    videos: list[VideoSource]


@dataclass(frozen=True)
class Chunk:
    """Questions that are answered at once.

    Attributes:
        loaded: the questions.
        inputs: keyword arguments of ``CompressedVlm.generate``; None where memory did not suffice to make them ahead.
    """

    loaded: list[LoadedQuestion]
    inputs: dict[str, Tensor] | None


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of the plan, ready for the model.

    Attributes:
        chunks: in order; together all questions that can be asked.
        problems: why the others cannot.
    """

    chunks: list[Chunk]
    problems: dict[Key, str]


def list_questions(requests: Sequence[Instance], overrides: Mapping[str, Any]) -> list[Question]:
    """The questions of lmms-eval's requests, in their order.

    Args:
        requests: of output type ``generate_until``, as chat messages.
        overrides: generation settings of the user's.

    Raises:
        ConfigError: a task asks for a generation setting that is not known.
    """
    seen: Counter[tuple[str, int]] = Counter()
    questions = []
    for request in requests:
        text, _, of_task, doc_id, task, _ = request.args
        settings = settings_for(task, of_task, overrides)
        questions.append(Question((task, doc_id, seen[task, doc_id]), settings, str(text), request))
        seen[task, doc_id] += 1
    return questions


def build_inputs(vlm: CompressedVlm, loaded: Sequence[LoadedQuestion]) -> dict[str, Tensor]:
    """Keyword arguments of ``CompressedVlm.generate``."""
    return vlm.build_inputs([q.prompt for q in loaded], [q.images for q in loaded], [q.videos for q in loaded])


class Preparer:
    """Reads questions and makes the model's inputs of them; may be called by several threads.

    Args:
        vlm: the wrapper that will be asked.
        datasets: of each task its splits, as lmms-eval holds them.
        system_prompt: text of a system turn before each question; None for none.
    """

    def __init__(self, vlm: CompressedVlm, datasets: Mapping[str, Any], system_prompt: str | None) -> None:
        self.vlm = vlm
        self.datasets = datasets
        self.system_prompt = system_prompt
        processor: Any = vlm.processor
        self.processor = processor
        self.placeholders = {"image": str(processor.image_token)}
        if vlm.adapter.video_token_id is not None:
            self.placeholders["video"] = processor.tokenizer.convert_ids_to_tokens(vlm.adapter.video_token_id)

    def prepare(self, batch: Sequence[Question], chunk_size: int) -> PreparedBatch:
        """A batch, in chunks of at most ``chunk_size``.

        Raises:
            PromptError, UnsupportedModelError: see ``read_messages``.
            Anything that the task's own functions raise, with a note that names the question.
        """
        problems: dict[Key, str] = {}
        loaded = []
        for question in batch:
            try:
                loaded.append(self._load(question))
            except UNUSABLE as error:
                problems[question.key] = _describe(error)
        try:
            chunks = self._chunks(loaded, chunk_size)
        except UNUSABLE:
            loaded = [one for one in loaded if self._is_usable(one, problems)]
            chunks = self._chunks(loaded, chunk_size)
        return PreparedBatch(chunks, problems)

    def _load(self, question: Question) -> LoadedQuestion:
        _, doc_to_messages, _, doc_id, task, split = question.request.args
        with NamingTheQuestion(question.name):
            try:
                messages = doc_to_messages(self.datasets[task][split][doc_id])
            except SystemExit as error:  # what several of lmms-eval's tasks do where a video is missing
                raise VideoError(str(error)) from error
            images, videos, turns = read_messages(messages, task, doc_id, self.placeholders)
        if self.system_prompt:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        asked = "\n".join(part["text"] for part in turns[-1]["content"] if part["type"] == "text")
        return LoadedQuestion(question, prompt, asked, images, videos)

    def _chunks(self, loaded: list[LoadedQuestion], chunk_size: int) -> list[Chunk]:
        parts = [[loaded[position] for position in part] for part in cut(range(len(loaded)), chunk_size)]
        return [Chunk(part, self._inputs(part)) for part in parts]

    def _inputs(self, loaded: list[LoadedQuestion]) -> dict[str, Tensor] | None:
        with NamingTheQuestion(", ".join(one.question.name for one in loaded)):
            try:
                return build_inputs(self.vlm, loaded)
            except torch.OutOfMemoryError:  # pixels are sent to the device; tried again when their turn comes
                return None

    def _is_usable(self, one: LoadedQuestion, problems: dict[Key, str]) -> bool:
        """Whether inputs can be made of a question alone; if not, ``problems`` says why."""
        try:
            self._inputs([one])
        except UNUSABLE as error:
            problems[one.question.key] = _describe(error)
            return False
        return True


def _describe(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, ImageError | VideoError) else f"{type(error).__name__}: {text}"


class NamingTheQuestion:
    """Adds a note to whatever leaves the block: what it was about."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"While working on {self.name}.")
