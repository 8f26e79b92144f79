"""The tensor functions against plain loops, and the promises their docstrings make."""

from __future__ import annotations

import math

import pytest
import torch
from tests import reference
from torch.overrides import TorchFunctionMode

from vzip.ops.attention import CPU_BLOCK_ELEMENTS, cls_attention, key_norms, mean_keys, received_attention
from vzip.ops.merge import assign_to_targets, combine_rows, target_positions
from vzip.ops.select import dominant_rows, gather_rows, random_indices, remaining_rows, top_indices, uniform_indices

CPU = torch.device("cpu")


def random_projections(length: int, num_heads: int, width: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, length, num_heads * width)
    return (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize(("length", "num_heads", "width"), [(5, 1, 4), (17, 3, 8), (10, 4, 2)])
@pytest.mark.parametrize("has_cls", [True, False])
def test_scores_and_metric_equal_plain_loops(length, num_heads, width, has_cls):
    queries, keys = random_projections(length, num_heads, width, seed=length)
    function = cls_attention if has_cls else received_attention
    ours = function(queries, keys, num_heads, 0.37)
    metric = mean_keys(keys, num_heads)
    for crop in range(2):
        q, k = queries[crop].tolist(), keys[crop].tolist()
        expected = torch.tensor(reference.scores(q, k, num_heads, 0.37, has_cls), dtype=torch.float64)
        torch.testing.assert_close(ours[crop], expected, rtol=0, atol=1e-12)
        expected = torch.tensor(reference.key_metric(k, num_heads), dtype=torch.float64)
        torch.testing.assert_close(metric[crop], expected, rtol=0, atol=1e-12)


def test_key_norms_equal_plain_loops():
    _, keys = random_projections(9, 3, 4, seed=1)
    ours = key_norms(keys, 3)
    for crop in range(2):
        for row in range(9):
            heads = reference.heads_of(keys[crop, row].tolist(), 3)
            expected = sum(math.sqrt(sum(value**2 for value in head)) for head in heads) / 3
            assert ours[crop, row].item() == pytest.approx(expected, abs=1e-12)


class LargestResult(TorchFunctionMode):
    """Remembers the most elements any torch call returned."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize("block_elements", [1, 300, 2000, 10**6])
def test_received_attention_in_blocks_of_any_size(block_elements):
    length, num_heads = 41, 4
    queries, keys = random_projections(length, num_heads, 2, seed=1)
    maps = (queries.unflatten(2, (4, 2)).transpose(1, 2) @ keys.unflatten(2, (4, 2)).permute(0, 2, 3, 1)).softmax(-1)
    with LargestResult() as largest:
        received = received_attention(queries, keys, num_heads, 1.0, block_elements)
    torch.testing.assert_close(received, maps.mean(dim=(1, 2)), rtol=0, atol=1e-15)
    # A query at least; not all, though several maps may be at hand; beside it inputs of 2 * 41 * 8.
    assert largest.num_elements <= max(min(block_elements, 8 * 21 * length), 2 * length * num_heads * 2)


def test_received_attention_takes_memory_linear_in_tokens():
    queries, keys = random_projections(2100, 2, 1, seed=1, dtype=torch.float32)
    with LargestResult() as largest:
        received_attention(queries, keys, 2, 1.0)
    assert largest.num_elements <= CPU_BLOCK_ELEMENTS < 2100**2 / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_float32(dtype):
    queries, keys = random_projections(9, 2, 4, seed=2, dtype=torch.float32)
    queries, keys = queries.to(dtype), keys.to(dtype)
    for function in (cls_attention, received_attention):
        ours = function(queries, keys, 2, 0.5)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, function(queries.float(), keys.float(), 2, 0.5), rtol=0, atol=0)
    assert mean_keys(keys, 2).dtype == torch.float32


def test_equal_scores_go_to_the_lower_index():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0]])
    assert top_indices(scores, 3).tolist() == [[0, 1, 4], [0, 1, 2]]
    many = torch.zeros(1, 5000)  # beyond any small-array special case of a sort
    assert top_indices(many, 100).tolist() == [list(range(100))]


def test_ties_made_by_half_precision_are_ties():
    scores = torch.tensor([[0.1000, 0.1001, 0.1002]]).to(torch.float16).to(torch.bfloat16)
    assert top_indices(scores, 1).tolist() == [[0]]


def test_dominant_and_remaining_rows():
    attention = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert dominant_rows(attention, 3, has_cls=True).tolist() == [[0, 2, 4]]
    assert dominant_rows(attention, 1, has_cls=True).tolist() == [[0]]
    kept = dominant_rows(attention, 2, has_cls=False)
    assert kept.tolist() == [[1, 3]]
    assert remaining_rows(kept, 4).tolist() == [[0, 2]]
    hidden = torch.arange(8.0).view(1, 4, 2)
    assert gather_rows(hidden, kept).tolist() == [[[2.0, 3.0], [6.0, 7.0]]]


def test_uniform_indices_are_spread_and_distinct():
    assert uniform_indices(4, 16, CPU).tolist() == [2, 6, 10, 14]
    for number in (1, 5, 63, 64):
        indices = uniform_indices(number, 64, CPU)
        gaps = indices.diff()
        assert indices.shape == (number,) and int(indices[0]) >= 0 and int(indices[-1]) < 64
        assert number == 1 or int(gaps.max() - gaps.min()) <= 1
        assert number == 1 or int(gaps.min()) >= 1


def test_random_indices_depend_on_the_seed_alone_and_cover_all_patches():
    assert random_indices(6, 576, 0, CPU).tolist() == random_indices(6, 576, 0, CPU).tolist()
    counts = torch.zeros(64)
    for seed in range(400):
        indices = random_indices(16, 64, seed, CPU)
        assert len(set(indices.tolist())) == 16 and indices.tolist() == sorted(indices.tolist())
        counts[indices] += 1
    # Each patch is drawn with probability 1/4: 100 of 400 with standard deviation 8.7.
    assert counts.min() > 60 and counts.max() < 140


def test_random_indices_are_pinned():
    """Records name a seed; the same seed must mean the same patches in every version."""
    assert random_indices(10, 576, 0, CPU).tolist() == [82, 131, 149, 298, 303, 312, 314, 405, 478, 524]


def test_equal_cosines_go_to_the_lower_target_and_zero_keys_are_defined():
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    # Targets are rows 0 and 2 (step 2), with equal direction.
    assert assign_to_targets(keys, 2).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize(("num_rows", "num_contextual"), [(523, 10), (469, 20), (415, 30), (30, 20), (7, 7), (5, 1)])
def test_target_positions_are_as_published(num_rows, num_contextual):
    positions = target_positions(num_rows, num_contextual, CPU).tolist()
    assert positions == list(range(0, num_rows, max(1, num_rows // num_contextual)))[:num_contextual]
    assert len(positions) == num_contextual
    known_last = {(523, 10): 468, (469, 20): 437, (415, 30): 377}
    assert positions[-1] == known_last.get((num_rows, num_contextual), positions[-1])


def test_both_merge_rules_by_hand():
    hidden = torch.tensor([[[1.0], [3.0], [5.0], [10.0]]])
    places, joins = torch.tensor([[0, 2]]), torch.tensor([[-1, 0, -1, 0]])  # rows 1 and 3 join row 0, nothing row 2
    assert combine_rows(hidden, places, joins, "sum").flatten().tolist() == [1 + (3 + 10) / 2, 5.0]
    assert combine_rows(hidden, places, joins, "mean").flatten().tolist() == [pytest.approx((1 + 3 + 10) / 3), 5.0]
    kept_first, dropped = torch.tensor([[1, 0]]), torch.tensor([[-1, -1, -1, 1]])
    assert combine_rows(hidden, kept_first, dropped, "mean", first=1).flatten().tolist() == [3.0, (1 + 10) / 2]


def test_sums_of_half_precision_run_in_float32():
    hidden = torch.full((1, 4000, 1), 1.0, dtype=torch.float16)
    hidden[0, 1] = 0.25
    joins = torch.zeros(1, 4000, dtype=torch.int64)
    joins[0, 0] = -1
    merged = combine_rows(hidden, torch.zeros(1, 1, dtype=torch.int64), joins, "mean")
    assert merged.dtype == torch.float16
    assert merged.item() == pytest.approx((3999 + 0.25) / 4000, abs=6e-4)
