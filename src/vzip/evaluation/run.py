"""One evaluation: check, run lmms-eval, write the record."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.errors import ConfigError, RunExistsError, nearest
from vzip.keys import MAX_SEED
from vzip.log import keeping
from vzip.results import provenance
from vzip.results.files import make_folder, naming_a_full_disk, write_json, write_jsonl
from vzip.results.owner import check_free, owning
from vzip.results.record import RECORD_NAME, SAMPLES_NAME
from vzip.results.wandb_runs import check_wandb

from .answering.batching import VISUAL_CACHE_GIB, BatchSize, check_batch_size
from .answering.generation import check_overrides
from .benchmarks.question_groups import check_limit
from .lmms_eval.harness import check_lmms_eval, quiet_logger, run_lmms_eval
from .results import build_record, sample_rows

if TYPE_CHECKING:
    from vzip.models.vlm import CompressedVlm

    from .lmms_eval.model import OnProblem

_IMAGES_PER_TASK = 2  # shown by a tracker


def evaluate(
    vlm: CompressedVlm,
    *,
    tasks: Sequence[str],
    run_dir: str | Path,
    limit: int | None = None,
    batch_size: BatchSize = 1,
    include_path: str | Path | None = None,
    gen_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    overwrite: bool = False,
    resolved_config: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
    progress: bool = True,
    num_workers: int = 2,
    visual_cache_gib: float = VISUAL_CACHE_GIB,
    on_problem: OnProblem = "refuse",
    trackers: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates ``vlm`` on lmms-eval tasks and writes ``run.json`` and ``samples.jsonl`` to ``run_dir``.

    Questions are answered in batches of like length, the longest first, and those about one image near each other, so
    that it is preprocessed and encoded once, with others in one pass of the vision tower. Which questions share a
    batch, and which images a pass, depends on ``batch_size`` alone: an interrupted run, which goes on where it stopped
    when called again with the same settings, and a run of several processes (torchrun, ``accelerate launch``) generate
    the batches of one process in one go, and so give its answers. Between batch sizes greedy answers can differ where
    two tokens are equally likely but for the rounding of float arithmetic, in float16 and bfloat16 more often;
    ``batch_size=1`` is free of that. Of several processes the first scores and writes; the others return an empty dict.

    Args:
        vlm: the wrapper; its compressor decides the budget.
        tasks: lmms-eval task, group or tag names, built in or from ``include_path``.
        run_dir: made if absent; its record is never overwritten unless ``overwrite``.
        limit: questions a task; None for all. A limited run's record is provisional.
        batch_size: questions generated together; halved, with a warning, when memory does not suffice. ``auto`` begins
            with 64 on a GPU, 8 on a CPU, and so finds what fits; the record's ``batch_sizes`` says what that was.
        include_path: a folder of lmms-eval task files of one's own. The Python code that they name is run.
        gen_kwargs: generation settings that override the tasks' own; null entries mean "what the task says".
        seed: of Python, NumPy, torch and sampled answers.
        overwrite: replace an existing record.
        resolved_config: the configuration this call comes from, kept in the record.
        system_prompt: text of a system turn before each question; None for none.
        progress: show a progress bar.
        num_workers: threads that read images and videos and make the model's inputs ahead; 0: none.
        visual_cache_gib: memory, on the model's device, for the visual tokens of images that further questions show.
            Answers do not depend on it, but for rounding where it is 0 and each batch encodes its own images.
        on_problem: what becomes of questions whose images or videos cannot be read: ``refuse`` ends the run, once
            everything else is answered, and names them; ``skip`` leaves them out of the score, and the record names
            them and is provisional.
        trackers: ``wandb``, or nothing; told of the finished run, see ``tracking``.

    Returns:
        The record, as in ``run.json``.

    Raises:
        ConfigError, RunExistsError, MissingPackageError, UnsupportedModelError: before anything is written.
        ManifestError: data that is neither here nor on a hub within reach; images or videos that cannot be read
            (see ``on_problem``).
        RunInUseError: another process writes ``run_dir``.
        TokenCountError: measured visual tokens are not the budget's.
        DeviceMemoryError: a question that does not fit the memory alone.
        RunWriteError: a full disk. In all these cases no record is written, and answers so far are kept.
    """
    tasks = _check_arguments(tasks, limit, batch_size, seed, num_workers, on_problem)
    check_limit(tasks, limit)
    overrides = check_overrides(gen_kwargs)
    run_dir = Path(run_dir)
    check_run_dir(run_dir, overwrite=overwrite)
    check_free(run_dir)
    check_lmms_eval()
    if trackers:
        check_wandb("eval.trackers")
    from .answering.processes import join_processes
    from .answering.resume import AnswerStore, delete_answers, kept_answers, settings_of
    from .benchmarks.catalog import find_tasks
    from .benchmarks.task_data import check_data, naming_data_errors
    from .lmms_eval.model import VzipLmms

    with quiet_logger(), contextlib.ExitStack() as stack:
        manager = find_tasks(tasks, include_path)
        check_data(manager, tasks)
        lm = VzipLmms(
            vlm,
            batch_size=batch_size,
            gen_kwargs=overrides,
            system_prompt=system_prompt,
            progress=progress,
            num_workers=num_workers,
            visual_cache_gib=visual_cache_gib,
            on_problem=on_problem,
            seed=seed,
            processes=join_processes(),
            num_images=_IMAGES_PER_TASK if trackers else 0,
        )
        if lm.processes.is_first:
            stack.enter_context(owning(run_dir))
            check_run_dir(run_dir, overwrite=overwrite)  # another process may have ended meanwhile
        make_folder(run_dir)
        if overwrite and lm.processes.is_first:
            delete_answers(run_dir)
            for name in (RECORD_NAME, SAMPLES_NAME):
                (run_dir / name).unlink(missing_ok=True)
        asked = {
            "tasks": tasks,
            "limit": limit,
            "gen_kwargs": overrides,
            "include_path": None if include_path is None else str(include_path),
            "seed": seed,
            "system_prompt": system_prompt,
        }
        lm.store = AnswerStore(run_dir, settings_of(vlm, resolved_config, **asked), lm.processes)
        stack.callback(lm.store.close)
        provenance.reset_peak_memory()
        started = time.perf_counter()
        kept = keeping(lambda: kept_answers(run_dir, lm.num_questions))
        with kept, naming_a_full_disk(run_dir), naming_data_errors(tasks):
            output = run_lmms_eval(lm, manager, tasks, run_dir=run_dir, limit=limit, seed=seed)
        if output is None:  # not the first process
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
                "requested_tasks": asked.pop("tasks"),
                "batch_size": batch_size,
                **asked,
            },
        )
        write_jsonl(run_dir / SAMPLES_NAME, rows)
        write_json(run_dir / RECORD_NAME, record)  # last: a record says that all of the run is there
        lm.store.delete()
    if trackers:
        from vzip.evaluation.tracking import report_evaluation

        report_evaluation(vlm, run_dir, record, rows, lm.images)
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


def _check_arguments(
    tasks: Sequence[str], limit: int | None, batch_size: object, seed: int, num_workers: int, on_problem: str
) -> list[str]:
    if isinstance(tasks, str) or not tasks or not all(isinstance(name, str) and name for name in tasks):
        raise ConfigError(f"tasks={tasks!r}: must be a list of at least one task name. Change eval.tasks.")
    repeated = sorted({name for name in tasks if list(tasks).count(name) > 1})
    if repeated:
        raise ConfigError(f"tasks: {', '.join(repeated)} named more than once. Change eval.tasks.")
    check_batch_size(batch_size)
    numbers = (("limit", limit, 1), ("seed", seed, 0), ("num_workers", num_workers, 0))
    for key, value, least in numbers:
        if key == "limit" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{key}={value!r}: must be a whole number, {least} or more.")
    if seed > MAX_SEED:
        raise ConfigError(f"seed={seed}: must be a whole number from 0 to {MAX_SEED}, which NumPy and torch both take.")
    if on_problem not in ("refuse", "skip"):
        raise ConfigError(
            f"on_problem={on_problem!r}: must be refuse or skip{nearest(str(on_problem), ('refuse', 'skip'))}."
        )
    return list(tasks)
