"""``train.share_images``: questions about an image in one row are learned as each in a prompt of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import make_random_model
from tests.train.commands import composed
from tests.train.kit import SETTINGS, dying_at, load_in_float64, load_model
from tests.train.runs import curve, finish

import vzip
from vzip.config.memory_plan import memory_plan
from vzip.config.training import checked, tuning_plan
from vzip.data.collate import Batch, Collator, TrainingSample
from vzip.data.conversations import find_template
from vzip.data.llava_record import Turn
from vzip.data.llava_set import LlavaSet
from vzip.data.order import draw_steps
from vzip.errors import ConfigError, UnsupportedModelError
from vzip.models.freeze import train_projector_only
from vzip.models.sharing import share_rows
from vzip.models.weights.from_config import FAMILIES
from vzip.train.loop import train
from vzip.train.objective import AnswerLoss, ModelView
from vzip.train.trainable import choose_trainable

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
WORDS = ("red", "a star", "sure it is a very long answer", "no", "seven or eight of them")


def noise(seed: int, width: int = 60) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (40, width, 3), dtype=np.uint8))


def sample(name: str, images: list[Any], num_questions: int, start: str = "<image>\n") -> TrainingSample:
    """Questions and answers of all lengths; the third is a dialogue of two turns."""
    dialogues = []
    for number in range(num_questions):
        turns = [Turn("user", start * len(images) + "what " * (1 + number % 4)), Turn("assistant", WORDS[number % 5])]
        turns += [Turn("user", "and then"), Turn("assistant", WORDS[number % 3])] if number == 2 else []
        dialogues.append(turns)
    return TrainingSample(name, images, dialogues)


def samples() -> list[TrainingSample]:
    """Many questions an image, one, none of images, two images."""
    return [
        sample("many", [noise(1)], 6),
        sample("one", [noise(2)], 1),
        sample("text", [], 2),
        sample("two images", [noise(3), noise(4)], 3),
        sample("few", [noise(5)], 2),
    ]


def collator(vlm: Any, share_images: bool, max_length: int = 200, template: str = "vicuna_v1") -> Collator:
    adapter = vlm.adapter
    video_token_id = adapter.video_token_id if adapter.learns_videos else None
    return Collator(vlm.processor, ModelView(vlm), find_template(template), None, adapter.image_token_id, max_length,
                    video_token_id=video_token_id, share_images=share_images)  # fmt: skip


def loss_and_gradients(vlm: Any, batch: Batch, weights: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Nats of each sample, and the gradients of their weighted sum."""
    projector = [p for p in vlm.model.parameters() if p.requires_grad]
    batch = dataclasses.replace(
        batch, images={n: t.to(vlm.model.dtype) if t.is_floating_point() else t for n, t in batch.images.items()}
    )
    nats = AnswerLoss(vlm)(batch)
    return nats.detach(), list(torch.autograd.grad((nats * weights).sum(), projector))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_length", [1000, 60, 40])
