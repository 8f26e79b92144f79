"""Trackers beside metrics.jsonl: they show the run, go on with it, and can neither hold it up nor end it."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.train.kit import dying_at
from tests.train.runs import finish, kill_after, metrics

from vzip.errors import CheckpointError, MissingPackageError
from vzip.results.wandb_runs import wandb_mode
from vzip.train import tracking
from vzip.train.loop import TrainPlan, train
from vzip.train.tracking import Tracker


class FakeWandb:
    """Stands in for wandb; ``runs`` holds each run's arguments, ``logged`` what it was told, ``ended`` how it ended.

    Args:
        trouble: what the run does on each ``log``.
    """

    Error = type("Error", (Exception,), {})

    def __init__(self, trouble: Any = lambda: None) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.trouble = trouble
        self.ended: list[int] = []
        self.teardown = lambda: None

    class Settings(SimpleNamespace):
        model_fields = ("finish_timeout",)

    def init(self, **arguments: Any) -> Any:
        self.runs.append(arguments)

        def log(numbers: dict[str, float], step: int) -> None:
            self.trouble()
            self.logged.append((step, numbers))

        return SimpleNamespace(log=log, finish=lambda exit_code: self.ended.append(exit_code))


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield


def use(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def report(run_dir: Path, *steps: int, step: int = 0) -> list[int]:
    """Reports steps to a tracker of wandb; returns the steps in metrics.jsonl."""
    run_dir.mkdir(exist_ok=True)
    tracker = Tracker(run_dir, ["wandb"], {"learning_rate": 1}, step)
    for number in steps:
        tracker.log({"step": number, "loss": 1.0, "validation_loss": None})
    tracker.close()
    return [row["step"] for row in metrics(run_dir)]


def test_tensorboard_hides_what_a_killed_run_wrote_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, losses in ((0, {1: 2.5, 2: 1.5, 3: 9.0}), (2, {3: 1.25})):
        tracker = Tracker(tmp_path, ["tensorboard"], {}, start)
        for step, loss in losses.items():
            tracker.log({"step": step, "loss": loss})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.5), (3, 1.25)]


@pytest.mark.usefixtures("logged_out")
def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeWandb())
    assert report(tmp_path / "a", 1, 2) == [1, 2] and report(tmp_path / "a", 3, step=2) == [1, 2, 3]
    assert report(tmp_path / "b", 1) == [1]
    first, again, other = (run["id"] for run in fake.runs)
    assert first == again != other
    assert fake.logged == [(step, {"loss": 1.0}) for step in (1, 2, 3, 1)]
    assert (fake.runs[0]["mode"], fake.runs[0]["config"]) == ("offline", {"learning_rate": 1})
    assert fake.runs[0]["settings"].finish_timeout == tracking.CLOSE_SECONDS


@pytest.mark.usefixtures("logged_out")
def test_only_who_is_logged_in_goes_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode() == "offline", "logged in elsewhere"
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


@pytest.mark.usefixtures("logged_out")
def test_a_server_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    fake = use(monkeypatch, FakeWandb())
    init = fake.init

    def refuse(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            assert arguments["resume"] == "allow"
            raise FakeWandb.Error("no network")
        return init(**arguments)

    fake.init = refuse  # type: ignore[method-assign]  # a fake of a fake
    assert report(tmp_path / "run", 1) == [1] and fake.logged == [(1, {"loss": 1.0})]
    assert fake.runs[0]["mode"] == "offline"


@pytest.mark.parametrize("error", [FakeWandb.Error("broken"), OSError("no network"), LookupError("a bug of wandb's")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("logged_out")
def test_a_tracker_that_fails_does_not_end_the_run(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise error

    logging.getLogger("vzip").propagate = True
    fake = use(monkeypatch, FakeWandb(trouble=fail))
    assert report(tmp_path / "run", 1, 2, 3) == [1, 2, 3] and not fake.logged
    if not isinstance(error, LookupError):  # an error that nobody foresaw leaves its traceback instead
        assert f"wandb stopped ({type(error).__name__}: {error}); metrics.jsonl goes on" in caplog.text


@pytest.mark.usefixtures("logged_out")
def test_a_tracker_that_hangs_does_not_hold_the_run_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    use(monkeypatch, FakeWandb(trouble=released.wait))
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.05)
    try:
        assert report(tmp_path / "run", 1, 2, 3) == [1, 2, 3]
    finally:
        released.set()


def test_what_is_missing_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"train\.trackers=\[wandb\] needs the package wandb.*'.\[train\]'"):
        Tracker(tmp_path, ["wandb"], {})
    assert not list(tmp_path.iterdir())


def test_a_missing_tracker_leaves_no_run_behind(
    plan: Callable[..., TrainPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match="wandb, which is not installed"):
        train(plan(trackers=("wandb",)))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_while_reporting(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, [], {})
    tracker.file = open("/dev/full", "w")  # noqa: SIM115  # the tracker's to close
    with pytest.raises(CheckpointError, match=r"/dev/full: cannot be written .*No space left on device"):
        tracker.log({"step": 1, "loss": 1.0})


@pytest.mark.usefixtures("logged_out")
def test_a_run_that_ends_by_an_error_is_shown_as_failed(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(monkeypatch, FakeWandb())
    with dying_at(5):
        train(plan(trackers=("wandb",)))
    train(plan(trackers=("wandb",)))
    assert fake.ended == [1, 0] and len({run["id"] for run in fake.runs}) == 1
    assert [step for step, _ in fake.logged] == [1, 2, 3, 4, 5, 5, 6]
    assert fake.logged[-1][1].keys() == metrics(plan().run_dir)[-1].keys() - {"step"}
    assert fake.runs[0]["config"]["train"]["samples_per_step"] == 8 and fake.runs[0]["config"]["launcher"]
    train(plan(trackers=("wandb",), overwrite=True))
    assert len({run["id"] for run in fake.runs}) == 2, "begun anew it is another run"


@pytest.mark.slow
@pytest.mark.usefixtures("logged_out")
def test_real_trackers_through_a_kill(plan: Any) -> None:
    pytest.importorskip("wandb")
    run_dir = plan().run_dir
    changes = {"trackers": ("wandb", "tensorboard"), "num_epochs": 30, "save_every": 30}
    kill_after(run_dir, 1, "step-00000030", **changes)
    finish(run_dir, 1, **changes)
    folders = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, (
        "one run, in two parts"
    )
    # wandb has no public reader of its files; names and JSON stand in them as they are.
    written = b"".join(path.read_bytes() for folder in folders for path in folder.glob("*.wandb"))
    rows = metrics(run_dir)
    for row in (rows[30], rows[-1]):
        for name, value in row.items():
            assert name.encode() in written
            assert name == "step" or json.dumps(value).encode() in written
    assert b'"samples_per_step":8' in written, "the configuration is there"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [row["step"] for row in rows]
