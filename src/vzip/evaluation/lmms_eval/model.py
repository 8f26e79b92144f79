"""The adapter between lmms-eval and a ``CompressedVlm``.

lmms-eval calls ``generate_until`` with the questions of all tasks at once. The adapter plans batches of equal
generation settings, builds each prompt with the checkpoint's own chat template, generates, and writes down how many
visual tokens each image really contributed. An answer that could not be computed is never scored as an empty one:
exceptions are not caught, and a question whose image cannot be read ends the run or is left out of the score.
"""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from vzip.errors import ManifestError, UnsupportedModelError
from vzip.evaluation.answering.answers import Answerer, SampleLog
from vzip.evaluation.answering.batching import (
    VISUAL_CACHE_GIB,
    BatchSize,
    check_batch_size,
    plan_sections,
    planned_size,
)
from vzip.evaluation.answering.generation import check_overrides
from vzip.evaluation.answering.processes import Processes
from vzip.evaluation.answering.questions import (
    Key,
    LoadedQuestion,
    PreparedSection,
    Preparer,
    Question,
    images_of,
    list_questions,
)
from vzip.evaluation.answering.read_ahead import prepare_ahead
from vzip.evaluation.answering.visuals import EncodedCache
from vzip.evaluation.benchmarks.question_counts import compare_counts
from vzip.evaluation.benchmarks.question_groups import partners_of
from vzip.installed import missing_package
from vzip.media.images import strict_decoding
from vzip.progress import Progress

if TYPE_CHECKING:
    from vzip.evaluation.answering.resume import AnswerStore
    from vzip.models.vlm import CompressedVlm

try:
    from lmms_eval.api.instance import Instance
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise missing_package("Evaluating", "lmms_eval", error) from error

OnProblem = Literal["refuse", "skip"]
_SHOWN_PROBLEMS = 20

logger = logging.getLogger(__name__)


class ShareAnsweredError(Exception):
    """Ends lmms-eval in every process but the first, which alone scores; no error of anybody's."""


