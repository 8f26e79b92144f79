"""What a run reports: a line of JSON a step always; Weights & Biases and TensorBoard, if asked for, beside it."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vzip.errors import CheckpointError
from vzip.installed import missing_package
from vzip.results.wandb_runs import CLOSE_SECONDS, check_wandb, start_wandb, trouble

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A tracker that has been started."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """Writes metrics of the main process; a context that closes it at its end, also by an error.

    Args:
        run_dir: ``metrics.jsonl`` goes here, the trackers' files below it.
        names: any of ``wandb`` and ``tensorboard``.
        config: shown beside the run.
        step: the run goes on after this step; 0 for a new one.

    Raises:
        MissingPackageError: a tracker is not installed.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], config: Mapping[str, Any], step: int = 0) -> None:
        starts = {
            "wandb": lambda: _WandbSink(start_wandb(run_dir, config)),
            "tensorboard": lambda: _tensorboard(run_dir, step),
        }
        for name in names:
            check_tracker(name)
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._mirrors = [_Mirror(name, starts[name]) for name in names]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Reports one step; ``metrics`` holds ``step`` and numbers.

        Raises:
            CheckpointError: ``metrics.jsonl`` cannot be written (a full disk).
        """
        try:
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.file.name}: cannot be written ({error}). Make room and run the same command again, which goes"
                " on from the last checkpoint."
            ) from error
        numbers = {key: value for key, value in metrics.items() if key != "step" and value is not None}
        for mirror in self._mirrors:
            mirror.log(metrics["step"], numbers)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close(failed=error is not None)

    def close(self, failed: bool = False) -> None:
        """Finishes the files; waits for each tracker up to ``CLOSE_SECONDS``."""
        self.file.close()
        for mirror in self._mirrors:
            mirror.close(CLOSE_SECONDS, failed)


class _Mirror:
    """Hands metrics to a tracker on a thread of its own: a training neither waits for it nor ends with it."""

    def __init__(self, name: str, start: Callable[[], Sink]) -> None:
        self.name, self._start, self._failed = name, start, False
        self._waiting: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._thread.is_alive():
            self._waiting.put((step, numbers))

    def close(self, seconds: float, failed: bool) -> None:
        self._failed = failed
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            logger.warning(
                "%s did not finish within %g s and is left behind; metrics.jsonl is whole", self.name, seconds
            )

    def _run(self) -> None:
        # What is not named here ends this thread alone, with a traceback.
        try:
            sink = self._start()
            while (reported := self._waiting.get()) is not None:
                sink.log(*reported)
            sink.close(self._failed)
        except trouble() as error:
            logger.warning("%s stopped (%s: %s); metrics.jsonl goes on", self.name, type(error).__name__, error)


class _WandbSink:
    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _TensorBoardSink:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


def _tensorboard(run_dir: Path, step: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    # What a killed run wrote after its last checkpoint is written again: TensorBoard hides the first of the two.
    return _TensorBoardSink(SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1, flush_secs=10))


def check_tracker(name: str) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        MissingPackageError: naming ``train.trackers``.
    """
    if name == "wandb":
        return check_wandb("train.trackers")
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise missing_package(f"train.trackers=[{name}]", name, error, otherwise="leave it out") from error
