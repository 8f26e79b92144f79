"""Checkpoints of a run: tuned weights, optimizer and position, complete or not there at all."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vzip.errors import CheckpointError, RunExistsError
from vzip.json_files import from_json, read_json
from vzip.models.weights.digests import check_digests, write_digests
from vzip.models.weights.tuned import (
    atomic_directory,
    load_tensors,
    read_header,
    read_tensors,
    remove_tree,
    write_tuned,
)
from vzip.results.files import make_folder, replace_file, write_json

from .settings import LaunchSettings, refuse_finished

# What is raised for damaged content, by torch's reader, DeepSpeed and the optimizer.
_UNREADABLE = (
    OSError,
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    UnpicklingError,
)
_MEND = "Remove this directory to go on from the checkpoint before it, or put the files back."
_STEP = re.compile(r"step-(\d+)")
_STATE_NAME, _DEEPSPEED_NAME = "state.pt", "deepspeed"


def trained_tensors(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters in full, float32, under the Hugging Face model's names; every process must call it."""
    prefix = "vlm.model."
    named = accelerator.unwrap_model(model).named_parameters()
    trained = {name.removeprefix(prefix): parameter for name, parameter in named if parameter.requires_grad}
    if _uses_deepspeed(accelerator):
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(parameter) for name, parameter in trained.items()}
    return {name: parameter.detach() for name, parameter in trained.items()}


@dataclass(frozen=True)
class Begun:
    """On what a run was carried out until its newest checkpoint.

    Attributes:
        launch: its settings.
        num_processes: over all machines.
        checkpoint: which.
    """

    launch: LaunchSettings
    num_processes: int
    checkpoint: Path

    def differences(self, launch: LaunchSettings) -> str:
        """What is other now, as ``batch_size=4 (was 2)``; "" where nothing is."""
        now, then = asdict(launch), asdict(self.launch)
        return ", ".join(f"{key}={now[key]} (was {then[key]})" for key in now if now[key] != then[key])

    def check(self, launch: LaunchSettings, num_processes: int) -> None:
        """Refuses a launcher under which the checkpoint cannot be read.

        DeepSpeed's holds the optimizer in as many shares as there were processes; all others hold it whole.

        Args:
            launch, num_processes: now.

        Raises:
            RunExistsError: saying what would go.
        """
        shared = self.launch.uses_deepspeed or launch.uses_deepspeed
        then, now = (self.launch.strategy, self.num_processes), (launch.strategy, num_processes)
        if shared and then != now:
            raise RunExistsError(
                f"{self.checkpoint} was written with launcher.strategy={then[0]} on {then[1]} processes, and cannot be"
                f" read with launcher.strategy={now[0]} on {now[1]}: DeepSpeed's checkpoints keep their strategy and"
                " number of processes. Go on with launcher=auto where there are as many devices, or set overwrite=true"
                " to begin anew."
            )


