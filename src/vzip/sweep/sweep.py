"""Sweeps (``-m``): what became of each job, wherever it ran, and one summary of them all at the end.

Every job leaves a file in the sweep's folder, so the summary is the same for Hydra's basic launcher, joblib and Slurm,
and one job's failure loses nothing of the others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from vzip.config.build import resolved
from vzip.config.full_budget import full_is_vanilla
from vzip.config.options import config_dir, with_own_folder_of_job
from vzip.config.overrides import MAX_JOBS_CHECKED, is_sweep, jobs_of
from vzip.config.run_directory import run_directory, training_directory
from vzip.errors import ConfigError, ManifestError, VzipError
from vzip.json_files import read_json
from vzip.results.files import write_json
from vzip.results.owner import owning
from vzip.results.record import RECORD_NAME

logger = logging.getLogger(__name__)

_JOBS = "jobs"
_claims: dict[Path, str] = {}  # this process's GPU, by the folder of its sweep


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


@contextlib.contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Waits until no other job is in this run directory: two jobs of a sweep can be the same run, as full ones are."""
    with owning(run_dir, wait=True):
        yield


def place_job() -> None:
    """Gives the job a GPU of its own where jobs of one machine run beside each other; Slurm does so itself.

    Raises:
        ConfigError: as ``pin_gpu``.
    """
    if in_sweep() and "joblib" in str(HydraConfig.get().launcher.get("_target_")):
        pin_gpu(Path(HydraConfig.get().sweep.dir))


def pin_gpu(folder: Path) -> str | None:
    """Gives this process, one of several that a launcher runs on one machine, a GPU that no other one has.

    The GPU stays the process's own for the whole sweep: CUDA keeps to the devices that it saw first. So this must be
    called before CUDA is used, and by every job.

    Args:
        folder: of the sweep.

    Returns:
        the GPU, as in CUDA_VISIBLE_DEVICES; None where there is none.

    Raises:
        ConfigError: more jobs at a time than GPUs.
    """
    import torch

    if folder in _claims:
        return _claims[folder]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(n) for n in range(torch.cuda.device_count())] if listed is None else [g for g in listed.split(",") if g]
    if not gpus or torch.cuda.device_count() == 0:
        return None
    for gpu in gpus:
        with contextlib.suppress(FileExistsError):
            (folder / f".gpu-{gpu}").touch(exist_ok=False)  # atomic: one process makes it
            _claims[folder] = os.environ["CUDA_VISIBLE_DEVICES"] = gpu
            return gpu
    raise ConfigError(
        f"this machine shows {len(gpus)} GPUs ({', '.join(gpus)}) and each has a job of the sweep already: set"
        f" hydra.launcher.n_jobs={len(gpus)}."
    )


class SweepCallback(Callback):
    """Hydra calls it where a sweep starts and, in the process that runs it, where each job starts and ends.

    Attributes:
        folder: of the sweep that this process started, or None.
        is_dry: whether its jobs are only checked, so that there is nothing to summarise but failures.
    """

    folder: ClassVar[Path | None] = None
    is_dry: ClassVar[bool] = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepCallback.folder = Path(config.hydra.sweep.dir)
        if not SweepCallback.is_dry and not config.overwrite:
            _tell_kept(config)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Stays where the job's process is killed, which then cannot say so.
        _write_entry(config, "it did not end: interrupted, or its process was killed")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if job_return.status is JobStatus.COMPLETED:
            return _write_entry(config)
        error = job_return._return_value
        # What the user caused is told by its message; a bug of ours needs its place.
        place = None if isinstance(error, VzipError) else "".join(traceback.format_exception(error))
        _write_entry(config, f"{type(error).__name__}: {error}", place)


@contextlib.contextmanager
def leaving_nothing_if_dry(argv: list[str]) -> Iterator[None]:
    """Keeps what Hydra and the jobs write of a sweep with ``dry_run=true`` in a folder that goes when it ends.

    Args:
        argv: the command line, which gets a word for that.
    """
    if not is_sweep(argv) or not any(word.lower() == "dry_run=true" for word in argv):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vzip-dry-run-") as folder:
        argv.append(f"hydra.sweep.dir={folder}")
        SweepCallback.is_dry = True
        try:
            yield
        finally:
            SweepCallback.is_dry = False


def _write_entry(config: DictConfig, error: str | None = None, place: str | None = None) -> None:
    if config.hydra.mode is not RunMode.MULTIRUN:
        return
    number = int(config.hydra.job.num)
    entry = {
        "number": number,
        "words": [str(word) for word in config.hydra.overrides.task],
        "run_dir": str(_directory(config)),
        "error": error,
        "traceback": place,
    }
    folder = Path(config.hydra.sweep.dir) / _JOBS
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{number:04d}.json", entry)


