"""``launcher=auto``: on what a training is carried out, chosen from the devices there are and the memory it needs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vzip.errors import ConfigError

from .settings import LaunchSettings, Strategy, TrainSettings

GIB = 2**30
# Left free of each device: the estimate was up to 15 % off where it was held against a measurement (8-bit weights on
# the CPU; else 7 %), and CUDA's own context takes half a GiB that no estimate counts.
MARGIN, CONTEXT_BYTES = 0.15, GIB // 2
MOST_AT_ONCE, MOST_AT_ONCE_CPU = 16, 4  # samples: what LLaVA's scripts give an 80 GB GPU; what launcher=inline says
NUM_WORKERS = 4

# Bytes at the peak on each device, of so many processes over all machines.
Estimate = Callable[[LaunchSettings, int], int]


class DoesNotFitError(ConfigError):
    """No choice of batch size, strategy and checkpointing makes the training fit the devices."""


@dataclass(frozen=True)
class Device:
    """A GPU that this process may use: its name and its memory."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Place:
    """What there is to train on.

    Attributes:
        gpus: of this machine that are visible; none: the CPU trains.
        cpu: the machine itself, with the memory that this process may have.
        num_cores: of the machine.
        num_machines: that take part; all are taken to be alike.
        by_slurm: whether SLURM started this on each of them.
        num_started: processes that torchrun has started on this machine; None: none yet.
        remark: what the user should know of it, or "".
    """

    gpus: tuple[Device, ...]
    cpu: Device
    num_cores: int
    num_machines: int = 1
    by_slurm: bool = False
    num_started: int | None = None
    remark: str = ""


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        launch: the settings, complete.
        reason: what was taken and why, in a line or two.
        num_bytes: estimated on each device; None: was not estimated.
    """

    launch: LaunchSettings
    reason: str
    num_bytes: int | None = None


def choose_launch(
    asked: Mapping[str, Any],
    place: Place,
    train: TrainSettings,
    estimate: Estimate | None,
    shared: Sequence[Strategy] | None = None,
) -> Choice:
    """Fills in what the ``launcher`` group leaves open.

    As many processes as there are GPUs and as divide a step evenly. Of the strategies the first one that fits at all;
    with it the largest batch that fits, and without gradient checkpointing if that batch fits so.

    Args:
        asked: the group; null is left open.
        place: what there is.
        train: what is learned.
        estimate: None: take the largest batch without looking whether it fits.
        shared: strategies for several processes, in the order in which they are tried; None: on GPUs ``zero2``, then
            ``zero3``, on the CPU ``ddp``.

    Raises:
        DoesNotFitError: nothing fits.
        ConfigError: processes that were started, or settings given, do not divide a step evenly.
    """
    if asked["num_machines"] is not None:
        place = replace(place, num_machines=asked["num_machines"], by_slurm=False)
    count = _num_processes(asked, place, train)
    in_all = count * place.num_machines
    on_gpu = bool(place.gpus)
    usual: Sequence[Strategy] = ("zero2", "zero3") if on_gpu else ("ddp",)
    strategies: Sequence[Strategy] = ("single",) if in_all == 1 else shared or usual
    if asked["strategy"] is not None:
        strategies = (asked["strategy"],)
    settings: dict[str, Any] = {
        "num_threads": asked["num_threads"],
        "device": "cuda" if on_gpu else "cpu",
        "num_processes": count,
        "num_machines": None if place.by_slurm else place.num_machines,
        "num_workers": (min(NUM_WORKERS, place.num_cores // count) if on_gpu else 0),
    }
    if asked["num_workers"] is not None:
        settings["num_workers"] = asked["num_workers"]
    sizes = _batch_sizes(asked["batch_size"], train.samples_per_step, in_all, on_gpu)
    options = [False, True] if asked["gradient_checkpointing"] is None else [asked["gradient_checkpointing"]]

    def launch(strategy: Strategy, size: int, checkpoints: bool) -> LaunchSettings:
        return LaunchSettings(**settings, strategy=strategy, batch_size=size, gradient_checkpointing=checkpoints)

    if estimate is None:
        return _choice(launch(strategies[0], sizes[0], options[0]), None, place, train)
    room = min(device.num_bytes for device in place.gpus[:count]) if on_gpu else place.cpu.num_bytes // count
    limit = int(room * (1 - MARGIN)) - CONTEXT_BYTES
    least: list[tuple[int, LaunchSettings]] = []
    for strategy in strategies:
        found = _largest([launch(strategy, size, options[-1]) for size in sizes], in_all, estimate, limit)
        if isinstance(found, int):
            least.append((found, launch(strategy, sizes[-1], options[-1])))
            continue
        chosen, num_bytes = found
        if len(options) == 2:
            plain = replace(chosen, gradient_checkpointing=False)
            if (without := estimate(plain, in_all)) <= limit:
                chosen, num_bytes = plain, without
        return _choice(chosen, num_bytes, place, train)
    raise _fits_nowhere(*min(least, key=lambda pair: pair[0]), room, limit, place, train)


def _num_processes(asked: Mapping[str, Any], place: Place, train: TrainSettings) -> int:
    """On each machine."""
    given = asked["num_processes"] if place.num_started is None else place.num_started
    most = given or max(1, len(place.gpus))
    at_once = place.num_machines * (asked["batch_size"] or 1)
    fitting = [count for count in range(most, 0, -1) if train.samples_per_step % (count * at_once) == 0]
    if not fitting or (given is not None and fitting[0] != given):
        raise ConfigError(
            f"train.samples_per_step={train.samples_per_step} is not a multiple of"
            f" launcher.batch_size={asked['batch_size'] or 1} x {most * place.num_machines} processes: change any of"
            " them, so that every process does the same work."
        )
    return fitting[0]


def _batch_sizes(given: int | None, samples_per_step: int, in_all: int, on_gpu: bool) -> list[int]:
    """To try, from large to small."""
    if given is not None:
        return [given]
    share, most = samples_per_step // in_all, MOST_AT_ONCE if on_gpu else MOST_AT_ONCE_CPU
    return [size for size in range(most, 0, -1) if share % size == 0]


def _largest(
    launches: Sequence[LaunchSettings], in_all: int, estimate: Estimate, limit: int
) -> tuple[LaunchSettings, int] | int:
    """The first that fits, from large batches to small, and what it needs; where none does, what the last needs.

    An estimate takes seconds, so two are made; between them memory grows with the batch by the same for each sample.
    """
    most = estimate(launches[0], in_all)
    if most <= limit:
        return launches[0], most
    least = estimate(launches[-1], in_all) if len(launches) > 1 else most
    if least > limit:
        return least
    each = (most - least) / (launches[0].batch_size - launches[-1].batch_size)
    needs = {launch: math.ceil(least + each * (launch.batch_size - launches[-1].batch_size)) for launch in launches}
    return next((launch, num_bytes) for launch, num_bytes in needs.items() if num_bytes <= limit)


def _choice(launch: LaunchSettings, num_bytes: int | None, place: Place, train: TrainSettings) -> Choice:
    parts = [_devices(launch, place), launch.strategy, f"batch {launch.batch_size} a device"]
    parts.append("gradient checkpointing" if launch.gradient_checkpointing else "no gradient checkpointing")
    reason = ", ".join(parts)
    if num_bytes is not None:
        device = place.gpus[0] if place.gpus else place.cpu
        reason += f": estimated {num_bytes / GIB:.1f} of {device.num_bytes / GIB:.1f} GiB"
    if len(place.gpus) > launch.num_processes and place.num_started is None:
        reason += f" ({len(place.gpus)} GPUs are visible; {launch.num_processes} share"
        reason += f" {train.samples_per_step} samples a step evenly)"
    return Choice(launch, reason + (f"; {place.remark}" if place.remark else ""), num_bytes)


def _devices(launch: LaunchSettings, place: Place) -> str:
    names = [gpu.name for gpu in place.gpus[: launch.num_processes]] or [place.cpu.name]
    shown = f"{launch.num_processes} x {' and '.join(dict.fromkeys(names))}"
    return shown if place.num_machines == 1 else f"{place.num_machines} machines of {shown}"


def _fits_nowhere(
    num_bytes: int, launch: LaunchSettings, room: int, limit: int, place: Place, train: TrainSettings
) -> DoesNotFitError:
    several = len(place.gpus) > 1 or place.num_machines > 1
    ways = ["model.quantization=4bit" if "language_model" not in train.parts else "train fewer parts (train.parts)"]
    ways.append(f"train.max_length below {train.max_length}")
    ways.append("more or larger GPUs" if place.gpus else "a machine with a GPU")
    return DoesNotFitError(
        f"this training fits nowhere here: a device needs an estimated {num_bytes / GIB:.1f} GiB with batch"
        f" {launch.batch_size}, {launch.strategy}{', the least of all strategies' if several else ''}, gradient"
        f" checkpointing {'on' if launch.gradient_checkpointing else 'off'}; {_devices(launch, place)} with"
        f" {room / GIB:.1f} GiB each may be planned with up to {max(0, limit) / GIB:.1f}. Change one of:"
        f" {'; '.join(ways)}. A launcher that is named is tried all the same (python -m vzip list launcher)."
    )


def several_strategies(quantized: bool) -> tuple[Strategy, ...] | None:
    """Other strategies for several GPUs than the usual ones: DeepSpeed is missing, or cannot take the weights."""
    if quantized or importlib.util.find_spec("deepspeed") is None:
        return ("ddp",)
    return None


def find_place(device: str, environment: Mapping[str, str] | None = None) -> Place:
    """Looks around: visible GPUs, memory, and whether torchrun or SLURM have started this.

    Args:
        device: ``launcher.device``.
        environment: the process's own by default.

    Raises:
        ConfigError: CUDA is asked for and there is none; srun started several tasks on a machine.
    """
    from .distributed import uses_cuda

    environment = os.environ if environment is None else environment
    gpus = visible_gpus("RANK" in environment) if uses_cuda(device) else ()
    place = Place(gpus, Device("CPU", _memory_bytes()), os.cpu_count() or 1)
    if "RANK" in environment:
        started = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        return replace(place, num_started=started, num_machines=int(environment.get("WORLD_SIZE", "1")) // started)
    machines = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", str(machines)))
    if tasks > machines:
        raise ConfigError(
            f"launcher=auto: srun started {tasks} tasks on {machines} machines. Start one on each"
            " (srun --ntasks-per-node=1), which starts a process for each of its GPUs, or name a launcher."
        )
    if machines > 1:
        return replace(place, num_machines=machines, by_slurm=True)
    allocated = int(environment.get("SLURM_NNODES", "1"))
    if allocated > 1:
        remark = f"SLURM gave {allocated} machines, this is one: start it with srun, once on each, to use them all"
        return replace(place, remark=remark)
    return place


def visible_gpus(in_process: bool) -> tuple[Device, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, and slices of one (MIG) as CUDA shows them, with all their memory.

    Args:
        in_process: ask in this process. Otherwise another one asks, since a process that has asked holds memory of the
            GPUs on which those it starts will train.
    """
    if in_process:
        return tuple(Device(name, num_bytes) for name, num_bytes in _ask_cuda())
    code = "import json; from vzip.train.choosing import _ask_cuda; print(json.dumps(_ask_cuda()))"
    source = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            f"launcher=auto: the GPUs do not tell their memory ({done.stderr.strip().splitlines()[-1:]}). Name a"
            " launcher (python -m vzip list launcher)."
        )
    return tuple(Device(name, num_bytes) for name, num_bytes in json.loads(done.stdout.splitlines()[-1]))


def _ask_cuda() -> list[tuple[str, int]]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(properties.name, properties.total_memory) for properties in found]


def _memory_bytes() -> int:
    """The machine's memory, or what its control group may have of it (containers, SLURM)."""
    num_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            num_bytes = min(num_bytes, int(limit))
    return num_bytes