class VzipLmms(lmms):
    """A ``CompressedVlm`` as an lmms-eval model (chat type).

    Args:
        vlm: the wrapper to evaluate; used as it is, and still whole after the run.
        batch_size: questions generated together, or ``auto``; fewer once memory does not suffice.
        gen_kwargs: generation settings that override those of every task.
        system_prompt: text of a system turn before each question; None for none.
        progress: show a progress bar on standard error (first process only).
        num_workers: threads that read images and make inputs ahead; 0: none.
        on_problem: what becomes of questions whose images or videos cannot be read: ``refuse`` ends the run, once
            everything else is answered, ``skip`` leaves them out of the score.
        seed: of sampled answers.
        store: answers of an interrupted run, and where to keep new ones; None for neither.
        processes: that share the questions.
        visual_cache_gib: memory for visual tokens of images that several questions show, on the model's device; 0:
            each batch encodes its own.
        num_images: how many questions of a task have their image kept in ``images``.

    Attributes:
        batch_size: a number also where ``auto`` was asked for: what is tried first.
        samples: what happened to each question.
        batch_sizes: how often how many questions were generated at once.
        problems: why a question could not be asked.
        num_questions: of all tasks; None before they are asked.
        answering_time_s: of this process, from the first image opened to the last answer.
        cache: of visual tokens, which counts what was encoded and shown; of several processes of this one.
        images: the first image of the first questions answered, to be shown.

    Raises:
        ConfigError: a batch size or generation setting that cannot be.
        UnsupportedModelError: the wrapper has no processor, or its processor no chat template.
    """

    is_simple = False  # lmms-eval: requests come as chat messages

    def __init__(
        self,
        vlm: CompressedVlm,
        *,
        batch_size: BatchSize = 1,
        gen_kwargs: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        progress: bool = True,
        num_workers: int = 2,
        on_problem: OnProblem = "refuse",
        seed: int = 0,
        store: AnswerStore | None = None,
        processes: Processes | None = None,
        visual_cache_gib: float = VISUAL_CACHE_GIB,
        num_images: int = 0,
    ) -> None:
        super().__init__()
        check_batch_size(batch_size)
        self.cache = EncodedCache(visual_cache_gib)
        _check_processor(vlm.processor)
        self.vlm = vlm
        self.batch_size = planned_size(batch_size, vlm.device)
        self.gen_kwargs = check_overrides(gen_kwargs)
        self.system_prompt = system_prompt
        self.progress = progress
        self.num_workers = num_workers
        self.on_problem = on_problem
        self.seed = seed
        self.store = store
        self.processes = processes or Processes()
        self.samples: dict[Key, SampleLog] = {}
        self.batch_sizes: Counter[int] = Counter()
        self.problems: dict[Key, str] = {}
        self.num_questions: int | None = None
        self.answering_time_s = 0.0
        self.num_images = num_images
        self.images: dict[Key, Image.Image] = {}
        # Opened now: lmms-eval's own output may be redirected while it runs.
        self._console = Console(file=sys.stderr)

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
            ManifestError: questions whose images or videos cannot be read, or whose prompts are longer than the model
                reads, unless they are to be skipped.
            TokenCountError: an image entered the language model with another number of tokens than the budget's.
            DeviceMemoryError: a question that does not fit the memory alone.
            ShareAnsweredError: in every process but the first.
            Anything the model or the task raises.
        """
        questions = list_questions(requests, self.gen_kwargs)
        if not questions:
            return []
        self.num_questions = len(questions)
        if self.processes.is_first:
            splits = {question.key[0]: question.request.args[-1] for question in questions}
            compare_counts((task, len(self.task_dict[task][split])) for task, split in splits.items())
        known = {} if self.store is None else {q.key: log for q in questions if (log := self.store.find(q)) is not None}
        self.samples = known
        sections = self._plan(questions, known)
        if known and self.progress and self.processes.is_first:  # not logged: that goes to lmms-eval's log meanwhile
            told = f"{len(known)} of {len(questions)} answers kept from the interrupted run"
            print(told, file=self._console.file, flush=True)
        started = time.perf_counter()
        with strict_decoding():
            self._answer(self.processes.share(sections), known)
        self.answering_time_s = time.perf_counter() - started
        self._collect()
        if self.problems:
            self._leave_out(questions)
        # Some tasks draw an answer where they understand none. How much was drawn before must not matter: in a run that
        # goes on after an interruption fewer questions were read.
        random.seed(self.seed)
        np.random.seed(self.seed)
        # A question that is left out has no answer; lmms-eval does not score the empty text.
        return [self.samples[q.key].answer if q.key in self.samples else "" for q in questions]

    def _plan(self, questions: Sequence[Question], known: Mapping[Key, SampleLog]) -> list[list[list[Question]]]:
        """What is left to do: the sections of the whole run in which not every question is answered already."""
        tokenizer: Any = self.vlm.processor.tokenizer  # type: ignore[union-attr]
        lengths = [len(ids) for ids in tokenizer([question.text for question in questions])["input_ids"]]
        images = images_of(questions, self.task_dict)
        plan = plan_sections(lengths, [question.settings for question in questions], images, self.batch_size)
        sections = [[[questions[position] for position in batch] for batch in section] for section in plan]
        if not self.cache.max_gib:
            sections = [[batch] for section in sections for batch in section]
        return [s for s in sections if any(question.key not in known for batch in s for question in batch)]

    def _answer(self, sections: list[list[list[Question]]], known: Mapping[Key, SampleLog]) -> None:
        """Answers this process's share and keeps each batch at once."""
        kept = None if self.store is None else self.store.kept
        chunk_size = min(self.batch_size, (kept and kept.chunk_size) or self.batch_size)
        answerer = Answerer(self.vlm, chunk_size, self.seed, self.cache)
        preparer = Preparer(self.vlm, self.task_dict, self.system_prompt, self.cache.max_gib)
        already = frozenset(known)

        def prepare(section: list[list[Question]]) -> PreparedSection:
            return preparer.prepare(section, answerer.chunk_size, already)

        ahead = prepare_ahead(sections, prepare, self.num_workers)
        num_left = sum(question.key not in already for section in sections for batch in section for question in batch)
        with self._progress(len(already), num_left) as progress, contextlib.closing(ahead) as prepared:
            for section in prepared:
                for key, problem in section.problems.items():
                    self._put_down(key, problem)
                progress.advance(len(section.problems))
                for chunks, visuals in section.batches:
                    loaded = [one for chunk in chunks for one in chunk.loaded]
                    self._keep_images(loaded)
                    logs, sizes = answerer.answer(chunks, visuals)
                    asked = [one.question for one in loaded if one.question.key not in answerer.problems]
                    answered = list(zip(asked, logs, strict=True))
                    if self.store is not None and answered:
                        halved = answerer.chunk_size if answerer.chunk_size < self.batch_size else None
                        self.store.add(answered, sizes, halved)
                    self.samples.update({question.key: log for question, log in answered})
                    self.batch_sizes.update(sizes)
                    for key, problem in answerer.problems.items():
                        self._put_down(key, problem)
                    answerer.problems.clear()
                    progress.advance(len(loaded))
        self.cache.clear()

    def _put_down(self, key: Key, problem: str) -> None:
        self.problems[key] = problem
        logger.warning("task %s, question %d cannot be asked: %s", key[0], key[1], problem)

    def _keep_images(self, loaded: Sequence[LoadedQuestion]) -> None:
        for one in loaded:
            kept = sum(key[0] == one.question.key[0] for key in self.images)
            if one.images and kept < self.num_images:
                self.images[one.question.key] = one.images[0]

    def _collect(self) -> None:
        """Brings all answers to the first process."""
        shares = self.processes.gather((self.samples, self.batch_sizes, self.problems))
        if shares is None:
            raise ShareAnsweredError
        for samples, batch_sizes, problems in shares[1:]:
            self.samples.update(samples)
            self.batch_sizes.update(batch_sizes)
            self.problems.update(problems)
        if self.store is not None:
            self.batch_sizes.update(self.store.kept.sizes)

    def _leave_out(self, questions: Sequence[Question]) -> None:
        """Ends the run, or takes the questions that could not be asked out of what lmms-eval scores."""
        if self.on_problem == "skip":
            self.problems |= partners_of(self.problems, questions, self.task_dict)
        asked = {question.key[0] for question in questions if question.key not in self.problems}
        if self.on_problem == "refuse" or not {key[0] for key in self.problems} <= asked:
            raise ManifestError(self._problems_text(len(questions)))
        for question in questions:
            if question.key in self.problems:
                scored = question.request.args[1].__self__.instances  # of the task whose messages these are
                scored[:] = [request for request in scored if request is not question.request]

    def _problems_text(self, num_questions: int) -> str:
        listed = [f"  task {key[0]}, question {key[1]}: {text}" for key, text in sorted(self.problems.items())]
        more = [f"  ... and {len(listed) - _SHOWN_PROBLEMS} more"] if len(listed) > _SHOWN_PROBLEMS else []
        first = f"{len(listed)} of {num_questions} questions cannot be asked, so there is no score:"
        way_out = "All other answers are kept. Mend the data and start the same command again"
        if self.on_problem == "refuse":
            way_out += (
                ", or leave these questions out of the score with eval.on_problem=skip (the record then says so and is"
                " provisional)"
            )
        else:
            way_out += ": of one task there is no other question that could be scored"
        return "\n".join([first, *listed[:_SHOWN_PROBLEMS], *more, f"{way_out}."])

    def _progress(self, num_known: int, num_left: int) -> Progress:
        """Of all questions; of several processes the first tells of its own share, without what is known."""
        alone = self.processes.count == 1
        what = "answering" if alone else f"answering, a share of {self.processes.count}"
        done = num_known if alone else 0
        show = self.progress and self.rank == 0 and self.processes.is_first
        return Progress(what, "questions", done + num_left, done=done, show=show, console=self._console)


def _check_processor(processor: Any) -> None:
    if processor is None:
        raise UnsupportedModelError(
            "the model has no processor, so no prompt can be written for it. Load it from a directory that holds"
            " its processor files, or pass CompressedVlm(..., processor=...)."
        )
    if not processor.chat_template:
        raise UnsupportedModelError(
            f"the checkpoint's {type(processor).__name__} has no chat template (chat_template.jinja), so its"
            " prompt format is not known. Add the template to the checkpoint directory."
        )
