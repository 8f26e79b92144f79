"""Which tensors are alive when, what they are for, and what there is at the worst moment."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Peak:
    """The worst moment.

    Attributes:
        num_bytes: alive at it, by what they are for.
    """

    num_bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.num_bytes.values())


class Ledger(TorchDispatchMode):
    """While it is entered, books the storage of every tensor that an operation returns, and its end.

    A storage counts once, however many tensors view it. What is never named is an activation: that is what remains
    when weights, gradients, optimizer states and caches are known. Memory that a kernel takes and gives back within one
    operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numbers = itertools.count()
        self._alive: dict[int, int] = {}  # address of the storage -> its number here
        self._events: list[tuple[int, int]] = []  # (number, bytes), negative where the storage ends
        self._purposes: dict[int, str] = {}
        self._phases: list[tuple[int, str]] = []  # (index of the first event, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._book(tensor)
        return result

    def name(self, purpose: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are for, from their beginning on; books those that were made before."""
        for tensor in tensors:
            self._purposes[self._book(tensor)] = purpose

    def begin(self, phase: str) -> None:
        """What follows belongs to this phase."""
        self._phases.append((len(self._events), phase))

    def peak(self, phase: str | None = None, purpose: str | None = None) -> Peak:
        """The moment with the most bytes.

        Args:
            phase: only moments within it; None: any.
            purpose: the moment with the most bytes for this purpose; None: for all together.
        """
        counted = self._within(phase)
        now = most = 0
        worst = -1
        for index, (number, num_bytes) in enumerate(self._events):
            if purpose is None or self._purposes.get(number, ACTIVATIONS) == purpose:
                now += num_bytes
            if counted[index] and now > most:
                most, worst = now, index
        sums: dict[str, int] = {}
        for number, num_bytes in self._events[: worst + 1]:
            of = self._purposes.get(number, ACTIVATIONS)
            sums[of] = sums.get(of, 0) + num_bytes
        return Peak(sums)

    def _within(self, phase: str | None) -> list[bool]:
        """For each event, whether it lies in the phase."""
        if phase is None:
            return [True] * len(self._events)
        ends = [start for start, _ in self._phases[1:]] + [len(self._events)]
        counted = [False] * len(self._events)
        for (start, name), end in zip(self._phases, ends, strict=True):
            if name == phase:
                counted[start:end] = [True] * (end - start)
        return counted

    def _book(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return self._alive[address]
        number, num_bytes = next(self._numbers), storage.nbytes()
        self._alive[address] = number
        self._events.append((number, num_bytes))
        weakref.finalize(storage, self._end, address, number, num_bytes)
        return number

    def _end(self, address: int, number: int, num_bytes: int) -> None:
        del self._alive[address]
        self._events.append((number, -num_bytes))
