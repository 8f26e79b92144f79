"""Tensors that have a shape and no content, so that a model of any size runs in seconds and in no memory.

Torch's fake tensors do that, except where the code must know a content: how many placeholders a prompt has, whether a
loss is finite. Integers are small and therefore real here, and every number that is asked for is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

_ASK_FOR_NUMBER = torch.ops.aten._local_scalar_dense.default
_ASK_FOR_DEVICE = torch.ops.prim.device.default  # half of all calls
_COUNT_UP = torch.ops.aten.arange


@contextmanager
def pretending() -> Iterator[None]:
    """Within it new floating-point tensors have no content; real ones that are given may be used.

    Tensors of one such context must not be used in another.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _RealIntegers():
        yield


def fill(model: PreTrainedModel) -> None:
    """Turns a model on the meta device into one that computes while pretending, in place."""
    model.to_empty(device=torch.device("cpu"))
    model.tie_weights()  # to_empty gives each user of a shared weight its own


class _RealIntegers(TorchDispatchMode):
    """Computes with contents wherever all contents are there, and makes new integers with contents."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ASK_FOR_DEVICE:
            return func(*args)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        without_content = any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
        if func is _ASK_FOR_NUMBER and without_content:
            return True if args[0].dtype is torch.bool else 1.0
        if without_content or not (tensors or _makes_integers(func, kwargs)):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _makes_integers(func: Any, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func.overloadpacket is _COUNT_UP
    return not dtype.is_floating_point
