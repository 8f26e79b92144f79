"""Contexts of several threads overlap, and compiled functions run from their graphs again when all are left."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from vzip.ops.uncompiled import uncompiled


@pytest.mark.parametrize("first_out", [0, 1], ids=["in the order entered", "the last first"])
def test_after_overlapping_contexts_functions_are_compiled_again(first_out: int) -> None:
    graphs = CompileCounter()
    torch._dynamo.reset()
    double = torch.compile(lambda x: 2 * x, backend=graphs)
    open_ones = [uncompiled(), uncompiled()]
    for context in open_ones:
        context.__enter__()
    open_ones.pop(first_out).__exit__(None, None, None)
    assert double(torch.ones(2)).tolist() == [2, 2] and graphs.frame_count == 0, "one is open still"
    open_ones.pop().__exit__(None, None, None)
    assert double(torch.ones(2)).tolist() == [2, 2] and graphs.frame_count == 1
