"""Training the mergers of Qwen2.5-VL and Qwen3-VL: the stock model's loss and gradients, whole runs, labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import make_random_model
from tests import tiny_qwen, tiny_qwen3
from tests.tiny_qwen import batch as padded
from tests.tiny_qwen import images, prompt, stock
from tests.train.kit import LORA, Samples

import vzip
from vzip.bench.memory.estimate import estimate_training
from vzip.bench.memory.measure import measure_training
from vzip.bench.memory.model_shape import ModelShape
from vzip.bench.memory.workload import Workload
from vzip.data.collate import Batch, Collator, TrainingSample
from vzip.data.conversations import chat
from vzip.data.llava_record import Turn
from vzip.errors import ConfigError, UnsupportedModelError
from vzip.models.families import Qwen3VlAdapter
from vzip.models.freeze import train_projector_only
from vzip.models.weights.tuned import read_tensors
from vzip.train.loop import train
from vzip.train.objective import AnswerLoss, ModelView

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
ROWS = (prompt(5, "6x10", 7, 9, 11), prompt(8, "8x8", 3, "12x16", 6, 7, 8, 10), [4, 5, 6])
GRIDS = ("6x10", "8x8", "12x16")


@pytest.fixture(scope="module", params=[tiny_qwen, tiny_qwen3], ids=["qwen2_5_vl", "qwen3_vl"])
def model(request: Any) -> Any:
    return request.param.build()


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def checkpoint(request: Any, tmp_path_factory: Any) -> Path:
    directory: Path = tmp_path_factory.mktemp("random") / request.param
    make_random_model.save(request.param, directory)
    return directory


def answers(rows: list[torch.Tensor]) -> torch.Tensor:
    """The last two words of each prompt are learned, the others not."""
    labels = torch.full((len(rows), max(map(len, rows))), -100)
    for row, ids in enumerate(rows):
        labels[row, len(ids) - 2 : len(ids)] = ids[-2:]
    return labels


def batch_of(vlm: vzip.CompressedVlm, *, expanded: bool = False) -> Batch:
    """``ROWS`` as the collator has them: a placeholder an image, padded on the right."""
    rows = [prompt(5, "6x10", 7, 9, 11, expanded=expanded)]
    rows += [prompt(8, "8x8", 3, "12x16", 6, 7, 8, 10, expanded=expanded), [4, 5, 6]]
    ids, labels = padded(*rows, side="right"), answers([torch.tensor(row) for row in rows])
    inputs = images(*GRIDS)
    counts = vlm.expected_num_visual_tokens(**inputs)
    return Batch(["a", "b", "c"], [0, 1, 2], **ids, labels=labels, images=inputs, image_of=[0, 1, 2],
                 num_visual_tokens=counts)  # fmt: skip


def test_uncompressed_loss_and_gradients_are_the_stock_models(model: Any) -> None:
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    names = train_projector_only(model)
    assert names and all("merger" in name for name in names)
    assert any("deepstack" in name for name in names) == vlm.adapter.has_planes
    own = {name: model.get_parameter(name) for name in names}
    nats = AnswerLoss(vlm)(batch_of(vlm))
    ours = torch.autograd.grad(nats.sum() / 6, [*own.values()])

    whole = padded(*ROWS, side="right")
    inputs = stock(model, whole, **images(*GRIDS))
    loss = model(**inputs, labels=answers([torch.tensor(row) for row in ROWS])).loss
    torch.testing.assert_close(nats.sum() / 6, loss, rtol=1e-5, atol=0)
    for name, mine, theirs in zip(names, ours, torch.autograd.grad(loss, [*own.values()]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_each_conversation_is_learned_as_by_itself(model: Any) -> None:
    """At a budget, the loss is the public forward's of each row; what is asked about one image is summed."""
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    whole = batch_of(vlm)
    nats = AnswerLoss(vlm)(whole).detach()
    taken = [images("6x10"), images("8x8", "12x16"), {}]
    for row, inputs in enumerate(taken):
        length = int(whole.attention_mask[row].sum())
        own = {"input_ids": whole.input_ids[row : row + 1, :length], "labels": whole.labels[row : row + 1, :length]}
        torch.testing.assert_close(nats[row], 2 * vlm.forward(**own, **inputs).loss.detach(), rtol=1e-4, atol=1e-5)
    twice = Batch(["a"], [0, 0], whole.input_ids[[0, 0]], whole.attention_mask[[0, 0]], whole.labels[[0, 0]],
                  images("6x10"), [0, 0], [BUDGET.num_tokens])  # fmt: skip
    torch.testing.assert_close(AnswerLoss(vlm)(twice).detach(), 2 * nats[:1], rtol=1e-4, atol=1e-5)


class Sized(Samples):
    """Images of two sizes."""

    def __getitem__(self, index: int) -> TrainingSample:
        sample = super().__getitem__(index)
        sizes = [image.resize((150, 90)) if index % 2 else image for image in sample.images]  # type: ignore[union-attr]
        return TrainingSample(sample.id, sizes, sample.dialogues)


