"""What tensors take at the worst moment, by what they are for; also of tensors that have a shape and no content."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer states"
ACTIVATIONS, CACHE = "activations", "key-value cache"
PURPOSES = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, CACHE)  # in a table's order

_ASK_FOR_NUMBER = torch.ops.aten._local_scalar_dense.default
_INDEX = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
_ASK_FOR_DEVICE = torch.ops.prim.device.default  # half of all calls


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the storage of every tensor that an operation returns until the storage ends.

    A storage counts once, however many tensors view it; what is never named is an activation. Memory that a kernel
    takes and gives back within one operation is not seen.

    Entered inside torch's ``FakeTensorMode(allow_non_fake_inputs=True)`` it lets a model of any size run in seconds:
    floating-point tensors have no content there, integers do (how many placeholders has a prompt?), and every number
    that is asked of a tensor without content is 1.

    Attributes:
        peak: bytes by purpose at the moment with the most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak: Counter[str] = Counter()
        self._live: Counter[str] = Counter()
        self._purposes: dict[int, str] = {}  # of each storage, by its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ASK_FOR_DEVICE:
            return func(*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        without_content = any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
        if func is _ASK_FOR_NUMBER and without_content:
            return True if args[0].dtype is torch.bool else 1.0
        if without_content and func.overloadpacket in _INDEX:
            with unset_fake_temporarily():
                args = (args[0], [part for index in args[1] for part in _numbers(index)], *args[2:])
        if without_content or not (tensors or _makes_integers(func, kwargs)):
            result = func(*args, **kwargs)
        else:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self._purposes:
                self.name(ACTIVATIONS, [made])
        return result

    def name(self, purpose: str, tensors: Iterable[Tensor]) -> None:
        """Says what tensors are for, and counts those that were made outside."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            address, num_bytes = storage._cdata, storage.nbytes()
            if address in self._purposes:
                self._live[self._purposes[address]] -= num_bytes
            else:
                weakref.finalize(storage, self._end, address, num_bytes)
            self._purposes[address] = purpose
            self._live[purpose] += num_bytes
        if self._live.total() > self.peak.total():
            self.peak = self._live.copy()

    def forget_peak(self) -> None:
        """The worst moment from now on."""
        self.peak = self._live.copy()

    def _end(self, address: int, num_bytes: int) -> None:
        self._live[self._purposes.pop(address)] -= num_bytes


def _numbers(index: Tensor | None) -> Sequence[Tensor | None]:
    """A mask with content as the rows that it names, since how many these are decides the result's shape."""
    is_mask = index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor)
    return index.nonzero().unbind(1) if is_mask and index is not None else (index,)


def _makes_integers(func: Any, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return func.overloadpacket is torch.ops.aten.arange if dtype is None else not dtype.is_floating_point
