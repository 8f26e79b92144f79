"""Several processes, one a device, that share the questions of one run.

Each answers its share; the first gets all answers and alone scores them, as a run of one process does. lmms-eval's own
way, to score the shares apart and put the scores together, gives sums and resamples in another order, and so other
numbers in the last digits.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vzip.errors import ConfigError

T = TypeVar("T")

# One process may score, or ask a judge, long after the others are done.
_PATIENCE = datetime.timedelta(days=7)
_OF_A_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this one, from 0.
        count: of all.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """What this process does of a list that all have: every ``count``-th."""
        return items[self.rank :: self.count]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes in order of rank, to the first; None to the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.is_first else None
        dist.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: T) -> T:
        """The first process's value, to all."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]


def join_processes() -> Processes:
    """Under torchrun or ``accelerate launch``, lets the processes find each other; otherwise this one is alone."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes()
    if not dist.is_initialized():
        # Answers are sent, not tensors of a GPU.
        dist.init_process_group(backend="gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), count)


@contextmanager
def as_one_process() -> Iterator[None]:
    """Hides from lmms-eval, which reads the environment, that there are several processes."""
    hidden = {name: os.environ.pop(name) for name in _OF_A_PROCESS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def own_device(device_map: Any) -> Any:
    """Where this process's model goes: as ``model.device_map`` says, and each of several processes on its own GPU.

    Raises:
        ConfigError: several processes, and ``device_map`` names devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or device_map in (None, "cpu") or not torch.cuda.is_available():
        return device_map
    if device_map not in ("auto", "cuda"):
        raise ConfigError(
            f"model.device_map={device_map}: several processes evaluate, each on a GPU of its own. Set it to auto, or"
            " run one process."
        )
    device = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(device)
    return {"": device}
