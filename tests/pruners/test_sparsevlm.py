"""SparseVLM's own arguments, cases by hand, and its clusters; the rest stands in test_oracle.py and test_pruning.py."""

from __future__ import annotations

import pytest
import torch
from tests.pruners.methods import clusters
from tests.pruners.states import State, rows

import vzip
from vzip.errors import ConfigError
from vzip.pruners.sparsevlm import cluster_means


@pytest.mark.parametrize(
    ("method", "arguments", "messages"),
    [
        (vzip.SparseVLM, {"layers": [-1, 2, 3]}, ["pruner.layers=[-1, 2, 3]: must be whole numbers, 0 or more"]),
        (vzip.SparseVLM, {"keep": [3, 4, 5], "seed": -1}, ["must not rise", "pruner.seed=-1"]),
        (vzip.SparseVLM, {"seed": 2**32}, ["at most 4294967295"]),
        (vzip.SparseVLMByRank, {"scale": -1, "bias": "6", "seed": 0.5}, ["scale=-1", "bias='6'", "seed=0.5"]),
        (vzip.SparseVLMPlus, {"keep": 5, "num_heads": 0}, ["pruner.keep=[5]: must be as many", "pruner.num_heads=0"]),
    ],
)
def test_wrong_arguments_are_named_all_at_once(method, arguments, messages):
    with pytest.raises(ConfigError) as error:
        method(**arguments)
    assert all(message in str(error.value) for message in messages)


@pytest.mark.parametrize(
    ("keep", "entering", "average", "published"),
    [
        ([300, 200, 110], [309, 204, 113], 206.5, 192.0),
        ([303, 110, 36], [312, 117, 39], 145.4, 128.6),
        ([238, 48, 26], [249, 55, 27], 114.1, 96.9),
        ([66, 30, 17], [82, 32, 18], 82.3, 64.8),
    ],
)
def test_schedule_and_what_the_published_averages_count(keep, entering, average, published):
    pruner = vzip.SparseVLM(keep=keep)
    schedule = pruner.schedule(576, 32)
    assert schedule == [576] * 3 + [entering[0]] * 4 + [entering[1]] * 9 + [entering[2]] * 16
    assert pruner.average(576, 32) == pytest.approx(average, abs=0.06)
    as_published = [*schedule[1:], schedule[-1]]  # a layer too early
    assert sum(as_published) / 32 == pytest.approx(published, abs=0.06)


def test_other_schedules():
    assert vzip.SparseVLM([0, 1], [50, 9]).schedule(20, 4) == [20, 19 + 1, 9 + 1, 10]  # one is always dropped
    assert vzip.SparseVLM([0], [0.5]).schedule(100, 2) == [100, 50 + 2]
    assert vzip.SparseVLM([0], [4]).schedule(1, 2) == [1, 1]
    assert vzip.SparseVLMByRank().schedule(576, 32) is None
    assert vzip.SparseVLMPlus([0], [50]).schedule(20, 2) == [20, 20]


# Two images of three tokens. Word 4 alone follows image 0 before 5 to 7; words 8 and 9 follow both.
OWNER = [-1, 0, 0, 0, -1, 1, 1, 1, -1, -1]
# Image 0 is like word 8, image 1 like 9: these rate, for the softmax leaves the others below the mean.
EMBEDS = [[0, 0], [3, 0], [3, 0], [3, 0], [0, 0], [0, 3], [0, 3], [0, 3], [3, 0], [0, 3]]
HIDDEN = [[10.0 * number, 1.0] for number in range(10)]
ATTENTION = [
    rows({8: [0, 0.1, 0.5, 0.2, 0, 0, 0, 0.2, 0, 0], 9: [0, 0.9, 0, 0, 0, 0.3, 0.1, 0.2, 0, 0]}, 10),
    rows({8: [0, 0.1, 0.1, 0.2, 0, 0, 0, 0.5, 0, 0], 9: [0, 0.9, 0, 0, 0, 0.3, 0.1, 0.2, 0, 0]}, 10),
]


