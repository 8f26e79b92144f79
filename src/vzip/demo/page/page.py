"""What comes of what a visitor does: plain values for the screen, errors as sentences."""

from __future__ import annotations

import functools
import itertools
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from vzip.analysis.patch_attention import patch_at
from vzip.compressors.base import Compressor
from vzip.demo.benchmark import questions_of, test_scenes
from vzip.demo.render import render
from vzip.errors import DeviceMemoryError, ImageError, PromptError, UnsupportedModelError, VzipError

from .studio import Answer, Medium, Studio, SupersededError
from .visits import Turn, Visit

NUM_EXAMPLES = 6
MAX_QUESTION = 1000  # characters
_TOLD = (VzipError, torch.OutOfMemoryError)  # what a sentence is made of
NO_MEDIUM = "Nothing is open to ask about: drop a file, or choose an example."


@dataclass(frozen=True)
class View:
    """What to put on the screen; None leaves what is there.

    Attributes:
        seen: the image as the vision tower saw it, or the attention of a patch over it.
        caption: what that shows.
        overlay: what the method keeps and merges.
        vanilla, compressed: each side's dialogue, (question, answer) by turn.
        vanilla_facts, compressed_facts: of each side's last answer.
        question: what stands in the box for the next question.
        status: a sentence; empty: all is well.
    """

    seen: Image.Image | None = None
    caption: str | None = None
    overlay: Image.Image | None = None
    vanilla: list[tuple[str, str]] | None = None
    compressed: list[tuple[str, str]] | None = None
    vanilla_facts: str | None = None
    compressed_facts: str | None = None
    question: str | None = None
    status: str | None = None


@dataclass(frozen=True)
class Choice:
    """What the method's two controls say."""

    method: str
    num_tokens: int


@dataclass(frozen=True)
class Example:
    """A scene of the built-in benchmark with a question about it."""

    image: Image.Image
    question: str


def examples(count: int = NUM_EXAMPLES) -> list[Example]:
    """The first scenes of the benchmark, with questions that ask for different things."""
    scenes = test_scenes()[:count]
    asked = [questions_of(number, scene) for number, scene in enumerate(scenes)]
    chosen = [own[number % len(own)][0].text for number, own in enumerate(asked)]
    return [Example(render(scene), text) for scene, text in zip(scenes, chosen, strict=True)]


