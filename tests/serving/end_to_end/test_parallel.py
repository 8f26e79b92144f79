"""Two processes that share the model: both must keep the same tokens."""

from __future__ import annotations

import pytest
from tests.serving.end_to_end import engines
from tests.serving.end_to_end.engines import check, scene_questions

pytestmark = pytest.mark.serve


def test_tensor_parallel_of_two(tiny_path, tiny_vlm):
    engine = engines.start(tiny_path, tensor_parallel_size=2, distributed_executor_backend="mp", max_num_seqs=8)
    check(engine, tiny_vlm, scene_questions(12))
