"""On what a training is carried out: the launcher that is named, or what ``launcher=auto`` comes to here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vzip.config.build import launch_of, one_process
from vzip.config.options import config_dir
from vzip.config.run_directory import training_directory
from vzip.config.schema import AUTO
from vzip.config.training import settings_of
from vzip.errors import RunExistsError
from vzip.keys import show

if TYPE_CHECKING:
    from vzip.train.checkpoint import Begun
    from vzip.train.choosing import Choice, Place
    from vzip.train.settings import LaunchSettings

SMALL_BYTES = 2**30  # weights that any machine has room to train


@dataclass(frozen=True)
class Launching:
    """A training's launcher, complete.

    Attributes:
        config: the configuration with it.
        words: overrides that make the processes which this one starts take it too.
        reason: what is taken and why.
        num_bytes: estimated on each device; None: not estimated yet.
        is_told: another process has started this one and has said all this.
        fits: false only in a dry run: the training fits nowhere here, and ``reason`` says how.
    """

    config: dict[str, Any]
    words: list[str]
    reason: str
    num_bytes: int | None
    is_told: bool
    fits: bool = True


def launching(config: Mapping[str, Any]) -> Launching:
    """Decides on what a checked training runs; for ``launcher=auto`` the machine is looked at.

    Raises:
        DoesNotFitError: it fits nowhere here, and this is no dry run.
        RunExistsError: the run was begun with DeepSpeed on other devices than are here.
        ConfigError, CheckpointError, UnsupportedModelError: settings or devices that cannot be.
    """
    from vzip.train.choosing import DoesNotFitError

    launcher = config["launcher"]
    is_process = "RANK" in os.environ
    if launcher["name"] != AUTO or (is_process and _is_complete(launcher)):
        complete = {**config, "launcher": one_process(launcher)}
        launch = launch_of(complete)
        reason = (
            f"{launcher['name']}: {launch.num_processes} processes a machine, {launch.strategy}, batch"
            f" {launch.batch_size} a device, gradient checkpointing {'on' if launch.gradient_checkpointing else 'off'}"
        )
        return Launching(complete, [], reason, None, is_process)
    is_told = os.environ.get("RANK", "0") != "0"
    try:
        choice = _choose(config)
    except DoesNotFitError as error:
        if not config["dry_run"]:
            raise
        return Launching({**config, "launcher": one_process(launcher)}, [], str(error), None, is_told, fits=False)
    chosen = asdict(choice.launch)
    words = [f"launcher.{key}={show(value)}" for key, value in chosen.items()]
    return Launching(
        {**config, "launcher": {"name": AUTO, **chosen}}, words, f"{AUTO}: {choice.reason}", choice.num_bytes, is_told
    )


def _is_complete(launcher: Mapping[str, Any]) -> bool:
    # The other two may be null in any launcher.
    return all(value is not None for key, value in launcher.items() if key not in ("num_threads", "num_machines"))


def _choose(config: Mapping[str, Any]) -> Choice:
    from vzip.config.memory_plan import training_estimate
    from vzip.train.checkpoint import CheckpointStore
    from vzip.train.choosing import Choice, choose_launch, find_place, several_strategies

    launcher, model = config["launcher"], config["model"]
    place = find_place(launcher["device"])
    strategies = several_strategies(model["quantization"] is not None)
    begun = None if config["overwrite"] else CheckpointStore(training_directory(config, config_dir()), 1, {}).begun()
    if begun is not None:
        taken = _as_begun(begun, launcher, place)
        if taken is not None:
            return Choice(
                taken,
                f"{taken.strategy} on {begun.num_processes} processes, batch {taken.batch_size} a"
                f" device, as the run was begun ({begun.checkpoint})",
            )
        if begun.launch.uses_deepspeed:
            raise RunExistsError(
                f"{begun.checkpoint} was written with launcher.strategy={begun.launch.strategy} on"
                f" {begun.num_processes} processes, but here are {len(place.gpus)} GPUs, {place.num_cores} CPU cores,"
                f" {place.num_machines} machines: DeepSpeed's checkpoints keep their strategy and number of processes."
                " Go on where there are as many devices, or set overwrite=true to begin anew."
            )
        strategies = ("ddp",)  # reads what one process or several have written
    estimate = None if not place.gpus and is_small(model) else training_estimate(config)
    return choose_launch(launcher, place, settings_of(config)[0], estimate, strategies)


def _as_begun(begun: Begun, asked: Mapping[str, Any], place: Place) -> LaunchSettings | None:
    """The launcher that a run was begun with, with what is asked for now; None where this place does not have it."""
    given = {key: value for key, value in asked.items() if value is not None and key != "name"}
    if given["device"] == AUTO:
        del given["device"]
    if place.num_started is not None:
        given["num_processes"] = place.num_started
    launch = replace(begun.launch, num_machines=None if place.by_slurm else place.num_machines)
    launch = replace(launch, **given)
    on_gpu = launch.device == "cuda" or (launch.device == AUTO and bool(place.gpus))
    devices = len(place.gpus) if on_gpu else place.num_cores
    same = launch.num_processes * place.num_machines == begun.num_processes
    return launch if same and launch.num_processes <= devices else None


def is_small(model: Mapping[str, Any]) -> bool:
    """Whether the checkpoint lies here and is below ``SMALL_BYTES``: no estimate is needed to train it on a CPU."""
    from vzip.models.load import resolve_checkpoint

    folder = resolve_checkpoint(model["name_or_path"])
    if not isinstance(folder, Path):
        return False
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) < SMALL_BYTES
