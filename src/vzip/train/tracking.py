"""What a run reports: a line of JSON a step always, weights-and-biases or TensorBoard if asked for."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vzip.errors import MissingPackageError

logger = logging.getLogger(__name__)


class Tracker:
    """Writes metrics of the main process; a tracker that fails is dropped with a warning, the run goes on.

    Args:
        run_dir: ``metrics.jsonl`` goes here, the trackers' files below it.
        names: any of ``wandb`` and ``tensorboard``.
        config: shown beside the run.
        run_id: under which an interrupted run goes on in the tracker.

    Raises:
        MissingPackageError: a tracker is not installed.
    """

    def __init__(self, run_dir: Path, names: Sequence[str], config: Mapping[str, Any], run_id: str) -> None:
        self.file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")
        self._wandb: Any = None
        self._tensorboard: Any = None
        if "wandb" in names:
            self._wandb = _start_wandb(run_dir, config, run_id)
        if "tensorboard" in names:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    f"train.trackers=[tensorboard] needs tensorboard ({error}): pip install 'vzip[train]'."
                ) from error
            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Reports one step; ``metrics`` holds ``step`` and numbers."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        step, numbers = metrics["step"], {k: v for k, v in metrics.items() if k != "step" and v is not None}
        try:
            if self._wandb is not None:
                self._wandb.log(numbers, step=step)
            if self._tensorboard is not None:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("tracking stopped at step %d (%s); metrics.jsonl goes on", step, error)
            self._wandb = self._tensorboard = None

    def close(self) -> None:
        """Finishes the files."""
        self.file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish(quiet=True)


def _start_wandb(run_dir: Path, config: Mapping[str, Any], run_id: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise MissingPackageError(
            f"train.trackers=[wandb] needs wandb ({error}): pip install 'vzip[train]'."
        ) from error
    # Never asks for a login: without a key the run is written to disk, and `wandb sync` sends it later.
    logged_in = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE") != "offline"
    try:
        return wandb.init(
            project="vzip",
            dir=str(run_dir),
            config=dict(config),
            id=run_id,
            resume="allow" if logged_in else None,
            mode="online" if logged_in else "offline",
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
    except (wandb.Error, OSError) as error:
        logger.warning("wandb could not be started (%s); metrics.jsonl goes on", error)
        return None