def test_two_images_by_hand():
    """Image 0: its rater 8 attends .1, .3, .2: keeps 2, and of 3 and 1 the better, 3, goes on as a cluster of its own.

    Image 1: 9 attends .3, .1, .2: keeps 5 and merges 7. New rows follow their image.
    """
    state = State(3, OWNER, ATTENTION, hidden=HIDDEN, embeds=EMBEDS)
    cut = vzip.SparseVLM([2], [1]).cut(state)
    assert cut.index.tolist() == [0, 2, -1, 4, 5, -2, 8, 9]
    assert cut.new_rows.tolist() == [HIDDEN[3], HIDDEN[7]]
    assert cut.new_visual_index.tolist() == [0, 1] and cut.positions == "repacked"
    assert {*state.layers_read} == {2}


def test_the_rank_by_hand():
    """One rater is rank 1: of three tokens 1 * 1.9 = 1 goes on; with rank 1 of one token, nothing is dropped."""
    state = State(3, OWNER, ATTENTION, hidden=HIDDEN, embeds=EMBEDS)
    assert vzip.SparseVLMByRank([2], 1.9).cut(state).index.tolist() == [0, 2, -1, 4, 5, -2, 8, 9]
    assert vzip.SparseVLMByRank([2], 0.0, 2.0).cut(state).index.tolist() == [0, 2, 3, -1, 4, 5, 7, -2, 8, 9]
    alone = State(1, [-1, 0, -1], [rows({2: [0.2, 0.3, 0.5]}, 3)])
    cut = vzip.SparseVLMByRank([0], 0.1).cut(alone)
    assert (cut.index.tolist(), cut.new_rows, cut.positions) == ([0, 1, 2], None, "original")


def test_attention_by_distance_by_hand():
    """Word 4 attends to 1, 2, 3 with .2, .3, .1; at 60 degrees a token their embeddings are as -1, -.5, .5.

    Divided by these: -.2, -.6, .2, so 3 is first and 1 second. The second head gives -.9, -.04, .16, less in sum; with
    both, -1.1, -.64, .36, 2 is second.
    """
    first = [0, 0.2, 0.3, 0.1, 0.4]
    second = [0, 0.9, 0.02, 0.08, 0]
    state = State(2, [-1, 0, 0, 0, -1], [rows({4: first}, 5), rows({4: second}, 5)], turn=60)
    cut = vzip.SparseVLMPlus([1], [1], num_heads=1).cut(state)
    assert (cut.index.tolist(), cut.positions, cut.new_rows) == ([0, 3, 4], "original", None)
    assert vzip.SparseVLMPlus([1], [2], num_heads=1).cut(state).index.tolist() == [0, 1, 3, 4]
    assert vzip.SparseVLMPlus([1], [2], num_heads=2).cut(state).index.tolist() == [0, 2, 3, 4]
    assert {*state.layers_read} == {1}


def test_where_no_word_is_above_the_others_all_rate():
    attention = [rows({3: [0, 0.9, 0.1, 0, 0], 4: [0, 0.1, 0.5, 0, 0]}, 5)]
    state = State(1, [-1, 0, 0, -1, -1], attention, embeds=[[0.0]] * 5)
    assert vzip.SparseVLMPlus([0], [1]).cut(state).index.tolist() == [0, 1, 3, 4]  # 1.0 and .6 together


@pytest.mark.parametrize("number", [1, 9, 10, 25, 40])
def test_clusters_equal_plain_loops(number):
    generator = torch.Generator().manual_seed(number)
    tokens, noise = torch.randn(number, 6, generator=generator), torch.rand(number, generator=generator)
    groups = clusters(tokens, noise.tolist())
    expected = torch.stack([tokens[group].mean(dim=0) for group in groups])
    assert len(groups) == number // 10 + 1
    torch.testing.assert_close(cluster_means(tokens, len(groups), noise), expected, atol=1e-6, rtol=0)


def test_equal_tokens_are_told_apart_by_the_seed_alone():
    """Ten equal tokens, all of one density but for the noise; means are what they are, whatever the seed."""
    tokens = torch.ones(10, 4)
    for seed in (0, 1):
        noise = vzip.SparseVLM(seed=seed).noise(10)
        assert torch.equal(noise, vzip.SparseVLM(seed=seed).noise(10))
        assert torch.equal(cluster_means(tokens, 2, noise), torch.ones(2, 4))
    assert not torch.equal(vzip.SparseVLM(seed=0).noise(10), noise)
