"""Where the parts of a model compute, when accelerate has spread it over devices or parked weights elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

_PLACED_BY_ACCELERATE = ("auto", "balanced", "balanced_low_0", "sequential")


def execution_device(module: nn.Module) -> torch.device:
    """The device a module computes on: its parameters', or the one that offloaded weights (on meta) are fetched to."""
    device = next(module.parameters()).device
    hook = getattr(module, "_hf_hook", None)  # accelerate's only mark on a module; transformers reads it likewise
    for part in getattr(hook, "hooks", [hook]):  # several hooks stand in one SequentialHook
        wanted = getattr(part, "execution_device", None)
        if device.type == "meta" and wanted is not None:
            return torch.device(wanted)
    return device


def first_device(device_map: Any) -> torch.device:
    """Where a model that is loaded so will mostly be, before it is there: as ``from_pretrained`` reads the argument."""
    names = [*device_map.values()] if isinstance(device_map, Mapping) else [device_map]
    first = names[0] if names else None
    if first is None or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda" if isinstance(first, int) or first in _PLACED_BY_ACCELERATE else first)


def pinned(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors where they may wait to be sent to a device: for a GPU in pinned memory of the host."""
    return {
        name: tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor
        for name, tensor in tensors.items()
    }


def sent(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device; to a GPU from pinned memory, so that whoever sends them need not wait.

    The copy is queued where the GPU's other work is: what is computed from it afterwards has it.
    """
    waiting = pinned(tensors, device)
    return {name: tensor.to(device, non_blocking=device.type == "cuda") for name, tensor in waiting.items()}


def has_placement_hooks(module: nn.Module) -> bool:
    """Whether accelerate moves tensors or fetches weights while the module, or a part of it, runs."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it GPUs compute float32 products and convolutions in float32, not in TF32, which has ten bits of mantissa.

    For checks that hold two computations against each other: left alone, torch computes convolutions in TF32.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def fetched(*modules: nn.Module) -> Iterator[None]:
    """Has the modules' own parameters at hand while the context lasts, where accelerate has parked them elsewhere."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(align_module_device(module))
        yield


def fetch_parameter(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter, fetched if it is offloaded."""
    with fetched(module):
        return module.get_parameter(name)
