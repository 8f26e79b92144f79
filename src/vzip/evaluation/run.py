"""One evaluation: check, run lmms-eval, write the record."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, MissingPackageError, RunExistsError

from . import provenance
from .generation import check_overrides
from .results import build_record, sample_rows
from .writing import write_json, write_jsonl

if TYPE_CHECKING:
    from vzip.models.compressed_vlm import CompressedVlm

    from .lmms import VzipLmms

RECORD_NAME = "run.json"
SAMPLES_NAME = "samples.jsonl"
PARTIAL_NAME = "answers.partial.jsonl"
LOG_NAME = "lmms_eval.log"


def evaluate(
    vlm: CompressedVlm,
    *,
    tasks: Sequence[str],
    run_dir: str | Path,
    limit: int | None = None,
    batch_size: int = 1,
    include_path: str | Path | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resolved_config: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates ``vlm`` on lmms-eval tasks and writes ``run.json`` and ``samples.jsonl`` to ``run_dir``.

    An interrupted run goes on where it stopped when called again with the same settings. In a multi-process run
    (torchrun) rank 0 writes; the other ranks return an empty dict.

    Args:
        vlm: the wrapper; its compressor decides the budget.
        tasks: lmms-eval task, group or tag names, built in or from ``include_path``.
        run_dir: made if absent; its record is never overwritten unless ``overwrite``.
        limit: questions a task; None for all. A limited run's record is provisional.
        batch_size: questions generated together.
        include_path: a folder of lmms-eval task files of one's own.
        gen_kwargs: generation settings that override the tasks' own; null entries mean "what the task says".
        seed: of Python, NumPy and torch.
        overwrite: replace an existing record.
        resolved_config: the configuration this call comes from, kept in the record.
        system_prompt: text of a system turn before each question; None for none.
        progress: show a progress bar.

    Returns:
        The record, as in ``run.json``.

    Raises:
        ConfigError, RunExistsError, MissingPackageError, UnsupportedModelError: before anything is written.
        TokenCountError: measured visual tokens are not the budget's. No record is written then.
    """
    tasks = _check_arguments(tasks, limit, batch_size, seed)
    overrides = check_overrides(gen_kwargs)
    run_dir = Path(run_dir)
    check_run_dir(run_dir, overwrite=overwrite)
    _prepare_environment()
    try:
        from lmms_eval.evaluator import simple_evaluate
    except ImportError as error:
        from .lmms import INSTALL_HINT  # raises its own MissingPackageError where lmms-eval is absent altogether

        raise MissingPackageError(f"lmms-eval is there but cannot be imported ({error}): {INSTALL_HINT}") from error
    from tenacity import RetryError

    from .catalog import find_tasks
    from .lmms import VzipLmms
    from .resume import AnswerStore, fingerprint

    with _quiet_logger():
        manager = find_tasks(tasks, include_path)
        lm = VzipLmms(vlm, batch_size=batch_size, gen_kwargs=overrides, system_prompt=system_prompt, progress=progress)
        settings = _settings_of(vlm, tasks, limit, overrides, seed, system_prompt, include_path, resolved_config)
        run_dir.mkdir(parents=True, exist_ok=True)
        if overwrite and _rank() == 0:
            for name in (RECORD_NAME, SAMPLES_NAME, PARTIAL_NAME):
                (run_dir / name).unlink(missing_ok=True)
        # Sampled answers depend on what was drawn before them, so only greedy ones may be taken up again.
        if _world_size() == 1 and _all_greedy(overrides):
            lm.store = AnswerStore(run_dir / PARTIAL_NAME, fingerprint(settings))
        _join_processes()
        provenance.reset_peak_memory()
        started = time.perf_counter()
        finished = False
        try:
            log_name = LOG_NAME if _rank() == 0 else f"lmms_eval.rank{_rank()}.log"
            with (run_dir / log_name).open("w") as log, _redirected(log):
                output = simple_evaluate(
                    model=lm,
                    tasks=list(tasks),
                    task_manager=manager,
                    limit=limit,
                    batch_size=batch_size,
                    log_samples=True,
                    bootstrap_iters=1000,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                    verbosity="ERROR",
                    distributed_executor_backend="torchrun" if _world_size() > 1 else "accelerate",
                    # Some tasks write a submission file; without this it would land in the working directory.
                    cli_args=argparse.Namespace(output_path=str(run_dir), process_with_media=False),
                    process_docs_parallel=1,  # several scorers change the question they score
                )
                _gather_logs(lm)
                finished = True
        except RetryError as error:
            # lmms-eval wraps data loading and scoring in retries, which hide what went wrong.
            cause = error.last_attempt.exception()
            raise cause if cause is not None else error from error
        finally:
            if lm.store is not None and not finished:
                lm.store.close(delete=False)
        if output is None:  # not rank 0
            return {}
        wall_time_s = time.perf_counter() - started
        rows = sample_rows(output, lm.samples)
        record = build_record(
            vlm=vlm,
            lm=lm,
            manager=manager,
            output=output,
            rows=rows,
            wall_time_s=wall_time_s,
            run={
                "config": resolved_config,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "requested_tasks": list(tasks),
                "seed": seed,
                "limit": limit,
                "batch_size": batch_size,
                "gen_kwargs": overrides,
                "include_path": None if include_path is None else str(include_path),
                "system_prompt": system_prompt,
            },
        )
    write_jsonl(run_dir / SAMPLES_NAME, rows)
    write_json(run_dir / RECORD_NAME, record)  # last: a record says that all of the run is there
    if lm.store is not None:
        lm.store.close(delete=True)
    return record