def test_loss_and_gradients_are_those_of_a_row_each(
    attention: str, max_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load_in_float64(monkeypatch)
    vlm.model.set_attn_implementation(attention)
    alone = collator(vlm, False, max_length)(samples())
    shared = collator(vlm, True, max_length)(samples())
    assert alone.rows is None and shared.rows is not None
    assert sorted(number for row in shared.rows for number in row) == list(range(14))
    assert shared.num_targets_by_sample == alone.num_targets_by_sample and shared.cut_off == alone.cut_off
    weights = torch.rand(5, dtype=torch.float64)  # as the counts of loss_norm=samples
    nats, gradients = loss_and_gradients(vlm, alone, weights)
    others, other_gradients = loss_and_gradients(vlm, shared, weights)
    torch.testing.assert_close(others, nats, rtol=1e-11, atol=0)
    for own, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-9, atol=1e-13)
    prepared = AnswerLoss(vlm).prepare(shared)
    rows = share_rows(prepared, shared.rows)
    assert int((rows.prompt_of >= 0).sum(dim=1).max()) <= max_length
    if max_length == 1000:
        assert shared.rows == [[0, 1, 2, 3, 4, 5], [6], [7], [8], [9, 10, 11], [12, 13]]
        taken, before = int((rows.prompt_of >= 0).sum()), int(prepared.attention_mask.sum())
        # Of six, three and two questions, all but one each save "USER: " and the 9 tokens of each image.
        spared = len("USER: ")
        assert before - taken == 5 * (spared + 9) + 2 * (spared + 9 + 1 + 9) + (spared + 9)
    # Two rows of two questions in 60 tokens; in 40 none, and the second of two images goes with all after it.
    assert [len(row) for row in shared.rows].count(2) == {1000: 1, 60: 2, 40: 0}[max_length]
    assert alone.cut_off == (["two images"] if max_length == 40 else [])


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_sees_what_it_sees_in_its_own_prompt(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits at each token of rows, against the prompts one at a time; whatever the side of the padding."""
    vlm = load_in_float64(monkeypatch)
    batch = collator(vlm, True)([sample("a", [noise(1)], 4), sample("b", [noise(2)], 2)])
    assert batch.rows == [[0, 1, 2, 3], [4, 5]]
    pixels = batch.images["pixel_values"].double()[[0, 0, 0, 0, 1, 1]]
    ids = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    with torch.no_grad():
        prepared = vlm.prepare(**ids, pixel_values=pixels, padding_side=side)
        rows = share_rows(prepared, batch.rows)
        logits = vlm.model(
            inputs_embeds=rows.inputs_embeds,
            attention_mask=rows.attention_mask,
            position_ids=rows.position_ids,
            use_cache=False,
        ).logits
        for row, prompts in enumerate(batch.rows):
            shared = rows.visual_index[row].ge(0).nonzero().max() + 1
            for prompt in prompts:
                length = int(batch.attention_mask[prompt].sum())
                alone = vlm(batch.input_ids[prompt : prompt + 1, :length], pixel_values=pixels[prompt : prompt + 1])
                own = (rows.prompt_of[row] == prompt) & (torch.arange(rows.prompt_of.shape[1]) >= shared)
                torch.testing.assert_close(logits[row, own], alone.logits[0, shared:], rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(logits[row, :shared], alone.logits[0, :shared], rtol=1e-11, atol=1e-12)
    assert not rows.inputs_embeds[rows.prompt_of < 0].any() and (rows.labels[rows.prompt_of < 0] == -100).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_learns_the_same(family: str, tmp_path: Path) -> None:
    """Axes of positions, planes of deeper layers, newlines, tiles: float32."""
    make_random_model.save(family, tmp_path / "random")
    vlm = vzip.load_vlm(tmp_path / "random", compressor=vzip.VisionZip(BUDGET), dtype="float32")
    train_projector_only(vlm.model)
    template = vlm.adapter.check_template(None)
    asked = [sample("many", [noise(1, 90)], 5), sample("text", [], 1), sample("few", [noise(2, 50)], 2)]
    alone, shared = (collator(vlm, share, 2000, template)(asked) for share in (False, True))
    assert shared.rows == [[0, 1, 2, 3, 4], [5], [6, 7]]
    weights = torch.ones(3)
    nats, gradients = loss_and_gradients(vlm, alone, weights)
    others, other_gradients = loss_and_gradients(vlm, shared, weights)
    torch.testing.assert_close(others, nats, rtol=1e-4, atol=1e-4)
    assert any(bool(gradient.any()) for gradient in gradients)
    for own, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-4 * float(own.abs().max()))


def test_samples_about_one_file_share_it(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for number, file in enumerate(files):
        noise(number).save(file)
    asked = [sample("s0", [files[0]], 2), sample("s1", [files[1]], 1), sample("s2", [files[0]], 3)]
    asked += [sample("s3", [files[0], files[1]], 1), sample("s4", [], 1), sample("s5", [noise(0)], 1)]
    vlm = load_model()
    shared, alone = collator(vlm, True)(asked), collator(vlm, False)(asked)
    assert len(alone.num_visual_tokens) == 6 and len(shared.num_visual_tokens) == 5, "one of them was there already"
    assert shared.rows == [[0, 1, 3, 4, 5], [2], [6], [7], [8]]
    torch.testing.assert_close(AnswerLoss(vlm)(shared), AnswerLoss(vlm)(alone), rtol=1e-4, atol=1e-4)


def test_what_is_learned_of_the_beginning_is_not_shared() -> None:
    """An image after an answer, a caption right behind the image."""
    vlm = load_model()
    late = [Turn("user", "hello"), Turn("assistant", "you"), Turn("user", "<image>\nwhat"), Turn("assistant", "red")]
    assert collator(vlm, True)([TrainingSample("late", [noise(1)], [late, late])]).rows == [[0], [1]]
    caption = [Turn("user", "<image>"), Turn("assistant", "a star")]
    both = [TrainingSample("caption", [noise(1)], [caption, caption])]
    assert collator(vlm, True, template="plain")(both).rows == [[0], [1]]
    others = [Turn("user", "what\n<image> <image>"), Turn("assistant", "red")]
    start = [Turn("user", "that\n<image> <image>"), Turn("assistant", "red")]
    assert collator(vlm, True)([TrainingSample("o", [noise(1), noise(2)], [others, start])]).rows == [[0], [1]]


def test_samples_of_an_image_are_drawn_together() -> None:
    lengths, images = np.random.RandomState(1).randint(1, 99, 203), np.arange(203) % 7 != 0
    groups = np.where(images, np.arange(203) // 21 * 100 + np.arange(203) % 7, 1000 + np.arange(203))
    steps = draw_steps(lengths, images, 8, seed=3, epoch=1, groups=groups)
    assert steps.shape == (25, 8) and len(np.unique(steps)) == 200, "every step is full, each sample once"
    assert (steps == draw_steps(lengths, images, 8, seed=3, epoch=1, groups=groups)).all()
    assert (steps != draw_steps(lengths, images, 8, seed=4, epoch=1, groups=groups)).any()
    whole = [step for step in steps if len(set(images[step])) == 1]
    assert len(whole) >= len(steps) - 1
    for step in whole:
        runs = 1 + int((np.diff(groups[step]) != 0).sum())
        assert runs == len(set(groups[step])), "side by side"
        if images[step[0]]:
            assert runs <= 5, "three to a group; one may have begun in another step"
    for group in set(groups.tolist()):
        assert len({number for number, step in enumerate(whole) if group in groups[step]}) <= 2
    alone = draw_steps(lengths, images, 8, seed=3, epoch=1, groups=np.arange(203))
    assert (alone == draw_steps(lengths, images, 8, seed=3, epoch=1)).all(), "as ever"


@pytest.fixture
def llava_file(tmp_path: Path) -> Path:
    """Twelve records about three images, and two without any."""
    for number in range(3):
        noise(number).save(tmp_path / f"{number}.png")
    records: list[dict[str, Any]] = []
    for number in range(14):
        start = {"image": f"{number % 3}.png"} if number < 12 else {}
        question = ("<image>\n" if start else "") + f"what {number}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": WORDS[number % 5]}]
        records.append({"id": f"r{number}", **start, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def test_records_about_an_image_are_one_group(llava_file: Path, tmp_path: Path) -> None:
    data = LlavaSet(llava_file, cache=tmp_path / "cache")
    groups = data.image_groups.tolist()
    assert groups[:3] == groups[3:6] == groups[6:9] == groups[9:12] and len(set(groups)) == 5


def test_a_training_and_its_curve_and_resumption(llava_file: Path, tmp_path: Path, plan: Any) -> None:
    """Of a step's samples the same is learned, however many are handled at once, also where a run was killed."""
    data = LlavaSet(llava_file, cache=tmp_path / "cache")
    given = {"load_data": lambda: data, "share_images": True, "num_steps": 6, "samples_per_step": 4, "save_every": 2}
    train(plan("whole", **given))
    with dying_at(3):
        train(plan("killed", **given))
    train(plan("killed", **given))
    assert curve(plan("killed").run_dir) == curve(plan("whole").run_dir)
    train(plan("one by one", **given, batch_size=1))  # nothing is shared
    rows = zip(curve(plan("whole").run_dir), curve(plan("one by one").run_dir), strict=True)
    for (_, *shared, few), (_, *alone, many) in rows:
        assert shared == pytest.approx(alone, rel=1e-4) and few <= many
    assert sum(row[-1] for row in curve(plan("whole").run_dir)) < sum(
        row[-1] for row in curve(plan("one by one").run_dir)
    )
    assert '"share_images": true' in (plan("whole").run_dir / "train.json").read_text()


def test_where_each_image_is_one_sample_the_curve_is_that_without(plan: Any) -> None:
    for share in (False, True):
        train(plan(str(share), share_images=share, num_steps=4, num_validation_samples=4))
    for alone, shared in zip(curve(plan("False").run_dir), curve(plan("True").run_dir), strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(plan: Any) -> None:
    train(plan("one", share_images=True))
    finish(plan("two").run_dir, 2, strategy="ddp", num_processes=2, batch_size=2, share_images=True)
    for one, other in zip(curve(plan("one").run_dir), curve(plan("two").run_dir), strict=True):
        assert one == pytest.approx(other, rel=2e-3)


def test_what_cannot_share_is_refused_by_name() -> None:
    recipe = ["+exp=tiny_32tok", "launcher=inline"]
    assert tuning_plan(checked(composed(recipe))).train.share_images, "the recipe shares"
    flash = checked(composed([*recipe, "model.attn_implementation=flash_attention_2"]))
    with pytest.raises(ConfigError, match=r"share_images=true with model\.attn_implementation=flash_attention_2"):
        tuning_plan(flash)  # nothing is loaded yet
    with pytest.raises(ConfigError, match=r"share_images=true with model\.attn_implementation=flash_attention_2"):
        memory_plan(["+exp=tiny_32tok", "model.attn_implementation=flash_attention_2"])
    assert not tuning_plan(checked(composed([*recipe, "train=projector"]))).train.share_images
    with pytest.raises(ConfigError, match=r"share_images=true with train\.template=plain"):
        dataclasses.replace(SETTINGS, share_images=True, template="plain")
    settings = dataclasses.replace(SETTINGS, share_images=True)
    vlm = load_model()
    text: Any = vlm.model.config.get_text_config()
    text._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attention_2: .* which sdpa and eager"):
        choose_trainable(vlm, settings, in_float32=False)
    text._attn_implementation, text.sliding_window = "sdpa", 64
    with pytest.raises(UnsupportedModelError, match="see a sliding window"):
        choose_trainable(vlm, settings, in_float32=False)
    choose_trainable(vlm, dataclasses.replace(settings, share_images=False), in_float32=False)
