"""The built-in model's training: packing equals asking one by one, resuming equals never having stopped."""

import json

import numpy as np
import pytest
import torch
from scripts.tiny import train as train_tiny
from scripts.tiny.labels import NUM_PATCH_LABELS
from scripts.tiny.model import build_model, build_processor, prompt
from scripts.tiny.objective import NUM_QUESTIONS, Heads, answer_logits, cls_gathers, losses, make_batch, run_tower
from scripts.tiny.packing import Packer
from scripts.tiny.questions import training_questions
from scripts.tiny.train import Stage

from vzip.demo.scenes import sample_scene


@pytest.fixture(scope="module")
def processor():
    return build_processor(train_tiny.tokenizer_texts(num_scenes=200))


@pytest.fixture(scope="module")
def model(processor):
    return build_model(processor, seed=3).eval()


@torch.no_grad()
def test_packed_questions_equal_stock_single_question_prompts(model, processor):
    """The stock forward of transformers, one question at a time, is the independent second way."""
    packer = Packer(processor.tokenizer)
    batch = make_batch([11, 12], 336, packer)
    _, selected, _ = run_tower(model, batch.pixel_values)
    packed = answer_logits(model, selected, batch.packed)
    scenes = [sample_scene(seed) for seed in (11, 12)]
    start = 0
    for row, scene in enumerate(scenes):
        for question in training_questions(scene, np.random.RandomState(scene.seed ^ 0xA5C), NUM_QUESTIONS):
            text = f"{prompt(question.text)} {question.answer}</s>"
            ids = processor.tokenizer(text.replace("<image>", "<image>" * 576), return_tensors="pt").input_ids
            asked = processor.tokenizer(prompt(question.text)).input_ids
            stock = model(input_ids=ids, pixel_values=batch.pixel_values[row : row + 1]).logits[0]
            count = ids.shape[1] - (len(asked) + 575)
            expected = stock[ids.shape[1] - count - 1 : -1]
            torch.testing.assert_close(packed[start : start + count], expected, atol=2e-5, rtol=1e-4)
            assert batch.packed.answer_ids[start : start + count].tolist() == ids[0, -count:].tolist()
            start += count
    assert start == len(packed)


@torch.no_grad()
def test_what_cls_gathers_equals_eager(model, processor):
    """The layer's own attention, on values that are zero for CLS itself, is the independent second way."""
    batch = make_batch([5], 336, Packer(processor.tokenizer))
    layer_input, _, _ = run_tower(model, batch.pixel_values)
    eager = build_model(processor, seed=3).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    attention, gathered = cls_gathers(model, layer_input)
    maps = eager.model.vision_tower(batch.pixel_values, output_attentions=True).attentions[-2]
    torch.testing.assert_close(attention, maps[:, :, 0, 1:], atol=1e-6, rtol=1e-5)
    block = eager.model.vision_tower.encoder.layers[-2]
    hook = block.self_attn.v_proj.register_forward_hook(lambda _, __, out: out.index_fill(1, torch.tensor([0]), 0))
    expected = block.self_attn(block.layer_norm1(layer_input), attention_mask=None)[0][:, 0]
    hook.remove()
    torch.testing.assert_close(gathered, expected, atol=1e-6, rtol=1e-5)


def test_every_loss_reaches_what_it_should_train(model, processor):
    heads = Heads(len(processor.tokenizer))
    batch = make_batch([21, 22, 23], 168, Packer(processor.tokenizer))
    terms = losses(model, heads, batch, processor.tokenizer)
    assert set(terms) == {"answers", "contrast", "named", "gathered", "shows", "letter"}
    assert batch.labels.max() < NUM_PATCH_LABELS

    def touched(term, parameter):
        (grad,) = torch.autograd.grad(term, [parameter], retain_graph=True, allow_unused=True)
        return grad is not None and bool(grad.abs().sum() > 0)

    projector = model.model.multi_modal_projector.linear_1.weight
    patches = model.model.vision_tower.embeddings.patch_embedding.weight
    last = model.model.vision_tower.encoder.layers[-1].mlp.fc1.weight
    assert touched(terms["answers"], projector) and touched(terms["answers"], patches)
    assert not touched(terms["answers"], last)  # the language model reads layer -2
    assert touched(terms["contrast"], last) and touched(terms["named"], last)
    assert touched(terms["gathered"], patches) and not touched(terms["gathered"], last)
    assert not touched(terms["shows"], projector) and touched(terms["shows"], patches)


@pytest.mark.whole
def test_a_killed_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    stages = (
        Stage(((112, 2),), 1, 1e-3, answers=False),
        Stage(((112, 2),), 1, 1e-3, vision=False),
        Stage(((168, 2), (112, 3)), 2, 1e-3),
    )
    options = {"stages": stages, "save_every": 2, "num_validation_images": 2}
    texts = train_tiny.tokenizer_texts(num_scenes=100)
    monkeypatch.setattr(train_tiny, "tokenizer_texts", lambda: texts)
    train_tiny.train(tmp_path / "whole", tmp_path / "whole_out", **options)

    calls = []

    def dies_at_step_four(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return make_batch(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_tiny, "make_batch", dies_at_step_four)
        with pytest.raises(KeyboardInterrupt):
            train_tiny.train(tmp_path / "cut", tmp_path / "cut_out", **options)
    train_tiny.train(tmp_path / "cut", tmp_path / "cut_out", **options)
    whole, cut = (torch.load(tmp_path / run / "state" / "state.pt", weights_only=True) for run in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    for part in ("model", "heads"):
        assert all(torch.equal(whole[part][k], cut[part][k]) for k in whole[part])
    logs = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("whole", "cut")]
    assert logs[0]["validation"] == logs[1]["validation"]
    assert (tmp_path / "cut_out" / "model.safetensors").stat().st_size < 12e6


def test_a_frozen_tower_stays_as_it_is(model, processor):
    batch = make_batch([21, 22], 112, Packer(processor.tokenizer))
    terms = losses(model, Heads(len(processor.tokenizer)), batch, processor.tokenizer, vision=False)
    assert set(terms) == {"answers"}
    model.zero_grad()
    terms["answers"].backward()
    assert all(p.grad is None for p in model.model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    assert all(p.grad is not None for p in model.model.language_model.parameters())


def test_a_batch_moves_whole(processor):
    batch = make_batch([21, 22], 112, Packer(processor.tokenizer))
    moved = batch.to(torch.device("meta"))
    for before, after in ((batch, moved), (batch.packed, moved.packed)):
        for name, value in vars(before).items():
            if isinstance(value, torch.Tensor):
                assert getattr(after, name).device.type == "meta" and getattr(after, name).shape == value.shape
    assert moved.captions == batch.captions and moved.packed.questions == batch.packed.questions