def check_run_dir(run_dir: str | Path, *, overwrite: bool) -> None:
    """Refuses a directory that already holds a record, so that entry points can ask before loading a model.

    Raises:
        RunExistsError: it holds ``run.json`` and ``overwrite`` is False.
        ConfigError: it is a file.
    """
    run_dir = Path(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={str(run_dir)!r}: is a file. Name a directory.")
    if (run_dir / RECORD_NAME).exists() and not overwrite:
        raise RunExistsError(
            f"{run_dir / RECORD_NAME} exists: this run was already evaluated. Nothing was changed. To replace it set"
            " overwrite=true; to keep both, change the seed or the run directory."
        )


def _check_arguments(tasks: Sequence[str], limit: int | None, batch_size: int, seed: int) -> list[str]:
    if isinstance(tasks, str) or not tasks or not all(isinstance(name, str) and name for name in tasks):
        raise ConfigError(f"tasks={tasks!r}: must be a list of at least one task name. Change eval.tasks.")
    repeated = sorted({name for name in tasks if list(tasks).count(name) > 1})
    if repeated:
        raise ConfigError(f"tasks: {', '.join(repeated)} named more than once. Change eval.tasks.")
    for key, value, least in (("limit", limit, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if key == "limit" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}={value!r}: must be a whole number, {least} or more.")
    return list(tasks)


def _prepare_environment() -> None:
    # Several of lmms-eval's task modules read HF_HOME when they are loaded and fail without it.
    os.environ.setdefault("HF_HOME", str(Path.home() / ".cache" / "huggingface"))


def _settings_of(
    vlm: CompressedVlm,
    tasks: list[str],
    limit: int | None,
    overrides: dict[str, Any],
    seed: int,
    system_prompt: str | None,
    include_path: str | Path | None,
    resolved_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What decides the answers, beside the questions themselves; the key under which they may be taken up again."""
    model = vlm.model
    return {
        "model": [model.name_or_path, type(model).__name__, str(model.dtype), model.num_parameters()],
        "weights": provenance.weights_sha256(model.name_or_path),
        "config": resolved_config,
        "compressor": repr(vlm.compressor),
        "preprocess": vlm.preprocess,
        "tasks": tasks,
        "limit": limit,
        "gen_kwargs": overrides,
        "seed": seed,
        "system_prompt": system_prompt,
        "include_path": str(include_path),
        "code": provenance.code_state(),
        "versions": provenance.versions(),
    }


def _all_greedy(overrides: Mapping[str, Any]) -> bool:
    return not overrides.get("do_sample") and not overrides.get("temperature")


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _join_processes() -> None:
    """Under torchrun, lets the ranks find each other; accelerate would not do it on machines without a GPU."""
    import torch
    import torch.distributed as dist

    if _world_size() > 1 and not dist.is_initialized():
        dist.init_process_group(backend="cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def _gather_logs(lm: VzipLmms) -> None:
    """In a multi-process run every rank answered its share: brings the logs together."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, lm.samples)
    for part in parts:
        lm.samples.update(part)


@contextlib.contextmanager
def _redirected(log: Any) -> Iterator[None]:
    """lmms-eval's bars and prints go to a file beside the record; the terminal shows our own bar."""
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


@contextlib.contextmanager
def _quiet_logger() -> Iterator[None]:
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        yield
    finally:
        logger.enable("lmms_eval")