@pytest.mark.parametrize("lora", [None, LORA], ids=["projector", "projector_lora"])
def test_a_whole_training(checkpoint: Path, plan: Any, tmp_path: Path, lora: Any) -> None:
    """Mergers and LoRA layers alone change; what is saved is loaded again, and asked."""
    compressor = vzip.VisionZip(BUDGET)
    loaded = []

    def load(precision: str) -> vzip.CompressedVlm:
        loaded.append(vzip.load_vlm(checkpoint, compressor=compressor, dtype=precision))
        return loaded[-1]

    before = {name: tensor.clone() for name, tensor in vzip.load_vlm(checkpoint).model.state_dict().items()}
    final = train(plan(load_data=Sized, load_model=load, template=None, num_steps=2, max_length=120, lora=lora))
    after = {name: t for name, t in loaded[0].model.state_dict().items() if name in before}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed and all(".merger." in name or "deepstack_merger_list" in name for name in changed)
    tensors = read_tensors(final)
    assert changed <= set(tensors) and any("lora" in name for name in tensors) == (lora is not None)

    again = vzip.load_vlm(checkpoint, projector=final, compressor=compressor)
    assert all(torch.equal(again.model.state_dict()[name], after[name]) for name in changed)
    asked = again.build_inputs([f"{again.adapter.written_image} what"], [[Image.new("RGB", (150, 90), "red")]])
    answer = again.generate(**asked, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, loaded[0].eval().generate(**asked, max_new_tokens=3, do_sample=False))


def test_labels_are_the_assistants_turns_in_chatml(checkpoint: Path) -> None:
    vlm = vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET))
    collate = Collator(vlm.processor, ModelView(vlm), chat, None, vlm.adapter.image_token_id, 200)
    turns = [Turn("user", "<image>\nwhat"), Turn("assistant", "a star"), Turn("user", "sure"), Turn("assistant", "yes")]
    picture = Image.fromarray(np.zeros((90, 150, 3), dtype=np.uint8))
    batch = collate([TrainingSample("one", [picture], [turns])])
    tokenizer: Any = vlm.processor.tokenizer  # type: ignore[union-attr]
    learned = batch.labels[0][batch.labels[0] >= 0]
    assert tokenizer.decode(learned).replace(" ", "") == "astar<|im_end|>yes<|im_end|>"
    assert batch.input_ids[0].tolist().count(vlm.adapter.image_token_id) == 1
    assert batch.num_visual_tokens == [BUDGET.num_tokens]


def test_a_batch_without_images_reaches_every_merger(model: Any) -> None:
    """With zeros, where each process must have gradients of all that trains; blank images add nothing to a loss."""
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    own = [model.get_parameter(name) for name in train_projector_only(model)]
    text = Batch(["a"], [0], **padded([4, 5, 6], side="right"), labels=torch.tensor([[-100, 5, 6]]))
    plain = AnswerLoss(vlm)
    blank = AnswerLoss.__new__(AnswerLoss)
    blank.__dict__.update(plain.__dict__)
    blank.blank = {"image": images("4x4")}  # what always_whole makes with a processor
    for loss in (plain(text), blank(text)):
        torch.testing.assert_close(loss, plain(text))
        assert all(bool((grad == 0).all()) for grad in torch.autograd.grad(loss.sum(), own))
    none = torch.zeros(0, 0, dtype=torch.int64)
    empty = blank(Batch(["a"], [], none, none, none))
    assert empty.tolist() == [0] and all(bool((g == 0).all()) for g in torch.autograd.grad(empty.sum(), own))


def test_what_cannot_be_trained_is_said(checkpoint: Path, plan: Any) -> None:
    def load(precision: str) -> vzip.CompressedVlm:
        return vzip.load_vlm(checkpoint, compressor=vzip.VisionZip(BUDGET), dtype=precision)

    class Videos(Samples):
        def __getitem__(self, index: int) -> TrainingSample:
            turns = [Turn("user", "<video>\nwhat"), Turn("assistant", "x")]
            return TrainingSample(f"s{index}", [], [turns], ["clip.mp4"])

    with pytest.raises(ConfigError, match=r"train\.template=vicuna_v1: .*Set train\.template=chat"):
        train(plan("vicuna", load_model=load, template="vicuna_v1"))
    with pytest.raises(UnsupportedModelError, match=r"sample s\d+: has a video, and this model's training"):
        train(plan("videos", load_data=Videos, load_model=load, template=None))


def test_memory_is_estimated_as_it_is_measured(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the family whose planes are added inside the language model; images smaller than usual, to be quick."""
    blank = {"pixel_values": torch.ones(256, 3 * 2 * 16**2), "image_grid_thw": torch.tensor([[1, 16, 16]])}
    monkeypatch.setattr(Qwen3VlAdapter, "blank_images", lambda _self, _num: blank)
    whole = plan(template=None, batch_size=1, samples_per_step=1, gradient_checkpointing=True)
    model, _ = make_random_model.build("qwen3_vl")
    shape, load = ModelShape(model.config, vzip.VisionZip(BUDGET)), Workload(1, 1, 200)
    estimated = estimate_training(shape, whole.train, whole.launch, load).total()
    measured = measure_training(vzip.CompressedVlm(model, shape.compressor), whole.train, whole.launch, load)
    assert estimated == pytest.approx(measured, rel=0.05)


def test_quantized_the_language_model_alone_and_the_mergers_train(checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes")
    vlm = vzip.load_vlm(
        checkpoint,
        compressor=vzip.VisionZip(BUDGET),
        quantization="4bit",
        dtype="float32",
        device_map={"": "cpu"},
        pruner=vzip.FastV(1, 4),
    )
    kinds = {
        (name.startswith("model.visual."), type(module).__name__)
        for name, module in vlm.model.named_modules()
        if "Linear" in type(module).__name__ and name != "lm_head"
    }
    assert kinds == {(True, "Linear"), (False, "Linear4bit")}
    asked = vlm.build_inputs([f"{vlm.adapter.written_image} what"], [[Image.new("RGB", (150, 90), "red")]])
    vlm.generate(**asked, max_new_tokens=2)
    assert vlm.last_pruned.visual_schedule == [[BUDGET.num_tokens, 4]]  # type: ignore[union-attr]
    assert all("merger" in name for name in train_projector_only(vlm.model))
