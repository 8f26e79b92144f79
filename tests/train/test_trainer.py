"""``CompressedVlm`` as the model of transformers' ``Trainer``: what it learns, keeps and takes up again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests import tiny
from tests.train.kit import BUDGET, Samples, load_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import vzip
from vzip.data.collate import Collator, TrainingSample
from vzip.data.conversations import TEMPLATES, find_template
from vzip.data.llava_record import Turn
from vzip.errors import CheckpointError, ConfigError, PromptError, UnsupportedModelError
from vzip.models.families import Adapter
from vzip.train.objective import AnswerLoss, ModelView
from vzip.train.trainer import as_sample

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def arguments(folder: Path, **change: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        **change,
    }
    return TrainingArguments(**settings)


def model() -> vzip.CompressedVlm:
    vlm = load_model()
    vzip.train_projector_only(vlm.model)
    return vlm


def trainer(vlm: vzip.CompressedVlm, folder: Path, data: Any = None, **change: Any) -> Trainer:
    return Trainer(
        model=vlm,
        args=arguments(folder, **change),
        train_dataset=Samples(12) if data is None else data,
        data_collator=vzip.TrainerCollator(vlm, "vicuna_v1", max_length=200),
    )


def own_loss(vlm: vzip.CompressedVlm, samples: list[TrainingSample]) -> tuple[Tensor, int]:
    """The summed loss of ``train.py``'s own loop, and its target tokens."""
    assert vlm.processor is not None
    template = find_template("vicuna_v1")
    batch = Collator(vlm.processor, ModelView(vlm), template, None, tiny.IMAGE_TOKEN, 200)(samples)
    return AnswerLoss(vlm)(batch).sum(), batch.num_targets


def projector_of(vlm: vzip.CompressedVlm) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in vlm.adapter.projector.named_parameters()}


@pytest.mark.parametrize("numbers", [[1, 2, 3], [5, 0], [7, 4, 14]])  # with images; text alone; two questions an image
def test_the_loss_is_that_of_our_own_loop(numbers: list[int]) -> None:
    vlm, samples = model(), [Samples(15)[number] for number in numbers]
    inputs = vzip.TrainerCollator(vlm, "vicuna_v1", max_length=200)(samples)
    output = vlm(**inputs)
    total, num_targets = own_loss(vlm, samples)
    assert num_targets == int((inputs["labels"] != -100).sum()) > 5
    torch.testing.assert_close(output.loss, total / num_targets, rtol=1e-5, atol=0)
    torch.testing.assert_close(vlm(**inputs, num_items_in_batch=100).loss, total / 100, rtol=1e-5, atol=0)
    assert output.logits.shape[0] == len(inputs["input_ids"])


@pytest.mark.parametrize("family", tiny.FAMILIES, ids=str)
def test_every_family_divides_by_the_tokens_of_the_step(family: tiny.Family) -> None:
    tower, strategy = family.kinds[0]
    hf_model = family.build(tower=tower, strategy=strategy)
    vlm = vzip.CompressedVlm(hf_model, vzip.Identity()).train()
    vzip.train_projector_only(hf_model)
    ids = torch.tensor([[1, family.token, 8, 9, 10]])
    labels = ids.masked_fill(ids < 9, -100)  # two targets
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **family.inputs(1)}
    loss = vlm(**inputs).loss
    torch.testing.assert_close(vlm(**inputs, num_items_in_batch=torch.tensor(8)).loss, loss * 2 / 8)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in vlm.adapter.projector.parameters())


def test_only_the_projector_moves(tmp_path: Path) -> None:
    vlm = model()
    before = {name: tensor.clone() for name, tensor in vlm.model.state_dict().items()}
    trainer(vlm, tmp_path).train()
    moved = {name for name, tensor in vlm.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name} and len(moved) == 4