def _tell_kept(config: DictConfig) -> None:
    """Says what an earlier beginning of a sweep has left; one that searches chooses its runs later."""
    if "BasicSweeper" not in str(config.hydra.sweeper.get("_target_")) or not Path(config.paths.runs_dir).is_dir():
        return
    from vzip.evaluation.answering.resume import num_kept_answers

    program = config.hydra.job.config_name
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    places = {
        _place(resolved(compose(program, words)), program) for words in islice(jobs_of(overrides), MAX_JOBS_CHECKED)
    }
    finished = {place for place in places if (place / ("final" if program == "train" else RECORD_NAME)).exists()}
    answers = [num for place in places - finished if (num := num_kept_answers(place))]
    if finished or answers:
        more = f"; {sum(answers):,} answers of {len(answers)} more are there" if answers else ""
        logger.info("begun before: %d of %d runs are finished and kept%s", len(finished), len(places), more)


def _directory(config: DictConfig) -> Path:
    """The job's run directory."""
    own = resolved(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    with with_own_folder_of_job(config.hydra):
        return _place(own, config.hydra.job.config_name)


def _place(config: dict[str, Any], program: str) -> Path:
    if program == "train":
        return training_directory(config, config_dir())
    return run_directory(full_is_vanilla(config, config_dir()), config_dir())


def finish(briefly: bool = False) -> int:
    """Prints and writes the summary of the sweep that this process started; does nothing if it started none.

    Args:
        briefly: only write it.

    Returns:
        how many jobs failed.
    """
    folder, SweepCallback.folder = SweepCallback.folder, None
    entries = [] if folder is None else one_a_run(read_entries(folder))
    if folder is None or not entries:
        return 0
    from vzip.results.layout import print_layout
    from vzip.results.sweep_summary import Job, lay_out_sweep, summarise, write_summary

    words = distinct_words([entry["words"] for entry in entries])
    jobs = [
        Job(entry["number"], own, None if entry["error"] else _run(Path(entry["run_dir"])), entry["error"])
        for entry, own in zip(entries, words, strict=True)
    ]
    if not SweepCallback.is_dry:
        lines = summarise(jobs)
        written = write_summary(jobs, lines, folder)
        if not briefly:
            print_layout(lay_out_sweep(jobs, lines), Console())
            print(f"written to {folder}/: {', '.join(written)}")
    failed = [job for job in jobs if job.error is not None]
    if briefly:
        return len(failed)
    if failed:
        print(f"\n{len(failed)} of {len(jobs)} jobs failed:", file=sys.stderr)
    for job in failed:
        print(f"  job {job.number} ({' '.join(job.words)}): {job.error}", file=sys.stderr)
    return len(failed)


def interruption(error: KeyboardInterrupt) -> KeyboardInterrupt:
    """What is kept of the sweep that this process started, whose summary is written; else the error as it is."""
    folder = SweepCallback.folder
    if folder is None:
        return error
    finish(briefly=True)
    num_finished = sum(entry["error"] is None for entry in read_entries(folder))
    last = f"; of the one under way {error.args[0]}" if error.args else ""
    return KeyboardInterrupt(f"{num_finished} jobs of the sweep are finished and kept{last}")


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """What became of each job, in their order."""
    entries = []
    for path in sorted((folder / _JOBS).glob("[0-9]*.json")):
        try:
            entry = read_json(path)
            if not isinstance(entry, dict) or not {"number", "words", "run_dir", "error"} <= entry.keys():
                raise ValueError("lacks fields")
        except ValueError as error:
            raise ManifestError(f"{path}: not the file of a sweep's job ({error}). Remove it.") from error
        entries.append(entry)
    return entries


def one_a_run(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Jobs that are the same run, as the full ones of a grid, as one, with the overrides that they share."""
    first: dict[str, dict[str, Any]] = {}
    for entry in entries:
        same = first.setdefault(entry["run_dir"], dict(entry))
        same["words"] = [word for word in same["words"] if word in entry["words"]]
        same["error"] = same["error"] and entry["error"]  # what failed in one may have come about in the other
    return list(first.values())


def distinct_words(words: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The words of each job that are not given to all; the only job's own words if there is one job."""
    shared = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    return [tuple(word for word in own if word not in shared) for own in words]


def _run(run_dir: Path) -> Any:
    """The record of a finished evaluation; None for a training."""
    from vzip.results.record import Run, read_record

    path = run_dir / RECORD_NAME
    return Run(path, read_record(path)) if path.is_file() else None


def check_objective(tasks: Sequence[str]) -> None:
    """Refuses an optimising sweep whose objective, the average of the primary scores, would mix units.

    Raises:
        ConfigError: scores in points beside shares.
    """
    if not in_sweep() or "optuna" not in str(HydraConfig.get().sweeper.get("_target_")).lower():
        return
    from vzip.evaluation.benchmarks.protocols import protocol_of

    known = [(task, protocol_of(task)) for task in tasks]
    points = [task for task, protocol in known if protocol is not None and protocol.unit == "points"]
    if points and len(points) < len(tasks):
        raise ConfigError(
            f"eval.tasks={','.join(tasks)}: {', '.join(points)} is scored in points, the others are shares, so their"
            " average is no objective. Choose tasks of one unit with eval.tasks=[...]."
        )
