"""lmms-eval's requests as questions: told apart, read, and made ready for the model."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from vzip.errors import ImageError, VideoError
from vzip.evaluation.answering.messages import read_messages
from vzip.models.devices import sent

from .batching import VISUAL_CACHE_GIB, cut
from .generation import GenerationSettings, settings_for
from .visuals import BYTES_PER_GIB, UNUSABLE, Visual, Visuals

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from vzip.media.video import VideoSource
    from vzip.models.vlm import CompressedVlm

# Task, number of the row in its data, and which time the row is asked (tasks may repeat a question).
Key = tuple[str, int, int]
_NUM_NAMED = 64


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
        shown: of each image, then of each video, its key in ``Visuals``.
    """

    question: Question
    prompt: str
    asked: str
    images: list[Image.Image]
    videos: list[VideoSource]
    shown: tuple[Hashable, ...]


@dataclass(frozen=True)
class Chunk:
    """Questions that are answered at once.

    Attributes:
        loaded: the questions.
        prompts: ``input_ids`` and ``attention_mask``; None where they are yet to be made.
    """

    loaded: list[LoadedQuestion]
    prompts: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class PreparedSection:
    """A section of the plan, ready for the model.

    Attributes:
        batches: of the plan, in chunks, and what they show; together all questions that are to be asked and can be.
        problems: why the others cannot.
    """

    batches: list[tuple[list[Chunk], Visuals]]
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


_NAMES_AN_IMAGE = re.compile("image|img|video", re.IGNORECASE)
_BYTES_COMPARED = 2**14


def images_of(questions: Sequence[Question], datasets: Mapping[str, Any]) -> list[Hashable]:
    """For each question what, by its row, tells its images and videos from others'; nothing is decoded.

    It says which questions are best asked near each other, and no more: whether images are the same one, their pixels
    tell. A row without a column that is named for images or videos is taken for the only one about its own.

    Args:
        questions: of all tasks.
        datasets: of each task its splits, as lmms-eval holds them.
    """
    rows: dict[tuple[str, str], list[int]] = {}
    for question in questions:
        task, split = question.request.args[4:6]
        rows.setdefault((task, split), []).append(question.key[1])
    found: dict[Key, Hashable] = {}
    for (task, split), numbers in rows.items():
        numbers = sorted(set(numbers))
        for number, value in zip(numbers, _shown_by(datasets[task][split], numbers), strict=False):
            found[task, number, 0] = value
    return [found.get((*question.key[:2], 0), question.key) for question in questions]


def _shown_by(rows: Any, numbers: list[int]) -> Iterator[Hashable]:
    """The digest of what the columns for images hold, row by row; nothing where there are none."""
    names = [name for name in getattr(rows, "column_names", None) or () if _NAMES_AN_IMAGE.search(name)]
    if not names or not hasattr(rows, "select_columns"):
        return
    raw = rows.select_columns(names).with_format("arrow")  # as it is stored: images are not decoded
    for part in cut(numbers, 256):
        table = raw.select(part)[:]
        for row in zip(*(_beginnings(table[name]) for name in names), strict=True):
            yield hashlib.blake2b(repr(row).encode(), digest_size=16).digest()


def _beginnings(column: Any) -> list[Any]:
    """An Arrow column row by row; of files their length and how they begin, so that no more of them is read."""
    from pyarrow import compute, types

    if types.is_struct(column.type):
        parts = [compute.struct_field(column, number) for number in range(column.type.num_fields)]
        return list(zip(*map(_beginnings, parts), strict=True))
    if types.is_binary(column.type) or types.is_large_binary(column.type):
        starts = compute.binary_slice(column, 0, _BYTES_COMPARED).to_pylist()
        return list(zip(compute.binary_length(column).to_pylist(), starts, strict=True))
    return column.to_pylist()