class InOrder(Trainer):
    """Takes the samples as they come, so that a plain computation can know a step's."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_accumulated_batches_weigh_every_token_the_same(tmp_path: Path, batch_size: int) -> None:
    """Six samples of unlike lengths, some without images: a step equals the plain sum over all, one by one."""
    plain = model()
    losses = [own_loss(plain, [Samples()[number]]) for number in range(6)]
    (sum(total for total, _ in losses) / sum(count for _, count in losses)).backward()  # type: ignore[union-attr]
    assert len({count for _, count in losses}) > 3
    expected = {name: p.detach() - 1e-2 * p.grad for name, p in plain.adapter.projector.named_parameters()}
    vlm = model()
    settings = arguments(
        tmp_path, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=6 // batch_size
    )
    collator = vzip.TrainerCollator(vlm, "vicuna_v1", max_length=200)
    InOrder(model=vlm, args=settings, train_dataset=Samples(), data_collator=collator).train()
    for name, parameter in vlm.adapter.projector.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError):  # the step is not small beside the tolerance
        torch.testing.assert_close(projector_of(vlm), projector_of(model()), rtol=1e-4, atol=1e-6)


def logits(vlm: vzip.CompressedVlm) -> Tensor:
    ids = torch.tensor([[1, tiny.IMAGE_TOKEN, 8, 9, 10]])
    vlm.eval()
    with torch.no_grad():
        return vlm(ids, torch.ones_like(ids), pixel_values=tiny.pixels(1)).logits


def test_what_was_trained_is_written_alone_and_read_back(tmp_path: Path) -> None:
    base = tmp_path / "base"
    load_model().model.save_pretrained(base)
    tiny.processor().save_pretrained(base)
    vlm = vzip.load_vlm(base, compressor=vzip.VisionZip(BUDGET))
    untrained = logits(vlm)
    vzip.train_projector_only(vlm.model)
    trainer(vlm, tmp_path / "out").train()
    for _ in range(2):  # over what it wrote itself, too
        vlm.save_pretrained(tmp_path / "tuned")
    there = vzip.load_vlm(base, compressor=vzip.VisionZip(BUDGET), projector=tmp_path / "tuned")
    assert torch.equal(logits(there), logits(vlm)) and not torch.equal(logits(there), untrained)
    header = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert header["parts"] == ["projector"] and header["num_parameters"] == 2112
    assert header["base"]["name_or_path"] == str(base) and header["compressor"] == repr(vlm.compressor)


def test_the_built_in_model_is_named_and_not_its_place(tmp_path: Path) -> None:
    vlm = vzip.load_vlm("vzip/tiny")
    vzip.train_projector_only(vlm.model)
    vlm.save_pretrained(tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "tuned.json").read_text())["base"]["name_or_path"] == "vzip/tiny"


def test_an_interrupted_training_goes_on(tmp_path: Path) -> None:
    """Two steps, then two more from the checkpoint, equal four; the checkpoint holds the projector alone."""
    settings = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    whole = model()
    trainer(whole, tmp_path / "whole", max_steps=4, **settings).train()
    trainer(model(), tmp_path / "parts", **settings).train()
    checkpoint = tmp_path / "parts" / "checkpoint-2"
    held = load_file(checkpoint / "model.safetensors")
    assert len(held) == 4 and all("multi_modal_projector" in name for name in held)
    resumed = model()
    trainer(resumed, tmp_path / "parts", max_steps=4, **settings).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(p, projector_of(whole)[name]) for name, p in projector_of(resumed).items())
    assert not torch.equal(
        held["model.model.multi_modal_projector.linear_1.weight"], projector_of(whole)["linear_1.weight"]
    )


def test_the_state_of_a_training_is_what_trains() -> None:
    vlm = load_model()
    everything = {f"model.{name}" for name in vlm.model.state_dict()}
    assert set(vlm.state_dict()) == everything  # nothing is frozen yet
    vzip.train_projector_only(vlm.model)
    state = vlm.state_dict()
    assert len(state) == 4 and set(state) < everything
    around = AnswerLoss(vlm)
    assert set(around.state_dict()) == {f"vlm.{name}" for name in state}
    vlm.load_state_dict(state)  # strict, and nothing is missed
    around.load_state_dict(around.state_dict())
    name = next(iter(state))
    with pytest.raises(RuntimeError, match=name):
        vlm.load_state_dict({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(RuntimeError, match="unexpected"):
        vlm.load_state_dict({**state, "unexpected": torch.zeros(1)})
    vlm.model.requires_grad_(False)
    assert set(vlm.state_dict()) == everything


def test_a_batch_of_text_gives_the_projector_a_gradient_of_zero() -> None:
    vlm = model().train()
    vlm(**vzip.TrainerCollator(vlm, "vicuna_v1", max_length=200)([Samples()[5]])).loss.backward()
    gradients = [p.grad for p in vlm.adapter.projector.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointed_gradients_are_the_same(name: str) -> None:
    found = []
    for enabled in (False, True):
        vlm = model().train()
        if not hasattr(vlm.model, f"{name}_enable"):
            pytest.skip("of newer versions of transformers")
        assert not vlm.is_gradient_checkpointing
        if enabled:
            getattr(vlm, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
            assert vlm.is_gradient_checkpointing
        vlm(**vzip.TrainerCollator(vlm, "vicuna_v1", max_length=200)([Samples()[1], Samples()[2]])).loss.backward()
        found.append([p.grad for p in vlm.adapter.projector.parameters()])
        if enabled:
            getattr(vlm, f"{name}_disable")()
            assert not vlm.is_gradient_checkpointing
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_trainer_itself_checkpoints_gradients_and_evaluates(tmp_path: Path) -> None:
    vlm = model()
    change = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    learner = trainer(vlm, tmp_path, prediction_loss_only=True, per_device_eval_batch_size=5, **change)
    learner.train()
    assert vlm.is_gradient_checkpointing
    found = learner.evaluate(Samples(5))
    vlm.eval()
    total, num_targets = own_loss(vlm, [Samples(5)[number] for number in range(5)])
    assert found["eval_loss"] == pytest.approx(float(total / num_targets), rel=1e-4)


def test_it_answers_as_the_model_does() -> None:
    vlm = load_model()
    assert vlm.config is vlm.model.config and vlm.generation_config is vlm.model.generation_config
    assert vlm.can_generate() and vlm.loss_type == vlm.model.loss_type == "ForConditionalGeneration"


def test_images_that_max_length_cuts_off_are_not_handed_on() -> None:
    vlm = model()
    turns = [
        Turn("user", "<image>\nhello"),
        Turn("assistant", "x" * 4),
        Turn("user", "<image> a"),
        Turn("assistant", "y"),
    ]
    images = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    samples = [TrainingSample("a", images, [turns]), TrainingSample("b", images[1:], [turns[:2]])]
    inputs = vzip.TrainerCollator(vlm, "vicuna_v1", max_length=50)(samples)
    kept = vlm.preprocess_images([images[0], images[1]])["pixel_values"]  # the first of "a", and that of "b"
    assert (inputs["input_ids"] == tiny.IMAGE_TOKEN).sum(dim=1).tolist() == [1, 1]
    assert torch.equal(inputs["pixel_values"], kept) and vlm(**inputs).loss.isfinite()


def test_samples_as_data_sets_on_the_hub_have_them(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 60), "red")
    expected = TrainingSample("7", [image], [[Turn("user", "<image>\nhi"), Turn("assistant", "yes")]])
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    for given in (
        {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}, answer]},
        {"messages": [{"role": "user", "content": "hi"}, answer]},
        {"messages": [{"role": "user", "content": "<image>\nhi"}, {"role": "assistant", "content": "yes"}]},
    ):
        assert as_sample({**given, "images": [image]}, 7) == expected
        assert as_sample({**given, "image": image, "id": 7}) == expected
    vlm = model()
    data = [{"messages": given["messages"], "images": [image]}] * 4
    trainer(vlm, tmp_path, data, remove_unused_columns=False).train()
    with pytest.raises(PromptError, match="remove_unused_columns=False"):
        trainer(vlm, tmp_path, data).train()


@pytest.mark.parametrize(
    "messages, match",
    [
        ([], "no list of messages"),
        ("hi", "no list of messages"),
        ([{"role": "system", "content": "x"}], "system_prompt"),
        (["hi"], "role None"),
        ([{"role": "user", "content": None}], "must be a text or an image"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "must be a text or an image"),
        ([{"role": "user", "content": "hi"}], "no message of an assistant"),
    ],
)
def test_odd_messages_are_refused(messages: Any, match: str) -> None:
    with pytest.raises(PromptError, match=rf"sample 3: .*{match}"):
        as_sample({"messages": messages}, 3)


@pytest.mark.parametrize("images", [Image.new("RGB", (4, 4)), "picture.png"])
def test_images_that_are_no_list_are_refused(images: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(PromptError, match=r"sample 3: images=.*must be a list"):
        as_sample({"messages": messages, "images": images}, 3)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    vlm = load_model()
    with pytest.raises(ConfigError, match=r"parameters beside the projector's train.*train_projector_only"):
        vlm.save_pretrained(tmp_path / "tuned")
    vlm.model.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing trains"):
        vlm.save_pretrained(tmp_path / "tuned")
    vlm = model()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other files"):
        vlm.save_pretrained(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="name a new directory"):
        vlm.save_pretrained(".")
    vlm.save_pretrained(tmp_path / "tuned", is_main_process=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_step_whose_answers_max_length_cuts_off_teaches_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vlm = model().train()
    turns = [Turn("user", "x" * 60), Turn("assistant", "y")]
    data = [TrainingSample(f"long{number}", [], [turns]) for number in range(4)]
    inputs = vzip.TrainerCollator(vlm, "vicuna_v1", max_length=30)(data[:2])
    assert (inputs["labels"] == -100).all() and "long0, long1; nothing is learned" in caplog.text
    for settings in ({}, {"num_items_in_batch": torch.tensor(0)}):
        loss = vlm(**inputs, **settings).loss
        assert loss == 0
        loss.backward()
    before = projector_of(vlm)
    run = Trainer(
        model=vlm,
        args=arguments(tmp_path),
        train_dataset=data,
        data_collator=vzip.TrainerCollator(vlm, "vicuna_v1", max_length=30),
    )
    run.train()
    assert all(math.isfinite(one["loss"]) for one in run.state.log_history if "loss" in one)
    assert all(torch.equal(tensor, before[name]) for name, tensor in projector_of(vlm).items())


def test_what_cannot_be_collated_is_refused() -> None:
    vlm = load_model()
    with pytest.raises(ConfigError, match="has no processor"):
        vzip.TrainerCollator(vzip.CompressedVlm(vlm.model, vlm.compressor))
    with pytest.raises(ConfigError, match=r"train\.template=vicuna: must be one of .*vicuna_v1.*did you mean") as told:
        vzip.TrainerCollator(vlm, "vicuna")
    assert "own chat template" not in str(told.value)
    assert set(TEMPLATES) == set(Adapter.templates)
    with pytest.raises(PromptError, match="a batch of no sample"):
        vzip.TrainerCollator(vlm)([])
    frames = [Image.new("RGB", (40, 40))] * 2
    sample = TrainingSample("v", [], [[Turn("user", "<video> a"), Turn("assistant", "b")]], [frames])
    with pytest.raises(UnsupportedModelError, match="sample v: has a video"):
        vzip.TrainerCollator(vlm)([sample])


def test_a_half_precision_model_trains_in_float32(tmp_path: Path) -> None:
    vlm = load_model()
    vlm.model.to(torch.bfloat16)
    names = vzip.train_projector_only(vlm.model, in_float32=True)
    kinds = {name: p.dtype for name, p in vlm.model.named_parameters()}
    assert {kinds[name] for name in names} == {torch.float32}
    assert {kind for name, kind in kinds.items() if name not in names} == {torch.bfloat16}
    before = projector_of(vlm)
    trainer(vlm, tmp_path, bf16=True, learning_rate=1e-4).train()
    assert all(not torch.equal(before[name], p) for name, p in projector_of(vlm).items())
