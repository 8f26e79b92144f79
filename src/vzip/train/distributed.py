"""One process, several, or several machines: accelerate's object, configured in one place."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers.integrations import unset_hf_deepspeed_config

from vzip.errors import ConfigError
from vzip.installed import missing_package

from .settings import LaunchSettings, TrainSettings

logger = logging.getLogger(__name__)


def uses_cuda(device: str) -> bool:
    """Whether the setting ``launcher.device`` means CUDA on this machine.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if device == "cuda" and not has_cuda():
        raise ConfigError("launcher.device=cuda: this machine has no CUDA device. Set launcher.device=cpu, or auto.")
    return device != "cpu" and has_cuda()


def has_cuda() -> bool:
    """Whether this process sees a GPU."""
    return torch.cuda.is_available()


def check_devices(launch: LaunchSettings) -> None:
    """Refuses more processes than there are devices.

    Raises:
        ConfigError: more GPUs, or more CPU processes than cores, than this machine has.
        MissingPackageError: DeepSpeed, or what it compiles with, is needed and not installed.
    """
    cuda = uses_cuda(launch.device)
    available, what = (torch.cuda.device_count(), "CUDA devices") if cuda else (os.cpu_count() or 1, "CPU cores")
    if launch.num_processes > available:
        raise ConfigError(
            f"launcher.num_processes={launch.num_processes}: this machine has {available} {what}. Set"
            f" launcher.num_processes={available} or choose another launcher."
        )
    if launch.uses_deepspeed:
        if not has_cuda():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would find, and warn that it found nothing else
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            what = f"launcher.strategy={launch.strategy}"
            raise missing_package(what, "deepspeed", error, otherwise="choose launcher.strategy=ddp") from error
        if not cuda:
            _check_compiling(launch.strategy)


def _check_compiling(strategy: str) -> None:
    """On CPUs DeepSpeed compiles what its processes talk through, once for all runs.

    Raises:
        MissingPackageError: it has nothing to compile with.
    """
    find_beside_interpreter()
    if shutil.which("ninja") is None:
        what = f"launcher.strategy={strategy} on CPUs, where DeepSpeed compiles what its processes talk through,"
        raise missing_package(what, "ninja", otherwise="choose launcher.strategy=ddp")
    from torch.utils.cpp_extension import get_default_build_root  # only here: it takes its time

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in folder.glob("**/deepspeed_shm_comm/lock"):
        # torch waits for it without a word, and a compiler that was killed leaves it behind.
        logger.warning("%s: DeepSpeed is being compiled by another run. If there is none, remove this file.", lock)


def find_beside_interpreter() -> None:
    """Puts the interpreter's folder on PATH: the programs of an environment that nobody activated are found there."""
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if folder not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (folder, path)))


def build_accelerator(train: TrainSettings, launch: LaunchSettings, num_processes: int) -> Accelerator:
    """Joins the processes and says how they work together.

    Args:
        train, launch: the run's settings.
        num_processes: over all machines.

    Raises:
        ConfigError: a step's samples do not come out even over processes and batches.
    """
    accumulation = launch.accumulation(train.samples_per_step, num_processes)
    cuda = uses_cuda(launch.device)
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation,
        "mixed_precision": "bf16" if train.precision == "bfloat16" else "no",
    }
    if launch.uses_deepspeed:
        from accelerate import DeepSpeedPlugin

        _stand_alone_rendezvous()
        # DeepSpeed must know before anything else asks accelerate for its state.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        settings["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config(train, launch, accumulation))
        settings["kwargs_handlers"] = [InitProcessGroupKwargs(backend="nccl" if cuda else "gloo")]
        # cpu=True would switch DeepSpeed off without a word; it finds the processor by itself.
    else:
        settings["cpu"] = not cuda
        if not train.only_projector:
            # A tower that trains has layers after the select layer, which never get a gradient.
            settings["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    with contextlib.redirect_stdout(io.StringIO()):  # where DeepSpeed prints that it was built
        accelerator = Accelerator(**settings)
    if launch.uses_deepspeed:
        # Otherwise transformers shares the weights out while it loads them, and the base model could not be checked.
        unset_hf_deepspeed_config()
    return accelerator


def deepspeed_config(train: TrainSettings, launch: LaunchSettings, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own configuration, every value that matters written out (its default clips gradients at 1)."""
    return {
        "train_micro_batch_size_per_gpu": launch.batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.max_grad_norm or 0.0,
        "zero_optimization": {"stage": int(launch.strategy.removeprefix("zero"))},
        "bf16": {"enabled": train.precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, so that all strategies step alike
        "steps_per_print": 10**9,
    }


def _stand_alone_rendezvous() -> None:
    """What torchrun would set, for a single process: without it DeepSpeed looks for MPI."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ.update(alone)
