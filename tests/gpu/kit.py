"""Each test here runs on a GPU (``-m gpu``, never skipped there) and, the same body, on the CPU in the fast tests.

So what only a GPU can show is written once, and proven to be a test on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.tiny import Family

import vzip
from vzip.models.devices import full_float32

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@pytest.fixture
def no_tf32() -> Iterator[None]:
    """Float32 that is compared must be float32."""
    with full_float32():
        yield


def on(device: str, inputs: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The inputs on a device, the floating ones in ``dtype``."""
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()}


def prompt(family: Family, lengths: list[int]) -> torch.Tensor:
    """``[1, T]``: text around one run of placeholders for each of ``lengths``."""
    ids = [5, 6]
    for number, length in enumerate(lengths):
        ids += [family.token] * length + [7 + number]
    return torch.tensor([ids])