class CheckpointStore:
    """``run_dir/checkpoints/step-N``: what a killed run goes on from.

    Args:
        run_dir: the run's directory.
        keep_last: checkpoints kept.
        identity: what must be equal for a run to be the same run; held against what the directory was begun with.
    """

    def __init__(self, run_dir: Path, keep_last: int, identity: Mapping[str, Any]) -> None:
        self.run_dir, self.keep_last, self.identity = run_dir, keep_last, dict(identity)
        self.folder = run_dir / "checkpoints"
        self._begun = run_dir / "train.json"
        self._verified: set[Path] = set()

    @property
    def final(self) -> Path:
        """Where the finished run's tuned weights are."""
        return self.run_dir / "final"

    @property
    def best(self) -> Path:
        """Where the tuned weights of lowest validation loss are."""
        return self.run_dir / "best"

    def check(self) -> None:
        """Refuses a directory that this run may not go on in.

        Raises:
            RunExistsError: the run is finished, or the directory belongs to a run with other settings.
        """
        refuse_finished(self.run_dir)
        begun = self._begun_with()
        if begun is None:
            return
        other = [key for key in {**begun, **self.identity} if begun.get(key) != _plain(self.identity).get(key)]
        if other:
            shown = "; ".join(f"{key}: {begun.get(key)} there, {self.identity.get(key)} here" for key in other[:4])
            raise RunExistsError(
                f"{self.run_dir} holds an unfinished run with other settings ({shown}). Take those up again, set"
                " overwrite=true to begin anew, or change paths.run_dir."
            )

    def _begun_with(self) -> dict[str, Any] | None:
        """The settings that the directory was begun with; None: there is no run in it yet.

        Raises:
            RunExistsError: its file is damaged, and there are checkpoints that it should tell of.
        """
        if not self._begun.is_file():
            return None
        try:
            begun = read_json(self._begun)
            if isinstance(begun, dict):
                return begun
            reason = f"holds a {type(begun).__name__}"
        except ValueError as error:
            reason = str(error)
        if self.latest() is None:
            return None  # written by an interrupted version; nothing hangs on it
        raise RunExistsError(
            f"{self._begun}: damaged ({reason}), so it does not say which run the checkpoints beside it are of. Put it"
            " back, set overwrite=true to begin anew, or change paths.run_dir."
        )

    def begin(self, overwrite: bool) -> None:
        """Claims the directory for this run, unless it is this run's already; ``check`` comes first.

        Args:
            overwrite: throw away what the directory holds of a run.
        """
        if overwrite:
            for name in ("final", "best", "checkpoints", "wandb", "tensorboard"):
                remove_tree(self.run_dir / name)
            for path in (self._begun, self.run_dir / "metrics.jsonl"):
                path.unlink(missing_ok=True)
        if self._begun_with() is None:
            make_folder(self.run_dir)
            write_json(self._begun, _plain(self.identity))

    def latest(self) -> tuple[Path, int] | None:
        """The newest complete checkpoint and its step."""
        found = [(int(match.group(1)), path) for path in self._all() if (match := _STEP.fullmatch(path.name))]
        return (max(found)[1], max(found)[0]) if found else None

    def begun(self) -> Begun | None:
        """On what the run was carried out so far; None: it has no checkpoint yet, or one that does not say."""
        found = self.latest()
        if found is None:
            return None
        try:
            header = read_header(found[0])[1]
        except CheckpointError:
            return None  # load says what is wrong with it
        try:
            return Begun(LaunchSettings(**header["launcher"]), int(header["num_processes"]), found[0])
        except (KeyError, TypeError, ValueError):
            return None

    def save(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        step: int,
        header: Mapping[str, Any],
        extra: Mapping[str, Any],
    ) -> None:
        """Writes a checkpoint; every process must call it.

        Raises:
            CheckpointError: it cannot be written; the earlier ones are untouched.
        """
        tensors = trained_tensors(accelerator, model)
        target = self.folder / f"step-{step:08d}"
        if _uses_deepspeed(accelerator):
            shared = self.folder / ".deepspeed.writing"
            if accelerator.is_main_process:
                remove_tree(shared)
                self.folder.mkdir(parents=True, exist_ok=True)
            accelerator.wait_for_everyone()
            _save_shares(model, shared)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with atomic_directory(target) as work:
                write_tuned(work, tensors, header)
                state: dict[str, Any] = {"step": step, "extra": dict(extra)}
                if _uses_deepspeed(accelerator):
                    (self.folder / ".deepspeed.writing").rename(work / _DEEPSPEED_NAME)
                else:
                    state["optimizer"] = optimizer.state_dict()
                save_state(state, work / _STATE_NAME)
                write_digests(work)
            for old in sorted(self._all())[: -self.keep_last]:
                remove_tree(old)
        accelerator.wait_for_everyone()

    def load(self, directory: Path, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any]:
        """Puts weights and optimizer back; returns ``extra`` as it was saved.

        Raises:
            CheckpointError: the checkpoint is damaged.
            RunExistsError: it was written with DeepSpeed and is read without, or the other way round.
        """
        shared = (directory / _DEEPSPEED_NAME).is_dir()
        if shared != _uses_deepspeed(accelerator):
            raise RunExistsError(
                f"{directory} was written {'with' if shared else 'without'} DeepSpeed and cannot be read"
                f" {'without' if shared else 'with'} it: go on with the launcher it was begun with"
                f" (launcher.strategy={'zero2 or zero3' if shared else 'single or ddp'}), or set overwrite=true to"
                " begin anew."
            )
        if accelerator.is_main_process:
            self.verify(directory)
        try:
            state = torch.load(directory / _STATE_NAME, weights_only=True)
            extra = state["extra"]
            if _uses_deepspeed(accelerator):
                engine: Any = model
                engine.load_checkpoint(str(directory / _DEEPSPEED_NAME), tag="state", load_module_strict=False)
            else:
                tensors = read_tensors(directory)
                if absent := sorted(set(trained_tensors(accelerator, model)) - set(tensors)):
                    raise KeyError(f"no tensor {absent[0]}, {len(absent)} in all")
                load_tensors(accelerator.unwrap_model(model).vlm.model, tensors, directory)
                optimizer.load_state_dict(state["optimizer"])
        except CheckpointError:
            raise
        except _UNREADABLE as error:
            raise CheckpointError(f"{directory}: cannot be read ({type(error).__name__}: {error}). {_MEND}") from error
        return extra

    def verify(self, directory: Path) -> None:
        """Holds a checkpoint's files against their digests, once.

        Raises:
            CheckpointError: naming the files that are missing or damaged.
        """
        if directory not in self._verified:
            check_digests(directory, _MEND)
            self._verified.add(directory)

    def _all(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if path.is_dir()]


def trim_metrics(path: Path, step: int) -> None:
    """Drops the lines after ``step``, which a resumed run writes again, and a last line cut off by a crash."""
    kept = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if from_json(line)["step"] <= step:
                    kept.append(line)
    replace_file(path, b"".join(line + b"\n" for line in kept))


def save_state(state: Mapping[str, Any], path: Path) -> None:
    """``torch.save``, whose writer tells of a full disk by a RuntimeError."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from error


def _save_shares(engine: Any, directory: Path) -> None:
    """DeepSpeed's own files: each process writes its share of the optimizer.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        engine.save_checkpoint(str(directory), tag="state", exclude_frozen_parameters=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory}: DeepSpeed cannot write its checkpoint ({error}). Earlier ones are untouched; make room and"
            " run the same command again, which goes on from the last."
        ) from error


def _uses_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.state.deepspeed_plugin is not None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(values))