class Page:
    """The page's acts; each takes the visit that it changes and says what to show.

    Args:
        studio: the model.
        shown: the examples.
    """

    def __init__(self, studio: Studio, shown: list[Example]) -> None:
        self.studio, self.examples = studio, shown

    def open_file(self, visit: Visit, path: Path, choice: Choice) -> Iterator[View]:
        """An uploaded file, which is deleted as soon as it is read."""

        def read() -> Medium:
            try:
                return self.studio.open_file(path)
            finally:
                path.unlink(missing_ok=True)

        return _in_sentences(lambda: self._open(visit, read, choice, ""), path)

    def open_example(self, visit: Visit, number: int, choice: Choice) -> Iterator[View]:
        """An example, with its question in the box."""
        example = self.examples[number]
        return _in_sentences(
            lambda: self._open(visit, lambda: self.studio.open_image(example.image), choice, example.question)
        )

    def _open(self, visit: Visit, read: Callable[[], Medium], choice: Choice, question: str) -> Iterator[View]:
        is_latest = visit.begin_opening()
        medium = read()
        if not is_latest():
            return  # another was chosen while this one was read
        is_wanted = visit.begin()
        visit.open(medium)
        seen, caption = self._plain(visit)
        yield replace(self._dialogues(visit), seen=seen, caption=caption, question=question, status="")
        yield from self._overlay(visit, choice, is_wanted)

    def ask(self, visit: Visit, question: str, choice: Choice) -> Iterator[View]:
        """A question, answered on both sides."""

        def asked() -> Iterator[View]:
            if visit.medium is None:
                raise ImageError(NO_MEDIUM)
            if not question.strip():
                raise PromptError("The question is empty: type one.")
            if len(question) > MAX_QUESTION:
                raise PromptError(
                    f"The question has {len(question):,} characters, and {MAX_QUESTION:,} are allowed: shorten it."
                )
            is_wanted = visit.begin()
            visit.ask(question.strip())
            try:
                yield replace(self._dialogues(visit), question="", status="")
                yield from self._answers(visit, choice, is_wanted)
            except _TOLD as error:
                if not is_wanted():  # what came after has its own answers to wait for
                    raise SupersededError from error
                visit.turns = [turn for turn in visit.turns if turn.is_answered]
                yield replace(self._dialogues(visit), question=question)
                raise
            if self.studio.compressor(choice.method, choice.num_tokens).reads_text:
                yield from self._overlay(visit, choice, is_wanted)

        return _in_sentences(asked)

    def change(self, visit: Visit, choice: Choice) -> Iterator[View]:
        """Another method or budget: its overlay, and the last question answered anew on the compressed side."""

        def changed() -> Iterator[View]:
            if visit.medium is None:
                return
            is_wanted = visit.begin()
            yield from self._overlay(visit, choice, is_wanted)
            if not visit.turns:
                return
            turn = visit.turns[-1]
            before, turn.compressed = turn.compressed, None
            try:
                yield from self._answers(visit, choice, is_wanted)
            except _TOLD:
                if is_wanted():
                    turn.compressed = before
                    yield self._dialogues(visit)
                raise

        return _in_sentences(changed)

    def begin_anew(self, visit: Visit) -> Iterator[View]:
        """Forgets the dialogue, not the image."""
        visit.begin()
        visit.turns = []
        yield replace(self._dialogues(visit), status="")

    def click(self, visit: Visit, x: float, y: float) -> Iterator[View]:
        """A point of the image as the tower sees it: the attention of that patch, or, a second time, the image."""

        def clicked() -> Iterator[View]:
            medium, found = visit.medium, visit.attention
            if medium is None:
                raise ImageError(NO_MEDIUM)
            if found is None:
                found = self.studio.attention(medium)
                if visit.medium is not medium:
                    return  # another was opened meanwhile
                visit.attention = found
            patch = patch_at(x, y, found.seen.size, found.grid)
            if patch == visit.patch:
                seen, caption = self._plain(visit)
                yield View(seen=seen, caption=caption, status="")
                return
            visit.patch = patch
            row, col = divmod(patch, found.grid[1])
            most = found.rows[patch].topk(min(10, len(found.rows)))
            at = divmod(int(most.indices[0]), found.grid[1])
            caption = (
                f"Patch {row + 1}, {col + 1} (row, column): its attention at the select layer, mean over heads. Most of"
                f" it, {100 * most.values[0]:.1f} %, goes to patch {at[0] + 1}, {at[1] + 1};"
                f" {100 * most.values.sum():.0f} % to ten patches. Click it again for the image."
            )
            yield View(seen=found.drawn(patch), caption=caption, status="")

        return _in_sentences(clicked)

    def _plain(self, visit: Visit) -> tuple[Image.Image, str]:
        """The image as it is seen, without any patch's attention, and what to say of it."""
        visit.patch = None
        assert visit.medium is not None
        of_image = "The image as the vision tower sees it. Click a patch to see where it looks."
        caption = of_image if visit.medium.kind == "image" else "A frame from the middle of the video."
        return visit.medium.seen, caption

    def _overlay(self, visit: Visit, choice: Choice, is_wanted: Callable[[], bool]) -> Iterator[View]:
        if visit.medium is None or not is_wanted():
            return
        compressor = self.studio.compressor(choice.method, choice.num_tokens)
        try:
            overlay = self.studio.overlay(visit.medium, compressor, visit.question, is_wanted)
            why = "" if overlay else f"{choice.method} looks at the question: ask one to see what it keeps."
        except UnsupportedModelError as error:
            overlay, why = None, str(error)
        if is_wanted():
            yield View(overlay=overlay or visit.medium.seen, status=why)

    def _answers(self, visit: Visit, choice: Choice, is_wanted: Callable[[], bool]) -> Iterator[View]:
        """The answers that turns lack, as they come, of an earlier turn before those of the next."""
        medium = visit.medium
        assert medium is not None
        sides: dict[str, Compressor | None] = {"vanilla": None}
        sides["compressed"] = self.studio.compressor(choice.method, choice.num_tokens)
        for turn, (side, compressor) in itertools.product(visit.turns, sides.items()):
            if getattr(turn, side) is not None:
                continue
            run = functools.partial(
                self.studio.answer, medium, visit.history(side, turn), turn.question, compressor, is_wanted=is_wanted
            )
            last = Answer()
            for last in _streamed(run):
                if not is_wanted():
                    raise SupersededError
                yield self._side(visit, turn, side, last)
            setattr(turn, side, last)
            yield self._side(visit, turn, side, last)

    def _side(self, visit: Visit, turn: Turn, side: str, answer: Answer) -> View:
        """One side while an answer comes."""
        said = [(other.question, answer.text if other is turn else other.text(side)) for other in visit.turns]
        vanilla = turn.vanilla if side == "compressed" else None
        return View(**{side: said, f"{side}_facts": facts(answer, vanilla)})  # type: ignore[arg-type]

    def _dialogues(self, visit: Visit) -> View:
        """Both sides as they stand."""
        said = {side: [(turn.question, turn.text(side)) for turn in visit.turns] for side in ("vanilla", "compressed")}
        return View(vanilla=said["vanilla"], compressed=said["compressed"], vanilla_facts="", compressed_facts="")


