"""The vision tower's output kept between the runs of a sweep: it depends on the image, not on the budget.

A batch of crops is looked up as a whole, by its bytes. So a run that takes its tower's output from here gets exactly
what the tower would give it, bit for bit: the output of one crop alone may differ in its last bits from the output of
that crop in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vzip.compressors.vision import Signal, VisionOutput
from vzip.errors import ConfigError

BYTES_PER_GIB = 1024**3
# Read at every miss, whatever the run asks for, so that a vanilla run serves the compressed ones after it.
USUAL = frozenset({Signal("attention"), Signal("keys")})


@dataclass
class TowerCache:
    """Outputs in host memory, up to a limit; for one model, whose weights must not change meanwhile.

    Once full it keeps what it has and takes nothing new: every run of a sweep goes through the same images in the
    same order, and throwing out the oldest would throw out each batch just before it is asked for.

    Attributes:
        max_gib: memory for the outputs.
        num_hits, num_misses: crops since ``start_counting``.
        num_bytes: memory in use.

    Raises:
        ConfigError: a negative ``max_gib``.
    """

    max_gib: float
    num_hits: int = 0
    num_misses: int = 0
    num_bytes: int = 0
    _kept: dict[Hashable, tuple[VisionOutput, torch.device]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.max_gib < 0:
            raise ConfigError(f"eval.tower_cache_gib={self.max_gib}: must be 0 (off) or more.")

    @property
    def counts(self) -> dict[str, int]:
        """Hits and misses, for a record."""
        return {"num_hits": self.num_hits, "num_misses": self.num_misses}

    def start_counting(self) -> None:
        """Sets the counts of hits and misses to 0."""
        self.num_hits = self.num_misses = 0

    def look_up(
        self,
        pixel_values: Tensor,
        place: Hashable,
        signals: frozenset[Signal],
        run: Callable[[frozenset[Signal]], VisionOutput],
        num_crops: int | None = None,
    ) -> VisionOutput:
        """The tower's output for a batch of crops, from here or from the tower.

        Args:
            pixel_values: ``[N, 3, h, w]``.
            place: which tower and select layer; outputs of different places are kept apart.
            signals: what must have been recorded, as for ``run_tower``.
            run: runs the tower and reads what it is told to.
            num_crops: how many are counted; None: N.

        Returns:
            what ``run`` returns, on the same device; beyond ``signals`` it may hold more.
        """
        key = (place, tuple(pixel_values.shape), pixel_values.dtype, _digest(pixel_values))
        num_crops = len(pixel_values) if num_crops is None else num_crops
        found = self._kept.get(key)
        if found is not None and signals <= _read(found[0]):
            self.num_hits += num_crops
            return _to(found[0], found[1])
        self.num_misses += num_crops
        already = frozenset() if found is None else _read(found[0])
        vision = run(signals | already | USUAL)
        self._keep(key, vision)
        return vision

    def _keep(self, key: Hashable, vision: VisionOutput) -> None:
        before = self._kept.get(key)
        more = _size(vision) - (0 if before is None else _size(before[0]))
        if self.num_bytes + more <= self.max_gib * BYTES_PER_GIB:
            self.num_bytes += more
            self._kept[key] = (_to(vision, torch.device("cpu")), vision.hidden.device)


class NewestTowerCache(TowerCache):
    """The same for people who look at one image for a while: once full, the oldest outputs make room for new ones."""

    def _keep(self, key: Hashable, vision: VisionOutput) -> None:
        self._drop(key)
        while self._kept and self.num_bytes + _size(vision) > self.max_gib * BYTES_PER_GIB:
            self._drop(next(iter(self._kept)))
        super()._keep(key, vision)

    def _drop(self, key: Hashable) -> None:
        if (found := self._kept.pop(key, None)) is not None:
            self.num_bytes -= _size(found[0])


def _digest(pixel_values: Tensor) -> bytes:
    data = pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=32).digest()


def _recorded(vision: VisionOutput) -> dict[Signal, Tensor]:
    named = {Signal("attention"): vision.attention, Signal("keys"): vision.keys}
    return {**{signal: value for signal, value in named.items() if value is not None}, **vision.signals}


def _read(vision: VisionOutput) -> frozenset[Signal]:
    return frozenset(_recorded(vision))


def _size(vision: VisionOutput) -> int:
    planes = 0 if vision.planes is None else vision.planes.nbytes
    return vision.hidden.nbytes + planes + sum(value.nbytes for value in _recorded(vision).values())


def _to(vision: VisionOutput, device: torch.device) -> VisionOutput:
    moved = {signal: value.to(device) for signal, value in _recorded(vision).items()}
    attention, keys = moved.pop(Signal("attention"), None), moved.pop(Signal("keys"), None)
    planes = None if vision.planes is None else vision.planes.to(device)
    hidden = vision.hidden.to(device)
    return replace(vision, hidden=hidden, attention=attention, keys=keys, signals=moved, planes=planes)
