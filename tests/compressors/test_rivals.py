"""Other methods: against their own code's outputs, against plain loops, and at their edges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import vzip
from vzip.compressors import Signal, VisionOutput
from vzip.errors import ConfigError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rivals"
CASES = [json.loads(line) for line in (GOLDEN / "cases.jsonl").read_text(encoding="utf-8").splitlines()]
BUILT = {"divprune": vzip.DivPrune, "fastervlm": vzip.FasterVLM, "vscan_stage1": vzip.VScan}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_a_method_equals_its_own_code(case):
    given = load_file(GOLDEN / case["inputs"])
    wanted = load_file(GOLDEN / "cases" / f"{case['case']}.safetensors")
    side, projected = math.isqrt(case["patches"]), given["projected"].float()[None]
    vision = VisionOutput(
        given["hidden"].float()[None],
        has_cls=True,
        grid=(side, side),
        attention=given["attention"][None],
        signals={Signal("attention", 6): given["attention_shallow"][None]},
        project=lambda _hidden: functional.pad(projected, (0, 0, 1, 0)),
    )
    result = BUILT[case["method"]](vzip.TokenBudget(case["budget"], 0))(vision)
    assert torch.equal(result.source_index[0] - 1, wanted["kept_index_sorted"].long())
    if "merged" in wanted:
        torch.testing.assert_close(result.tokens[0], wanted["merged"], rtol=0, atol=1e-6)


def test_every_case_is_tried_and_every_method_has_one():
    assert {case["method"] for case in CASES} == set(BUILT)
    assert {f"{case['case']}.safetensors" for case in CASES} == {file.name for file in (GOLDEN / "cases").iterdir()}


def vision_output(has_cls=True, grid=(7, 9), num_crops=2, seed=0, valid=None):
    generator = torch.Generator().manual_seed(seed)
    num_patches = grid[0] * grid[1]
    hidden = torch.randn(num_crops, num_patches + has_cls, 5, generator=generator, dtype=torch.float64)
    attention, shallow = (torch.rand(num_crops, num_patches, generator=generator) for _ in range(2))
    signals = {Signal("attention", 6): shallow}
    return VisionOutput(hidden, has_cls, grid, attention, signals=signals, project=lambda x: 2 * x + 1, valid=valid)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.dist(a, [0] * len(a)) / math.dist(b, [0] * len(b))


def vscan_by_loops(vision, crop, num_tokens, window=6):
    first = int(vision.has_cls)
    height, width = vision.grid
    attention = vision.attention[crop].tolist()
    shallow = vision.signals[Signal("attention", 6)][crop].tolist()
    rows = (2 * vision.hidden[crop, first:] + 1).tolist()
    windows = {}
    for patch in range(height * width):
        row = min(patch // width // window, max(height // window, 1) - 1)
        col = min(patch % width // window, max(width // window, 1) - 1)
        windows.setdefault((row, col), []).append(patch)
    kept = []
    for members in windows.values():
        kept += sorted(members, key=lambda patch: (-shallow[patch], patch))[: num_tokens // 2 // len(windows)]
    rest = sorted(set(range(len(rows))) - set(kept), key=lambda patch: (-attention[patch], patch))
    kept = sorted(kept + rest[: num_tokens - len(kept)])
    groups = {patch: [rows[patch]] for patch in kept}
    for patch in set(range(len(rows))) - set(kept):
        groups[max(kept, key=lambda target: cosine(rows[patch], rows[target]))].append(rows[patch])
    return kept, [[sum(column) / len(groups[patch]) for column in zip(*groups[patch], strict=True)] for patch in kept]


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize(("grid", "window"), [((7, 9), 3), ((4, 5), 6), ((12, 12), 6)])
@pytest.mark.parametrize("num_tokens", [1, 7, 19])
def test_vscan_equals_plain_loops(has_cls, grid, window, num_tokens):
    """Also where the grid is no multiple of the window, and where half the budget is none of the windows' number."""
    vision = vision_output(has_cls, grid)
    result = vzip.VScan(vzip.TokenBudget(num_tokens, 0), window=window)(vision)
    for crop in range(2):
        kept, tokens = vscan_by_loops(vision, crop, num_tokens, window)
        assert (result.source_index[crop] - int(has_cls)).tolist() == kept
        torch.testing.assert_close(result.tokens[crop], torch.tensor(tokens, dtype=torch.float64), rtol=0, atol=1e-9)


def divprune_by_loops(rows, num_tokens, centered):
    count = len(rows)
    plain = [[cosine(a, b) for b in rows] for a in rows]
    mean = [sum(column) / count for column in zip(*rows, strict=True)]
    moved = [[x - m for x, m in zip(row, mean, strict=True)] for row in rows] if centered else rows
    distance = [[1 - cosine(a, b) for b in moved] for a in moved]
    weight = [1.0] * count
    if centered:
        others = [-sum(plain[i][j] for j in range(count) if j != i) / (count - 1) for i in range(count)]
        weight = [(value - min(others)) / (max(others) - min(others)) for value in others]
    kept = [max(range(count), key=lambda i: min(distance[i][j] for j in range(count) if j != i))]
    while len(kept) < num_tokens:
        left = [i for i in range(count) if i not in kept]
        kept.append(max(left, key=lambda i: weight[i] * min(distance[i][j] for j in kept)))
    return sorted(kept)


@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no_cls"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 63])
def test_divprune_equals_plain_loops(has_cls, centered, num_tokens):
    vision = vision_output(has_cls, seed=3)
    result = vzip.DivPrune(vzip.TokenBudget(num_tokens, 0), centered=centered)(vision)
    for crop in range(2):
        rows = (2 * vision.hidden[crop, int(has_cls) :] + 1).tolist()
        assert (result.source_index[crop] - int(has_cls)).tolist() == divprune_by_loops(rows, num_tokens, centered)


def test_divprune_keeps_as_many_of_an_image_that_is_all_one_colour():
    vision = VisionOutput(torch.ones(1, 64, 5), False, (8, 8))
    assert vzip.DivPrune(vzip.TokenBudget(10, 0))(vision).source_index.unique().numel() == 10


def test_patches_that_show_nothing_come_last():
    """With `valid`, padding is kept only where there is not enough else; the rest is chosen as if it were not there."""
    valid = torch.ones(2, 64, dtype=torch.bool)
    valid[:, 1:50] = False
    for kind in (vzip.VisionZip, vzip.DominantOnly, vzip.FasterVLM):
        vision = vision_output(valid=valid)
        if kind is vzip.VisionZip:
            vision = VisionOutput(vision.hidden, True, vision.grid, vision.attention, vision.hidden, valid=valid)
        kept = kind(vzip.TokenBudget(9, 0))(vision).source_index
        assert ((kept == 0) | (kept >= 50)).all(), kind
        many = kind(vzip.TokenBudget(20, 0))(vision).source_index
        assert all(set(range(50, 64)) <= set(crop.tolist()) for crop in many), kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda budget: vzip.VScan(budget, window=0), r"compressor\.window=0: must be a whole number"),
        (lambda budget: vzip.VScan(budget, local_layer=1.5), r"layer 1\.5 of signal attention: must be a whole number"),
        (lambda budget: vzip.DivPrune(budget, centered="yes"), r"compressor\.centered='yes': must be true or false"),
    ],
)
def test_values_that_cannot_be(make, message):
    with pytest.raises(ConfigError, match=message):
        make(vzip.TokenBudget(5, 0))