def facts(answer: Answer, vanilla: Answer | None = None) -> str:
    """What an answer cost, in a line; beside vanilla's also how much less."""
    if answer.first_token_ms is None:
        return f"{answer.num_visual_tokens:,} visual tokens ..." if answer.num_visual_tokens else ""
    parts = [
        f"{answer.num_visual_tokens:,} visual tokens",
        f"first token after {answer.first_token_ms:,.0f} ms",
        f"KV memory {_size(answer.kv_bytes)}",
    ]
    if vanilla is not None and vanilla.first_token_ms and vanilla.num_visual_tokens and vanilla.kv_bytes:
        parts[0] += f" ({100 * answer.num_visual_tokens / vanilla.num_visual_tokens:.0f} %)"
        parts[1] += f" ({100 * answer.first_token_ms / vanilla.first_token_ms:.0f} %)"
        parts[2] += f" ({100 * answer.kv_bytes / vanilla.kv_bytes:.0f} %)"
    return " · ".join(parts)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.0f} KiB"


def _in_sentences(act: Callable[[], Iterator[View]], path: Path | None = None) -> Iterator[View]:
    """An act whose errors are sentences; where nobody waits for it any more it just ends.

    Args:
        act: of a visitor.
        path: a file whose place on this machine is nobody's business.
    """
    try:
        yield from act()
    except SupersededError:
        return
    except torch.OutOfMemoryError:
        error = DeviceMemoryError("The device's memory does not suffice: try a smaller image, or reset the dialogue.")
        yield View(status=str(error))
    except VzipError as error:
        said = str(error)
        yield View(status=said if path is None else said.replace(str(path), path.name))


def _streamed(run: Callable[[Callable[[Answer], None]], Answer]) -> Iterator[Answer]:
    """What a call tells while it runs in a thread of its own, then what it returns; raises what it raises."""
    told: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, told.put)
        running.add_done_callback(lambda _: told.put(None))
        while (answer := told.get()) is not None:
            yield answer
        yield running.result()
