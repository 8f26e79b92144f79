"""The tenth by hash: pure in the sample, equal everywhere, of the size asked for."""

from __future__ import annotations

import hashlib
import io
import json
import math

import numpy as np
import pytest
from rich.console import Console

from vzip.data.llava_json import LlavaJson
from vzip.data.subset import choose, source_table
from vzip.errors import ConfigError

NUM = 6000


def record(number: int) -> dict:
    """Every third sample is text-only; ids repeat in runs of four, some are missing."""
    sample: dict = {
        "conversations": [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": "answer"}]
    }
    if number % 10:
        sample["id"] = f"{number // 4:012d}"
    if number % 3:
        sample["image"] = f"{'coco' if number % 2 else 'vg'}/{number // 4}.jpg"
        sample["conversations"][0]["value"] += "\n<image>"
    return sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("subset")


def load(folder, name, records) -> LlavaJson:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return LlavaJson(path, cache=folder / "cache")


@pytest.fixture(scope="module")
def data(folder):
    return load(folder, "all", [record(number) for number in range(NUM)])


def questions(data, indices) -> set[str]:
    return {data[int(i)].turns[0].text for i in indices}


@pytest.mark.parametrize("fraction", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_rule_written_out_a_second_way(data, fraction, seed):
    expected = []
    for i in range(len(data)):
        found = data.record(i)
        words = [[turn.role, turn.text] for turn in found.turns]
        content = json.dumps([found.id, list(found.images), words])
        key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        if int(hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()[:16], 16) / 2**64 < fraction:
            expected.append(i)
    assert choose(data, fraction, seed).tolist() == expected


def test_order_and_the_rest_of_the_file_do_not_matter(folder, data):
    chosen = questions(data, choose(data, 0.1))
    order = np.random.RandomState(0).permutation(NUM)
    shuffled = load(folder, "shuffled", [record(int(number)) for number in order])
    assert questions(shuffled, choose(shuffled, 0.1)) == chosen
    half = load(folder, "half", [record(number) for number in range(0, NUM, 2)])
    assert questions(half, choose(half, 0.1)) == chosen & questions(half, range(len(half)))


def test_the_same_on_every_machine(data):
    assert choose(data, 0.1, 0)[:8].tolist() == [9, 23, 31, 37, 60, 66, 67, 86]
    assert choose(data, 0.1, 1)[:8].tolist() == [10, 22, 31, 32, 37, 40, 42, 44]
    assert np.array_equal(choose(data, "1/10"), choose(data, 0.1))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.7])
def test_the_size_is_binomial_in_every_source_and_seeds_are_independent(data, fraction):
    first, second = choose(data, fraction, 1), choose(data, fraction, 2)
    both = np.intersect1d(first, second)
    counts = [(len(first), NUM, fraction), (len(second), NUM, fraction), (len(both), NUM, fraction**2)]
    counts += [(data.count_sources(first)[name], num, fraction) for name, num in data.count_sources().items()]
    for count, num, share in counts:
        assert abs(count - num * share) < 4 * math.sqrt(num * share * (1 - share))


def test_samples_that_share_an_id_are_drawn_each_for_itself(data):
    chosen = set(choose(data, 0.5).tolist())
    groups = [[i in chosen for i in range(start, start + 4) if i % 10] for start in range(0, NUM, 4)]
    mixed = sum(any(group) and not all(group) for group in groups)
    assert mixed > 0.7 * len(groups)  # three or four coins agree in 2/8 or 2/16 of all groups


def test_identical_records_share_their_fate(folder):
    twice = load(folder, "twice", [record(number % 500) for number in range(1000)])
    chosen = choose(twice, 0.3)
    assert (chosen < 500).sum() * 2 == len(chosen) and np.array_equal(chosen[chosen < 500] + 500, chosen[chosen >= 500])


def test_parts_are_nested_and_the_whole_is_the_whole(data):
    parts = [choose(data, share, 3) for share in (0.05, 0.1, 0.6)]
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    assert choose(data).tolist() == list(range(NUM))


def test_text_only_samples_can_be_dropped_without_changing_the_others(data):
    kept, dropped = choose(data, 0.1), choose(data, 0.1, keep_text_only=False)
    assert dropped.tolist() == [i for i in kept if data.has_images(int(i))]
    assert len(dropped) < len(kept)


def test_counts_by_source_are_printed(data):
    indices = choose(data, 0.1)
    console = Console(file=io.StringIO(), width=100)
    console.print(source_table(data, indices))
    console.print(source_table(data, indices, max_rows=1))
    text = console.file.getvalue()
    for name, count in data.count_sources(indices).items():
        row = next(line for line in text.splitlines() if name in line)
        assert f"{data.count_sources()[name]:,}" in row and f"{count:,}" in row
    assert "2 others" in text and f"{len(indices):,} of 6,000 samples" in text


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5, "a tenth", "1/0", float("nan"), True])
def test_a_fraction_that_is_none(data, fraction):
    with pytest.raises(ConfigError, match=r"data\.fraction=.*above 0 and at most 1"):
        choose(data, fraction)


def test_an_empty_part_and_a_bad_seed(folder, data):
    with pytest.raises(ConfigError, match=r"chose none of 6000 samples"):
        choose(data, 1e-12)
    text = load(folder, "text", [record(0)])
    with pytest.raises(ConfigError, match=r"none of 0 samples.*keep the text-only"):
        choose(text, keep_text_only=False)
    with pytest.raises(ConfigError, match=r"data\.subset_seed='x'"):
        choose(data, 0.1, "x")
