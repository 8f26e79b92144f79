"""What each visitor of the page has open: an image or video, its dialogue, and which of their wishes is the latest."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from vzip.analysis.patch_attention import PatchAttention

from .studio import Answer, Medium

MAX_VISITS = 64


@dataclass
class Turn:
    """A question with both answers; None: not answered, or not under the settings that hold now."""

    question: str
    vanilla: Answer | None = None
    compressed: Answer | None = None

    @property
    def is_answered(self) -> bool:
        return self.vanilla is not None and self.compressed is not None

    def text(self, side: str) -> str:
        """A side's answer, empty where it is missing."""
        answer: Answer | None = getattr(self, side)
        return "" if answer is None else answer.text


@dataclass
class Visit:
    """One visitor's.

    Attributes:
        medium: None: nothing is open yet.
        turns: the dialogue about it; answers may be missing where they have not come yet.
        attention: of its patches, once it was asked for.
        patch: the one whose attention is shown.
    """

    medium: Medium | None = None
    turns: list[Turn] = field(default_factory=list)
    attention: PatchAttention | None = None
    patch: int | None = None
    _wish: int = 0
    _opening: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begin(self) -> Callable[[], bool]:
        """Begins a new wish, which ends the one before; returns whether it is still the latest."""
        with self._lock:
            self._wish += 1
            own = self._wish
        return lambda: own == self._wish

    def begin_opening(self) -> Callable[[], bool]:
        """The same of what is to be opened: another file or example ends it, a control that moves does not."""
        self.begin()  # nobody waits for what is asked about what was open
        with self._lock:
            self._opening += 1
            own = self._opening
        return lambda: own == self._opening

    def open(self, medium: Medium) -> None:
        """Another image or video, and so another dialogue."""
        self.medium, self.turns, self.attention, self.patch = medium, [], None, None

    def ask(self, question: str) -> None:
        """A turn more; an earlier one keeps its place and gets its answers first. The same again is no other turn."""
        if not self.turns or self.turns[-1].is_answered or self.turns[-1].question != question:
            self.turns = [*self.turns, Turn(question)]

    @property
    def question(self) -> str | None:
        """The last one."""
        return self.turns[-1].question if self.turns else None

    def history(self, side: str, turn: Turn) -> list[tuple[str, str]]:
        """Questions and answers of a side (``vanilla``, ``compressed``) before a turn."""
        before = itertools.takewhile(lambda other: other is not turn, self.turns)
        return [(other.question, other.text(side)) for other in before]


class Visits:
    """The visits of all who are there; of more than ``MAX_VISITS`` the oldest is forgotten."""

    def __init__(self, most: int = MAX_VISITS) -> None:
        self._most, self._visits, self._lock = most, dict[str, Visit](), threading.Lock()

    def __len__(self) -> int:
        return len(self._visits)

    def of(self, visitor: str) -> Visit:
        """A visitor's, begun if there is none."""
        with self._lock:
            visit = self._visits.pop(visitor, None) or Visit()
            self._visits[visitor] = visit  # the latest last
            while len(self._visits) > self._most:
                self._visits.pop(next(iter(self._visits)))
            return visit

    def end(self, visitor: str) -> None:
        """Forgets a visitor, whose answers nobody waits for."""
        with self._lock:
            if (visit := self._visits.pop(visitor, None)) is not None:
                visit.begin()
