"""Machines and estimates to choose a launch by."""

from __future__ import annotations

from typing import Any

from vzip.config.options import config_dir, option_values
from vzip.train.choosing import Device, Place
from vzip.train.settings import LaunchSettings

GIB = 2**30
CPU = Device("CPU", 16 * GIB)


def option(name: str) -> dict[str, Any]:
    return option_values(config_dir(), "launcher", name)


def preset(name: str) -> LaunchSettings:
    return LaunchSettings(**{key: value for key, value in option(name).items() if key != "name"})


def gpus(count: int, gib: float, name: str = "GPU") -> Place:
    return Place((Device(name, int(gib * GIB)),) * count, CPU, num_cores=64)


def needs(base_gib: float, trained_gib: float = 0.0) -> Any:
    """An estimate that grows with the batch as that of LLaVA-1.5-7B: 1.62 GiB a conversation of 2048 tokens, or 9.03.

    ``base_gib`` are weights, ``trained_gib`` what ZeRO shares out.
    """
    asked: list[LaunchSettings] = []

    def estimate(launch: LaunchSettings, num_processes: int) -> int:
        asked.append(launch)
        each = 1.62 if launch.gradient_checkpointing else 9.03
        shared = trained_gib / num_processes if launch.uses_deepspeed else trained_gib
        weights = base_gib / num_processes if launch.strategy == "zero3" else base_gib
        return int((weights + shared + each * launch.batch_size) * GIB)

    estimate.asked = asked  # type: ignore[attr-defined]  # for the test that counts
    return estimate
