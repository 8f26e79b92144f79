"""Progress: plain lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vzip import progress
from vzip.progress import Progress, duration


class Clock:
    """Seconds that pass when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(Progress, "_keep_telling", lambda self: None)  # nobody tells by real time
    return Clock()


def lines(console: Console) -> list[str]:
    """What was told, without the time of day."""
    assert isinstance(console.file, io.StringIO)
    return [line.split(" ", 1)[1] for line in console.file.getvalue().splitlines()]


def test_a_line_every_five_percent(clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=20)
    with Progress("training", "steps", 200, console=console, clock=clock) as shown:
        for step in range(25):
            clock.now += 2
            shown.advance(note=f"loss {step}.5")
    assert lines(console)[:2] == [
        "training: 10 of 200 steps (5 %), loss 9.5, 0.5 steps/s, 6 min 20 s left",
        "training: 20 of 200 steps (10 %), loss 19.5, 0.5 steps/s, 6 min 00 s left",
    ]
    assert lines(console)[2:] == ["training: 25 of 200 steps (12 %), loss 24.5, 0.5 steps/s, 5 min 50 s left"], (
        "the end"
    )


def test_a_line_every_thirty_seconds(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("answering", "questions", 10_000, console=console, clock=clock) as shown:
        for _ in range(7):
            clock.now += 10
            shown.advance()
        assert lines(console) == [
            "answering: 3 of 10,000 questions (0 %), 0.1 questions/s, 27 h 46 min left",
            "answering: 6 of 10,000 questions (0 %), 0.1 questions/s, 27 h 45 min left",
        ]


def test_fast_work_is_told_once_a_second_and_at_its_end(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("measuring", "passes", 100, console=console, clock=clock) as shown:
        for _ in range(100):
            clock.now += 0.03
            shown.advance()
    assert [line.split(" of ")[0] for line in lines(console)] == ["measuring: 34", "measuring: 68", "measuring: 100"]


def test_work_that_goes_on_starts_where_it_was_and_its_rate_is_of_now(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("answering", "questions", 80, done=8, console=console, clock=clock) as shown:
        clock.now = 4
        shown.advance(8)
    assert lines(console) == ["answering: 16 of 80 questions (20 %), 2 questions/s, 32 s left"]


def test_bytes_and_what_has_no_known_end(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("a.zip", "bytes", console=console, clock=clock) as shown:
        clock.now = 40
        shown.update(200 * 1024**2)
    assert lines(console) == ["a.zip: 200 MiB, 5 MiB/s"]


def test_a_step_that_takes_long_is_told_of_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    console = Console(file=io.StringIO())
    with Progress("training", "steps", 2, console=console) as shown:
        shown._ended.wait(1.5)
    assert lines(console)[0] == "training: 0 of 2 steps (0 %)"


def test_a_terminal_has_a_bar_and_no_lines(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("answering", "questions", 80, done=8, console=console, clock=clock) as shown:
        clock.now = 40
        shown.advance(8)
        assert shown._bar is not None and shown._bar.tasks[0].completed == 16
    assert isinstance(console.file, io.StringIO) and "questions/s" not in console.file.getvalue()


def test_other_processes_are_silent(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with Progress("answering", "questions", 8, show=False, console=console, clock=clock) as shown:
        clock.now = 100
        shown.advance(8)
    assert lines(console) == []


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 61, 7500)] == ["4 s", "1 min 01 s", "2 h 05 min"]
