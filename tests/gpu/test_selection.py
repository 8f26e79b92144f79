"""Which tokens are kept and merged does not depend on the device: float32, ties to the lower index."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.gpu.kit import each_device
from torch.nn import functional

import vzip
from vzip.compressors import VisionOutput
from vzip.models.devices import full_float32
from vzip.ops.merge import target_positions
from vzip.ops.select import remaining_rows

PAPER = vzip.TokenBudget(num_dominant=54, num_contextual=10)
NUM_CROPS, SIDE, KEY_WIDTH = 3, 24, 64


def vision(seed: int, has_cls: bool = True, num_levels: int | None = None) -> VisionOutput:
    """576 patches of noise; ``num_levels``: scores (and keys) take so few values that most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = SIDE * SIDE + int(has_cls)
    attention = torch.rand(NUM_CROPS, SIDE * SIDE, generator=generator)
    keys = torch.randn(NUM_CROPS, num_rows, KEY_WIDTH, generator=generator)
    if num_levels is not None:
        attention = (attention * num_levels).floor() / num_levels
        keys = functional.one_hot((torch.rand(NUM_CROPS, num_rows, generator=generator) * 4).long(), KEY_WIDTH).float()
    hidden = torch.randn(NUM_CROPS, num_rows, 32, generator=generator)
    return VisionOutput(hidden, has_cls, (SIDE, SIDE), attention=attention, keys=keys)


def moved(vision: VisionOutput, device: str) -> VisionOutput:
    tensors = {f.name: getattr(vision, f.name) for f in dataclasses.fields(vision)}
    there = {name: value.to(device) for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(vision, **there)


@each_device
@pytest.mark.parametrize("has_cls", [True, False], ids=["cls", "no cls"])
@pytest.mark.usefixtures("no_tf32")
def test_ties_go_to_the_lower_index(has_cls: bool, device: str) -> None:
    """Scores of five values and keys of four directions, so that nearly every choice is between equals."""
    given = vision(0, has_cls, num_levels=5)
    here, there = vzip.VisionZip(PAPER)(given), vzip.VisionZip(PAPER)(moved(given, device))
    assert there.source_index.device.type == device
    assert torch.equal(there.source_index.cpu(), here.source_index)
    assert torch.equal(there.merge_index.cpu(), here.merge_index)
    assert given.attention is not None
    for crop in range(NUM_CROPS):  # by hand: sorted by score, then by index
        order = sorted(range(SIDE * SIDE), key=lambda p: (-float(given.attention[crop, p]), p))  # type: ignore[index]
        own = [p + 1 for p in order[:53]] + [0] if has_cls else order[:54]
        assert there.source_index[crop].tolist() == sorted(own)


@each_device
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.usefixtures("no_tf32")
def test_indices_are_those_of_the_cpu(seed: int, device: str) -> None:
    """All of them where the two nearest targets differ by more than float32's rounding, which nearly all do."""
    given = vision(seed)
    here, there = vzip.VisionZip(PAPER)(given), vzip.VisionZip(PAPER)(moved(given, device))
    assert torch.equal(there.source_index.cpu(), here.source_index)
    rest = remaining_rows(here.source_index, SIDE * SIDE + 1)
    assert given.keys is not None
    rows = functional.normalize(given.keys.gather(1, rest[..., None].expand(-1, -1, KEY_WIDTH)), dim=-1)
    targets = rows[:, target_positions(rest.shape[1], 10, rest.device)]
    best, second = (rows @ targets.transpose(1, 2)).topk(2, dim=-1).values.unbind(-1)
    clear = best - second > 1e-5
    assert clear.float().mean() > 0.99
    ours, theirs = (tokens.merge_index.cpu().gather(1, rest) for tokens in (here, there))
    assert torch.equal(ours[clear], theirs[clear])
    if torch.equal(ours, theirs):
        torch.testing.assert_close(there.tokens.cpu(), here.tokens, rtol=1e-5, atol=1e-5)


@each_device
@torch.no_grad()
def test_a_trained_tower_selects_the_same_patches(device: str) -> None:
    """The built-in model in float32 on both: the same 54, but for patches whose scores are closer than rounding."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 3, 12, 12, generator=generator)
    pixels = functional.interpolate(coarse, size=(336, 336), mode="nearest")
    read, kept = {}, {}
    for place in ("cpu", device):
        vlm = vzip.load_vlm("vzip/tiny", dtype="float32", device_map={"": place})
        with full_float32():
            visual = vlm.adapter.read_inputs(pixel_values=pixels.to(place))
            output = vlm.adapter.image_output(visual, vzip.VisionZip(PAPER).reads())
        assert output.attention is not None
        read[place], kept[place] = output.attention.cpu(), vzip.VisionZip(PAPER)(output).source_index.cpu()
    torch.testing.assert_close(read[device], read["cpu"], rtol=1e-3, atol=1e-5)
    for crop in range(len(pixels)):
        lowest = read["cpu"][crop].sort(descending=True).values[52]
        differing = set(kept["cpu"][crop].tolist()) ^ set(kept[device][crop].tolist())
        assert all(abs(float(read["cpu"][crop, row - 1] - lowest)) < 1e-4 for row in differing)
        assert len(differing) <= 2


@each_device
@pytest.mark.parametrize("num_patches", [576, 2880])
def test_the_random_control_draws_the_same_patches(num_patches: int, device: str) -> None:
    side = {576: (24, 24), 2880: (48, 60)}[num_patches]
    given = VisionOutput(torch.zeros(2, num_patches, 4), False, side)
    control = vzip.RandomTokens(PAPER, seed=5)
    assert torch.equal(control(moved(given, device)).source_index.cpu(), control(given).source_index)


@each_device
def test_tf32_is_off_within_and_as_before_afterwards(device: str) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    a, b = (torch.rand(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    with pytest.raises(KeyError), full_float32():
        assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
        truth = a.double() @ b.double()
        product = (a.to(device) @ b.to(device)).cpu()
        kernel = b.view(256, 256, 1, 1).to(device)
        convolved = functional.conv2d(a.t().reshape(1, 256, 16, 16).to(device), kernel).cpu()
        raise KeyError
    assert (product - truth).abs().max() < 1e-3 / 4  # TF32 is off by about 5e-3 here
    expected = (b.double() @ a.t().double()).view(1, 256, 16, 16)
    assert (convolved - expected).abs().max() < 1e-3 / 4
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
