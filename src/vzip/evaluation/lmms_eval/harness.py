"""lmms-eval's evaluator, called so that it hides nothing and leaves nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.evaluation.answering.processes import as_one_process
from vzip.installed import missing_package

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

    from .model import VzipLmms

_LOG_NAME = "lmms_eval.log"


def check_lmms_eval() -> None:
    """Imports lmms-eval.

    Raises:
        MissingPackageError: it is absent, or something it needs is.
    """
    # Several of its task modules read HF_HOME when they are loaded and fail without it.
    os.environ.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    try:
        import lmms_eval.evaluator  # noqa: F401
    except ImportError as error:
        raise missing_package("Evaluating", "lmms_eval", error) from error


def run_lmms_eval(
    lm: VzipLmms, manager: TaskManager, tasks: Sequence[str], *, run_dir: Path, limit: int | None, seed: int
) -> dict[str, Any] | None:
    """Asks and scores the tasks.

    Args:
        lm: the model's adapter.
        manager: knows the tasks.
        tasks: their names.
        run_dir: takes lmms-eval's own output, as a log.
        limit: questions a task; None for all.
        seed: of Python, NumPy and torch.

    Returns:
        lmms-eval's results, or None in every process but the first.

    Raises:
        what ``lm`` and the tasks' functions raise.
    """
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError
    from tqdm import tqdm

    from .model import ShareAnsweredError

    log_name = _LOG_NAME if lm.processes.is_first else f"lmms_eval.rank{lm.processes.rank}.log"
    try:
        with (
            (run_dir / log_name).open("w", encoding="utf-8", errors="backslashreplace") as log,
            _redirected(log),
            as_one_process(),
        ):
            return simple_evaluate(
                model=lm,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                batch_size=lm.batch_size,
                log_samples=True,
                bootstrap_iters=1000,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                verbosity="ERROR",
                distributed_executor_backend="torchrun",  # the other one, accelerate, would join processes by itself
                # Some tasks write a submission file; without this it would land in the working directory.
                cli_args=argparse.Namespace(output_path=str(run_dir), process_with_media=False),
                process_docs_parallel=1,  # several scorers change the question they score
            )
    except ShareAnsweredError:
        return None
    except OSError:
        # A bar that cannot be drawn, as on a full disk, keeps tqdm's lock: this process's next run would wait for it.
        tqdm.set_lock(threading.RLock())
        raise
    except RetryError as error:
        # lmms-eval wraps data loading and scoring in retries, which hide what went wrong.
        cause = error.last_attempt.exception()
        raise cause if cause is not None else error from error


@contextlib.contextmanager
def _redirected(log: Any) -> Iterator[None]:
    """lmms-eval's bars and prints go to a file beside the record; the terminal shows our own bar."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


@contextlib.contextmanager
def quiet_logger() -> Iterator[None]:
    """Silences lmms-eval's logger."""
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")