def write_prompts(vlm: CompressedVlm, loaded: Sequence[LoadedQuestion], visuals: Visuals) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` of questions, for ``CompressedVlm.generate``."""
    written = visuals.written([key for one in loaded for key in one.shown[len(one.images) :]])
    num_images, num_videos = [len(one.images) for one in loaded], [len(one.videos) for one in loaded]
    prompts = vlm.write_prompts([one.prompt for one in loaded], num_images, num_videos, written)
    return sent(prompts, vlm.device)


class Preparer:
    """Reads questions and makes the model's inputs of them; may be called by several threads.

    Args:
        vlm: the wrapper that will be asked.
        datasets: of each task its splits, as lmms-eval holds them.
        system_prompt: text of a system turn before each question; None for none.
        cache_gib: of a section whose visual tokens are more, each batch encodes its own images.
    """

    def __init__(
        self,
        vlm: CompressedVlm,
        datasets: Mapping[str, Any],
        system_prompt: str | None,
        cache_gib: float = VISUAL_CACHE_GIB,
    ) -> None:
        self.vlm = vlm
        self.cache_gib = cache_gib
        self.datasets = datasets
        self.system_prompt = system_prompt
        processor: Any = vlm.processor
        self.processor = processor
        self.placeholders = {"image": str(processor.image_token)}
        if vlm.adapter.video_token_id is not None:
            self.placeholders["video"] = processor.tokenizer.convert_ids_to_tokens(vlm.adapter.video_token_id)

    def prepare(
        self, section: Sequence[Sequence[Question]], chunk_size: int, known: Container[Key] = ()
    ) -> PreparedSection:
        """A section, in chunks of at most ``chunk_size``.

        Args:
            section: its batches.
            chunk_size: questions answered at once, and whose images go through the vision tower at once, at most.
            known: questions that are answered already. They are opened and preprocessed all the same, for what goes
                through the tower together must be what it is where none is answered.

        Raises:
            PromptError, UnsupportedModelError: see ``read_messages``.
            Anything that the task's own functions raise, with a note that names the question.
        """
        problems: dict[Key, str] = {}
        visuals = Visuals(self.vlm)
        batches: list[list[LoadedQuestion]] = []
        for batch in section:
            batches.append([])
            for question in batch:
                try:
                    one = self._load(question, visuals)
                except UNUSABLE as error:
                    if question.key not in known:
                        problems[question.key] = _describe(error)
                    continue
                if question.key not in known:
                    batches[-1].append(one)
        visuals.arrange(chunk_size)
        left = [one for batch in batches for one in batch]
        with NamingTheQuestion(names_of(left)):
            unusable = visuals.preprocess()
        if len(section) > 1 and visuals.num_bytes > self.cache_gib * BYTES_PER_GIB:
            del visuals  # whose inputs are made anew, batch by batch
            unanswered = [batch for batch in section if any(question.key not in known for question in batch)]
            parts = [self.prepare([batch], chunk_size, known) for batch in unanswered]
            for part in parts:
                problems |= part.problems
            return PreparedSection([batch for part in parts for batch in part.batches], problems)
        for one in left:
            if found := [unusable[key] for key in one.shown if key in unusable]:
                problems[one.question.key] = _describe(found[0])
        usable = [[one for one in batch if one.question.key not in problems] for batch in batches]
        return PreparedSection([(self._chunks(batch, visuals, chunk_size), visuals) for batch in usable], problems)

    def _load(self, question: Question, visuals: Visuals) -> LoadedQuestion:
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
        of_method = asked if self.vlm.compressor.reads_text else None
        shown = visuals.add(
            [*(Visual(image, len(images), of_method) for image in images), *(Visual(v, 1, of_method) for v in videos)]
        )
        # Of images that are alike one is held.
        alike: list[Any] = [visuals.source(key) for key in shown]
        return LoadedQuestion(question, prompt, asked, alike[: len(images)], alike[len(images) :], shown)

    def _chunks(self, batch: list[LoadedQuestion], visuals: Visuals, chunk_size: int) -> list[Chunk]:
        parts = [[batch[position] for position in part] for part in cut(range(len(batch)), chunk_size)]
        return [Chunk(part, write_prompts(self.vlm, part, visuals)) for part in parts]


def names_of(loaded: Sequence[LoadedQuestion]) -> str:
    """Of the first few, for messages."""
    names = [one.question.name for one in loaded[:_NUM_NAMED]]
    return ", ".join([*names, *(["..."] if len(loaded) > _NUM_NAMED else [])])


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
