"""The training loop, as named acts: configure, data, load, freeze and report, step, log, save.

Every step's samples follow from the seed and the step's number, and the loss of a step is a mean over its target tokens
(or its samples: ``train.loss_norm``) of all processes and accumulated batches together. So a run may be split in any
way, and killed at any time, and remains the same run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from vzip.data.collate import Collator, TrainingSet
from vzip.data.conversations import find_template
from vzip.errors import ConfigError
from vzip.log import keeping
from vzip.models.generation import max_positions
from vzip.models.vlm import CompressedVlm
from vzip.models.weights.tuned import describe, save_tuned
from vzip.progress import Progress
from vzip.results.files import check_writable
from vzip.results.owner import check_free, owning
from vzip.results.provenance import code_state, hardware, versions

from .checkpoint import CheckpointStore, trained_tensors, trim_metrics
from .distributed import build_accelerator, check_devices
from .features import check_room, open_caches
from .launch import num_processes_in_all
from .objective import ModelView
from .settings import LaunchSettings, TrainSettings
from .stepping import Stepper, StepSchedule, load_batches
from .tracking import Tracker, check_tracker
from .trainable import lora_arguments, prepare_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPlan:
    """Everything a run needs, with nothing loaded.

    Attributes:
        load_data: opens the training data.
        load_model: loads the wrapped model in ``float32`` or ``bfloat16``.
        train, launch: the settings.
        run_dir: where metrics and checkpoints go.
        seed: of the order of samples and of everything random.
        overwrite: begin anew where the directory holds a run.
        system_prompt: text before each conversation, or None.
        name_or_path: the base model's, for the header.
        skip_unreadable: leave samples with an unreadable image out.
        identity: further settings that make it this run (model, data, compressor), as plain containers.
        compressors: of ``train.budgets``, by which steps are drawn; empty: the model's own in each step.
        features_dir: where what the frozen tower makes of images is kept (``data.cache_features``); None: nowhere.
    """

    load_data: Callable[[], TrainingSet]
    load_model: Callable[[str], CompressedVlm]
    train: TrainSettings
    launch: LaunchSettings
    run_dir: Path
    seed: int
    overwrite: bool
    system_prompt: str | None
    name_or_path: str
    skip_unreadable: bool
    identity: Mapping[str, Any]
    compressors: Sequence[Any] = ()
    features_dir: Path | None = None


@dataclass(frozen=True)
class PreparedTraining:
    """A run's data, opened, in the order in which it will be seen; nothing of the model.

    Attributes:
        data: all samples.
        validation: numbers of those held out.
        schedule: which of the others each step has.
        store: where the run's checkpoints are.
    """

    data: TrainingSet
    validation: np.ndarray
    schedule: StepSchedule
    store: CheckpointStore


def prepare(plan: TrainPlan) -> PreparedTraining:
    """Opens the data and looks at the run's directory: what can be wrong with them is said before processes start.

    Raises:
        ManifestError, ConfigError: data that is missing or broken, or too little of it.
        RunExistsError: the run is finished, its directory another run's or in use, or its checkpoint one of another
            launcher.
        CheckpointError: a file of the newest checkpoint is damaged.
        MissingPackageError: a tracker is not installed.
        RunWriteError: the run's directory cannot be written.
    """
    for name in plan.train.trackers:
        check_tracker(name)
    check_writable(plan.run_dir)
    if plan.features_dir is not None:
        check_writable(plan.features_dir)
    check_free(plan.run_dir)
    data = plan.load_data()
    training, validation = hold_out(len(data), plan.train.num_validation_samples, plan.seed)
    schedule = StepSchedule(data, training, plan.train, plan.seed)
    identity = {**plan.identity, "train": asdict(plan.train), "seed": plan.seed, "num_samples": len(data)}
    store = CheckpointStore(plan.run_dir, plan.train.keep_last, identity)
    if not plan.overwrite:
        store.check()
        if (begun := store.begun()) is not None:
            begun.check(plan.launch, num_processes_in_all(plan.launch))
        if (found := store.latest()) is not None and os.environ.get("RANK", "0") == "0":
            store.verify(found[0])
    return PreparedTraining(data, validation, schedule, store)


def train(plan: TrainPlan) -> Path:
    """Runs a training, or resumes it; returns the directory of the tuned weights.

    An interruption says which checkpoint is kept.

    Raises:
        ConfigError, ManifestError, RunExistsError, MissingPackageError: before the model is loaded.
        ConfigError: conversations may be longer than the model reads; nothing is left to learn.
        CheckpointError: a checkpoint cannot be written or read.
        DivergedError: the loss or the gradient is no finite number; names the samples.
    """
    check_devices(plan.launch)
    with owning(plan.run_dir):
        prepared = prepare(plan)
        with keeping(lambda: _kept(prepared)):
            return _train(plan, prepared)


def _kept(prepared: PreparedTraining) -> str:
    found = prepared.store.latest()
    if found is None:
        return f"{prepared.store.run_dir} has no checkpoint yet (train.save_every says how often there is one)"
    return f"step {found[1]:,} of {prepared.schedule.num_steps:,} is kept in {found[0]}"


def _train(plan: TrainPlan, prepared: PreparedTraining) -> Path:
    # Data.
    settings, launch = plan.train, plan.launch
    data, validation, schedule, store = prepared.data, prepared.validation, prepared.schedule, prepared.store

    # Join the other processes.
    accelerator = build_accelerator(settings, launch, int(os.environ.get("WORLD_SIZE", "1")))
    if launch.num_threads is not None:
        torch.set_num_threads(launch.num_threads)
    # Said outright, since torch's own default is on for convolutions and off for matrices.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32
    if accelerator.is_main_process:
        store.begin(plan.overwrite)
    accelerator.wait_for_everyone()
    _say(accelerator, data.describe())
    _say(accelerator, f"{schedule.num_steps:,} steps of {settings.samples_per_step} samples")

    # Load; freeze and report.
    torch.manual_seed(plan.seed)  # for a projector that is initialised anew
    vlm = plan.load_model(settings.precision)
    check_max_length(settings.max_length, vlm.model.config)
    header = {
        **describe(vlm.adapter, vlm.compressor, plan.name_or_path, vlm.revision, list(settings.parts), vlm.lora),
        **({"compressors": [repr(each) for each in plan.compressors]} if plan.compressors else {}),
        "lora": lora_arguments(vlm, settings),
        "commit": code_state()["commit"],
        "versions": versions(),
        "hardware": hardware(),
        "num_processes": accelerator.num_processes,
        "launcher": asdict(launch),
    }
    _say(accelerator, prepare_training(vlm, settings, launch))

    # What steps.
    collator = Collator(
        vlm.processor,
        ModelView(vlm),
        find_template(vlm.adapter.check_template(settings.template)),
        plan.system_prompt,
        vlm.adapter.image_token_id,
        settings.max_length,
        plan.skip_unreadable,
        vlm.adapter.video_token_id if vlm.adapter.learns_videos else None,
        share_images=settings.share_images,
    )
    collators = [replace(collator, encoder=ModelView(vlm, each), compressor=each) for each in plan.compressors]
    collators = collators or [collator]
    if plan.features_dir is not None:
        caches = open_caches(plan.features_dir, vlm, [each.compressor for each in collators], settings, accelerator)
        collators = [replace(each, features=cache) for each, cache in zip(collators, caches, strict=True)]
    stepper = Stepper.of(accelerator, vlm, settings, launch, plan.seed)
    model, optimizer = stepper.model, stepper.optimizer
    if plan.features_dir is not None:
        with accelerator.autocast():  # as the steps run
            needed = [cache.measure(data, accelerator.device) for cache in caches]
        _say(accelerator, check_room(plan.features_dir, sum(n for n, _ in needed), sum(n for _, n in needed)))

    # Where an earlier run stopped.
    step, best = 0, math.inf
    if (found := store.latest()) is not None:
        step, best = found[1], store.load(found[0], accelerator, model, optimizer)["best"]
        begun = store.begun()
        other = "" if begun is None else begun.differences(launch)
        note = f"; launcher: {other}, which does not change what is learned" if other else ""
        _say(accelerator, f"resuming at step {step}{note}")
    tracker = None
    if accelerator.is_main_process:
        trim_metrics(plan.run_dir / "metrics.jsonl", step)
        tracker = Tracker(plan.run_dir, settings.trackers, {**store.identity, "launcher": asdict(launch)}, step)

    of_steps = [collators[schedule.budget(each)] for each in range(step, schedule.num_steps)]
    of_batches = [each for each in of_steps for _ in range(stepper.accumulation)]
    batches = load_batches(data, of_batches, stepper.lists(schedule, step), launch.num_workers, accelerator.device)
    progress = Progress("training", "steps", schedule.num_steps, done=step, show=accelerator.is_main_process)
    with tracker or contextlib.nullcontext(), progress:
        while step < schedule.num_steps:
            # Step.
            metrics = stepper.step(step, schedule.num_steps, batches)
            if plan.compressors:
                metrics["budget_tokens"] = plan.compressors[schedule.budget(step)].budget.num_tokens
            step += 1
            is_last, is_due = step == schedule.num_steps, step % settings.save_every == 0
            if len(validation) and (is_due or is_last):
                losses = [stepper.validate(data, validation, each) for each in collators]
                metrics["validation_loss"] = sum(losses) / len(losses)
                if settings.budgets:
                    names = [f"validation_loss_{name}" for name in settings.budgets]
                    metrics |= zip(names, losses, strict=True)
            # Log.
            if tracker is not None:
                tracker.log({"step": step, **metrics})
            progress.advance(note=f"loss {metrics['loss']:.3f}")
            # Save.
            if metrics.get("validation_loss", math.inf) < best:
                best = metrics["validation_loss"]
                _save(accelerator, model, store.best, {**header, "step": step, "validation_loss": best})
            if is_due and not is_last:
                store.save(accelerator, model, optimizer, step, {**header, "step": step}, {"best": best})
    _save(accelerator, model, store.final, {**header, "step": step})
    _say(accelerator, f"tuned weights in {store.final}")
    accelerator.end_training()
    return store.final


def check_max_length(max_length: int, config: Any) -> None:
    """Raises ConfigError where conversations may be longer than the language model reads; ``config`` is the model's."""
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise ConfigError(
            f"train.max_length={max_length}: the language model reads {limit} tokens (max_position_embeddings), so"
            f" longer conversations must be cut. Set train.max_length={limit} or less."
        )


def hold_out(num_samples: int, num_validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the samples for training and, drawn at random, for validation; both ascending."""
    drawn = np.random.RandomState([seed, 0x7A11]).permutation(num_samples)
    return np.sort(drawn[num_validation:]), np.sort(drawn[:num_validation])


def _save(accelerator: Accelerator, model: torch.nn.Module, directory: Path, header: Mapping[str, Any]) -> None:
    tensors = trained_tensors(accelerator, model)  # every process takes part
    if accelerator.is_main_process:
        save_tuned(directory, tensors, header)
    accelerator.wait_for_everyone()


def _say(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        logger.info("%s", line)
