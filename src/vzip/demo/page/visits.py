"""What each visitor of the page has open: an image or video, its dialogue, and which of their wishes is the latest."""

from __future__ import annotations

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


@dataclass
class Visit:
    """One visitor's.

    Attributes:
        medium: None: nothing is open yet.
        turns: the dialogue about it; only the last one's answers may be missing.
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
        """A turn more; an earlier one that was never answered is forgotten."""
        self.turns = [turn for turn in self.turns if turn.vanilla and turn.compressed] + [Turn(question)]

    @property
    def question(self) -> str | None:
        """The last one."""
        return self.turns[-1].question if self.turns else None

    def history(self, side: str) -> list[tuple[str, str]]:
        """Questions and answers of a side (``vanilla``, ``compressed``) before the last turn."""
        return [(turn.question, getattr(turn, side).text) for turn in self.turns[:-1]]


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
