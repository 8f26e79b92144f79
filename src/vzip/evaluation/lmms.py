"""The adapter between lmms-eval and a ``CompressedVlm``.

lmms-eval calls ``generate_until`` with the questions of all tasks at once. The adapter builds each prompt with the
checkpoint's own chat template, generates in batches of equal generation settings, and writes down how many visual
tokens each picture really contributed. Exceptions are never caught: an answer that could not be computed must end the
run, not be scored as an empty one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vzip.errors import ConfigError, MissingPackageError, UnsupportedModelError

from .generation import GenerationSettings, check_overrides, cut_at, settings_for
from .messages import read_messages
from .token_count import check_token_counts

if TYPE_CHECKING:
    from vzip.data.video import VideoSource
    from vzip.models.compressed_vlm import CompressedVlm

    from .resume import AnswerStore

INSTALL_HINT = (
    "run `make install`, or: pip install -c constraints.txt -e '.[eval]' && pip install --no-deps lmms-eval==0.7.3"
)

try:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise MissingPackageError(f"lmms-eval cannot be imported ({error}). To evaluate, {INSTALL_HINT}") from error


@dataclass
class SampleLog:
    """What happened to one question.

    Attributes:
        prompt: the text given to the tokenizer, one placeholder a picture or video.
        answer: the answer given to the scorer.
        num_visual_tokens: measured, one number a picture, then one a video.
    """

    prompt: str
    answer: str
    num_visual_tokens: list[int]


@dataclass
class _Question:
    position: int
    key: tuple[str, int]
    settings: GenerationSettings
    padding_only: bool
    prompt: str = ""
    images: list[Image.Image] = field(default_factory=list)
    videos: list[VideoSource] = field(default_factory=list)


class VzipLmms(lmms):
    """A ``CompressedVlm`` as an lmms-eval model (chat type).

    Args:
        vlm: the wrapper to evaluate; used as it is, and still whole after the run.
        batch_size: questions generated together.
        gen_kwargs: generation settings that override those of every task.
        system_prompt: text of a system turn before each question; None for none.
        progress: show a progress bar on standard error (rank 0 only).
        store: answers of an interrupted run, and where to keep new ones; None for neither.

    Raises:
        ConfigError: a batch size or generation setting that cannot be.
        UnsupportedModelError: the wrapper has no processor, or its processor no chat template.
    """

    is_simple = False  # lmms-eval: requests come as chat messages

    def __init__(
        self,
        vlm: CompressedVlm,
        *,
        batch_size: int = 1,
        gen_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        progress: bool = True,
        store: AnswerStore | None = None,
    ) -> None:
        super().__init__()
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size={batch_size!r}: must be a whole number, 1 or more.")
        if vlm.processor is None:
            raise UnsupportedModelError(
                "the model has no processor, so no prompt can be written for it. Load it from a directory that holds"
                " its processor files, or pass CompressedVlm(..., processor=...)."
            )
        if not vlm.processor.chat_template:
            raise UnsupportedModelError(
                f"the checkpoint's {type(vlm.processor).__name__} has no chat template (chat_template.jinja), so its"
                " prompt format is not known. Add the template to the checkpoint directory."
            )
        self.vlm = vlm
        self.processor: Any = vlm.processor
        self.placeholders = {"image": str(self.processor.image_token)}
        if vlm.adapter.video_token_id is not None:
            self.placeholders["video"] = self.processor.tokenizer.convert_ids_to_tokens(vlm.adapter.video_token_id)
        self.batch_size = batch_size
        self.gen_kwargs = check_overrides(gen_kwargs)
        self.system_prompt = system_prompt
        self.progress = progress
        self.store = store
        self.samples: dict[tuple[str, int], SampleLog] = {}
        # Opened now: lmms-eval's own output may be redirected while it runs.
        self._console = Console(file=sys.stderr)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> VzipLmms:  # lmms-eval's entry for `--model vzip --model_args ...`
        """Loads the model that ``--model_args`` describes; see ``vzip.evaluation.model_args``."""
        from .model_args import load_from_arg_string

        return cls(**load_from_arg_string(arg_string, additional_config or {}))

    @property
    def device(self) -> torch.device:
        """Where lmms-eval may put its counters in a multi-process run."""
        return self.vlm.device

    def clean(self) -> None:
        """Keeps the model. lmms-eval's own ``clean`` deletes every module after a run; a sweep uses it again."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise UnsupportedModelError(
            f"task {requests[0].task_name} scores answers by likelihood (output_type loglikelihood or multiple_choice);"
            " vzip evaluates generated answers only. Choose a task with output_type generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise UnsupportedModelError(
            f"task {requests[0].task_name} is a dialogue of several rounds (generate_until_multi_round); vzip evaluates"
            " single questions only. Choose a task with output_type generate_until."
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers all requests, in their order.

        Raises:
            TokenCountError: a picture entered the language model with another number of tokens than the budget's.
            Anything the model raises.
        """
        answers: list[str | None] = [None] * len(requests)
        groups: dict[GenerationSettings, list[int]] = {}
        for position, request in enumerate(requests):
            groups.setdefault(self._settings(request), []).append(position)
        with self._bar() as bar:
            task = bar.add_task("answering", total=len(requests))
            for settings, positions in groups.items():
                for batch in _chunks(positions, self.batch_size):
                    questions = [self._question(requests[position], position, settings) for position in batch]
                    for question, answer in zip(questions, self._answer(questions, settings), strict=True):
                        answers[question.position] = answer
                    bar.advance(task, len(batch))
        assert all(answer is not None for answer in answers)
        return [answer for answer in answers if answer is not None]

    def _settings(self, request: Instance) -> GenerationSettings:
        return settings_for(request.task_name, request.args[2], self.gen_kwargs)

    def _question(self, request: Instance, position: int, settings: GenerationSettings) -> _Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        question = _Question(
            position, (task, doc_id), settings, padding_only="__padding_only__" in (request.metadata or {})
        )
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        question.images, question.videos, turns = read_messages(messages, task, doc_id, self.placeholders)
        if self.system_prompt:
            turns.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        question.prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return question

    def _answer(self, questions: list[_Question], settings: GenerationSettings) -> list[str]:
        known = {q.position: self.store.find(q.key, q.prompt) for q in questions} if self.store else {}
        todo = [question for question in questions if known.get(question.position) is None]
        done = {position: log for position, log in known.items() if log is not None}
        if todo:
            for question, log in zip(todo, self._generate(todo, settings), strict=True):
                done[question.position] = log
                if self.store is not None:
                    self.store.add(question.key, log)
        for question in questions:
            if not question.padding_only:
                self.samples[question.key] = done[question.position]
        return [done[question.position].answer for question in questions]

    def _generate(self, questions: list[_Question], settings: GenerationSettings) -> list[SampleLog]:
        tokenizer = self.processor.tokenizer
        inputs = self.vlm.build_inputs(
            [q.prompt for q in questions], [q.images for q in questions], [q.videos for q in questions]
        )
        kwargs = dict(settings.kwargs)
        if tokenizer.pad_token_id is not None:
            kwargs["pad_token_id"] = tokenizer.pad_token_id
        with torch.no_grad():
            new_tokens = self.vlm.generate(**inputs, **kwargs)
        measured = check_token_counts(
            self.vlm,
            inputs.get("pixel_values"),
            [len(question.images) for question in questions],
            inputs.get("image_sizes"),
            inputs.get("tile_grids"),
            inputs.get("pixel_values_videos"),
            [len(question.videos) for question in questions],
        )
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return [
            SampleLog(question.prompt, cut_at(text, settings.until), counts)
            for question, text, counts in zip(questions, texts, measured, strict=True)
        ]

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self.progress or self.rank > 0,
        )


def _chunks(positions: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]
