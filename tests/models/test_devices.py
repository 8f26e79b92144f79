"""Models spread over devices: taps where the tower is, visual tokens where the language model is, weights parked away.

Without GPUs there are two ways to force a split. Weights are parked (offloaded) and fetched module by module, which
computes real numbers; and the projector and language model are put on torch's ``meta`` device, which refuses to mix
with the CPU as a second GPU would, but holds no numbers. What neither shows: copies between two GPUs, and the split
that ``device_map="auto"`` chooses; ``tests/gpu/test_placement.py`` is for those.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from PIL import Image
from tests import mgm_layout, tiny, tiny_mini_gemini
from tests.families import FAMILIES

import vzip
from vzip.models.devices import execution_device, first_device, sent

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
COMPRESSORS = [vzip.VisionZip(BUDGET), vzip.Identity()]
TEXT_PARTS = ("model.language_model", "lm_head")
# Under the names of all families: a model has some of these.
TOWERS = ("vision_tower", "image_tower", "video_tower", "high_res_tower", "patch_info_mining", "multi_modal_projector")
VISION_PARTS = tuple(f"model.{part}" for part in TOWERS)
each_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
each_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=["visionzip", "none"])


def prompt(family: tiny.Family) -> torch.Tensor:
    return torch.tensor([[5, family.token, 6, family.token, 7]])


def split(model: torch.nn.Module, there: tuple[str, ...], device: str, **options: Any) -> torch.nn.Module:
    """Dispatches the parts named ``there`` to a device and the others to the CPU, as ``device_map={...}`` does."""
    names = [f"model.{name}" for name, _ in model.get_submodule("model").named_children()] + ["lm_head"]
    names += [f"model.{name}" for name, _ in model.get_submodule("model").named_parameters(recurse=False)]
    device_map = {name: device if name in there else "cpu" for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        return dispatch_model(model, device_map, **options)


def devices_of(model: torch.nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


class Spy(vzip.VisionZip):
    """Remembers where it was given its input."""

    def __call__(self, vision: vzip.VisionOutput) -> vzip.CompressedTokens:
        self.devices = {vision.hidden.device.type, vision.attention.device.type, vision.keys.device.type}
        return super().__call__(vision)


@torch.no_grad()
@each_family
@each_compressor
def test_weights_that_are_all_parked_away_give_the_same_numbers(family, compressor) -> None:
    inputs, ids = family.inputs(2), prompt(family)
    whole = vzip.CompressedVlm(family.build(), compressor)
    parked = vzip.CompressedVlm(cpu_offload(family.build(), execution_device="cpu"), compressor)
    assert devices_of(parked.model) == {"meta"} and parked.device == torch.device("cpu")
    assert torch.equal(parked.forward(ids, **inputs).logits, whole.forward(ids, **inputs).logits)
    assert parked.last_num_visual_tokens == whole.last_num_visual_tokens
    new = [vlm.generate(ids, **inputs, max_new_tokens=4) for vlm in (parked, whole)]
    assert torch.equal(*new)
    assert devices_of(parked.model) == {"meta"}  # fetched for a module's call, and no longer


@torch.no_grad()
@each_family
@pytest.mark.parametrize("on_disk", [TEXT_PARTS, VISION_PARTS], ids=["text", "vision"])
def test_a_part_on_disk_gives_the_same_numbers(family, on_disk, tmp_path) -> None:
    inputs, ids = family.inputs(2), prompt(family)
    whole = vzip.CompressedVlm(family.build(), COMPRESSORS[0])
    model = split(family.build(), on_disk, "disk", main_device="cpu", offload_dir=tmp_path)
    vlm = vzip.CompressedVlm(model, COMPRESSORS[0])
    assert devices_of(model) == {"cpu", "meta"} and vlm.device == torch.device("cpu")
    assert torch.equal(vlm.forward(ids, **inputs).logits, whole.forward(ids, **inputs).logits)


@torch.no_grad()
@each_family
@pytest.mark.parametrize("there", [TEXT_PARTS, (*TEXT_PARTS, "model.multi_modal_projector")], ids=["text", "both"])
def test_taps_stay_with_the_tower_and_visual_tokens_go_to_the_language_model(family, there) -> None:
    inputs, ids = family.inputs(2), prompt(family)
    spy = Spy(BUDGET)
    expected = vzip.CompressedVlm(family.build(), spy).prepare(ids, **inputs)
    vlm = vzip.CompressedVlm(split(family.build(), there, "meta", main_device="cpu"), spy)
    prepared = vlm.prepare(ids, **inputs, labels=ids)
    chosen = "meta" if family.pools and "model.multi_modal_projector" in there else "cpu"
    assert spy.devices == {chosen} and vlm.device == torch.device("meta")
    for tensor in (prepared.inputs_embeds, prepared.attention_mask, prepared.position_ids, prepared.labels):
        assert tensor.device == torch.device("meta")
        assert tensor.shape[:2] == expected.inputs_embeds.shape[:2]
    assert prepared.num_visual_tokens == expected.num_visual_tokens


def test_a_dialogue_over_parked_weights_is_the_same() -> None:
    processor = tiny.processor()
    answers = []
    for model in (tiny.llava(vocab_size=320), cpu_offload(tiny.llava(vocab_size=320), execution_device="cpu")):
        chat = vzip.CompressedVlm(model, COMPRESSORS[0], processor).chat()
        chat.ask("a", [Image.new("RGB", (40, 40), "red")], max_new_tokens=4)
        answers.append([chat.ask("b", max_new_tokens=4), chat.num_cached_tokens, chat.messages])
    assert answers[0] == answers[1]


@torch.no_grad()
def test_a_checkpoint_is_loaded_onto_a_map_of_devices(tmp_path) -> None:
    model = tiny.llava_next(vocab_size=320)
    model.save_pretrained(tmp_path)
    inputs, ids = tiny.next_inputs(1), torch.tensor([[5, tiny.IMAGE_TOKEN, 6]])
    expected = vzip.CompressedVlm(model, COMPRESSORS[0]).forward(ids, **inputs).logits
    for device_map in ("auto", "cpu", {"": "cpu"}):
        vlm = vzip.load_vlm(tmp_path, device_map=device_map, dtype="float32", compressor=COMPRESSORS[0])
        assert torch.equal(vlm.forward(ids, **inputs).logits.cpu(), expected) or torch.cuda.is_available()


@torch.no_grad()
def test_the_published_layout_of_mini_gemini_is_loaded_onto_a_map_of_devices(tmp_path) -> None:
    model = tiny_mini_gemini.mini_gemini(vocab_size=mgm_layout.VOCABULARY)
    directory = mgm_layout.save_all(model, tmp_path)
    inputs, ids = tiny_mini_gemini.inputs(1), torch.tensor([[5, mgm_layout.VOCABULARY, 6]])
    expected = vzip.load_vlm(directory, compressor=COMPRESSORS[0]).forward(ids, **inputs).logits
    for device_map in ("auto", {"": "cpu"}):
        vlm = vzip.load_vlm(directory, device_map=device_map, compressor=COMPRESSORS[0])
        assert torch.equal(vlm.forward(ids, **inputs).logits.cpu(), expected) or torch.cuda.is_available()


def test_the_device_of_a_module_without_hooks_is_its_weights() -> None:
    assert execution_device(torch.nn.Linear(1, 1, device="meta")) == torch.device("meta")
    assert execution_device(torch.nn.Linear(1, 1)) == torch.device("cpu")


class OnTheHost:
    """A tensor that tells how it is sent."""

    device = torch.device("cpu")

    def __init__(self, is_pinned: bool = False) -> None:
        self.is_pinned = is_pinned

    def pin_memory(self) -> OnTheHost:
        return OnTheHost(is_pinned=True)

    def to(self, device: torch.device, non_blocking: bool = False) -> tuple[bool, str, bool]:
        return self.is_pinned, device.type, non_blocking


def test_a_gpu_is_sent_pinned_memory_and_not_waited_for() -> None:
    tensors: Any = {"pixel_values": OnTheHost()}
    assert sent(tensors, torch.device("cuda")) == {"pixel_values": (True, "cuda", True)}
    assert sent(tensors, torch.device("cpu")) == {"pixel_values": (False, "cpu", False)}
    there = torch.zeros(2, device="meta")  # on a device already: nothing to pin
    assert sent({"x": there}, torch.device("meta"))["x"] is there


def test_the_device_that_a_map_will_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {first_device(name).type for name in (None, "auto", {"": 0}, "cpu", {})} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [str(first_device(name)) for name in (None, "cpu", "auto", "cuda:1", {"": 0}, {"model": "cpu"})]
    assert found == ["cpu", "cpu", "cuda", "cuda:1", "cuda", "cpu"]
