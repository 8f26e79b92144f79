"""Every family's projector is tuned, comes back, and is merged into a checkpoint that stock Hugging Face loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny, tiny_mini_gemini
from tests.media.clips import write
from tests.train.kit import BUDGET, Samples

import vzip
from vzip.cli.merge import merge
from vzip.data.collate import Collator
from vzip.data.conversations import vicuna_v1
from vzip.data.llava_set import LlavaSet
from vzip.errors import ManifestError, UnsupportedModelError, VideoError
from vzip.media.images import load_image
from vzip.models.weights.tuned import read_tensors
from vzip.train.loop import train
from vzip.train.objective import AnswerLoss, ModelView

# Model and processor; crops of an image of 60 x 40 pixels.
FAMILIES = {
    "llava_next": (tiny.llava_next, tiny.next_processor, 3),
    "llava_onevision": (lambda **size: tiny.llava_onevision(video_token=5, **size), tiny.onevision_processor, 3),
    "video_llava": (lambda **size: tiny.video_llava(video_token=5, **size), tiny.video_processor, 1),
    "video_llava_published": (
        lambda **size: tiny.build("video_llava_published", video_token_index=5, **size),
        tiny.video_processor,
        1,
    ),
    "mini_gemini": (tiny_mini_gemini.mini_gemini, tiny_mini_gemini.processor, 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_projector_is_tuned_used_and_merged(family: str, plan: Any, tmp_path: Path) -> None:
    build, build_processor, num_crops = FAMILIES[family]
    processor = build_processor()
    stock = build(vocab_size=len(processor.tokenizer))
    base = tmp_path / "base"
    stock.save_pretrained(base)
    processor.save_pretrained(base)
    compressor = vzip.VisionZip(BUDGET)
    loaded: list[vzip.CompressedVlm] = []

    def load(precision: str) -> vzip.CompressedVlm:
        loaded.append(vzip.load_vlm(base, dtype=precision, compressor=compressor))
        return loaded[-1]

    final = train(plan(load_model=load, name_or_path=str(base), num_steps=2))

    before, after = stock.state_dict(), loaded[0].model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name} == set(read_tensors(final))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pictures = [row["num_visual_tokens"] / (BUDGET.num_tokens * num_crops) for row in rows]
    assert all(count == int(count) > 0 for count in pictures)

    inputs = loaded[0].preprocess_images([Image.new("RGB", (60, 40), "green")])
    tuned = vzip.load_vlm(base, projector=final, compressor=compressor).encode_images(**inputs)[0]
    assert tuned.shape[0] == num_crops * BUDGET.num_tokens
    assert torch.equal(tuned, loaded[0].eval().encode_images(**inputs)[0])
    merge(final, tmp_path / "merged")
    merged = type(stock).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.items())


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A file in LLaVA's format with videos, images, both and neither."""
    write(tmp_path / "clip.mp4")
    Image.new("RGB", (60, 40), "green").save(tmp_path / "a.png")
    kinds: list[dict[str, str]] = [{"video": "clip.mp4"}, {"image": "a.png"}, {}]
    kinds.append({"image": "a.png", "video": "clip.mp4"})
    records = []
    for number in range(8):
        files = kinds[number % 4]
        words = "".join({"image": "<image>\n", "video": "<video>\n"}[key] for key in files) + f"what {number}"
        turns = [{"from": "human", "value": words}, {"from": "gpt", "value": "xyz"[number % 3] * (1 + number)}]
        records.append({"id": f"r{number}", "conversations": turns, **files})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def video_llava(precision: str = "float32") -> vzip.CompressedVlm:
    processor = tiny.video_processor()
    model = tiny.video_llava(vocab_size=len(processor.tokenizer), video_token=5)
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor, num_frames=2)


def published(precision: str = "float32") -> vzip.CompressedVlm:
    """As its authors published it: the frames of a clip know of each other, so there are eight."""
    processor = tiny.video_processor()
    model = tiny.build("video_llava_published", vocab_size=len(processor.tokenizer), video_token_index=5)
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor)


@pytest.mark.parametrize(("load", "num_frames"), [(video_llava, 2), (published, 8)])
def test_videos_are_learned_from(load: Any, num_frames: int, videos: Path, plan: Any, tmp_path: Path) -> None:
    """The first step's loss is that of the public forward over the samples one by one."""
    data = LlavaSet(videos, cache=tmp_path / "cache")
    final = train(plan(load_data=lambda: data, load_model=load, num_steps=1))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["num_visual_tokens"] == 9 * (num_frames * 4 + 4)  # the frames of four videos, four images
    assert set(read_tensors(final)) == {n for n in load().model.state_dict() if "multi_modal_projector" in n}

    vlm, nats, num_targets = load(), 0.0, 0
    for index in range(len(data)):
        sample = data[index]
        words = "".join(f"USER: {turn.text} ASSISTANT:" if turn.role == "user" else "" for turn in sample.dialogues[0])
        answer = f" {sample.dialogues[0][1].text}</s>"
        pictures = [load_image(path) for path in sample.images]
        inputs = vlm.build_inputs([words + answer], [pictures], [sample.videos])
        labels = inputs["input_ids"].clone()
        labels[:, : len(vlm.processor.tokenizer(words)["input_ids"])] = -100  # type: ignore[misc]  # it has one
        count = int((labels != -100).sum())
        nats += vlm.forward(**inputs, labels=labels).loss.item() * count
        num_targets += count
    assert row["num_target_tokens"] == num_targets
    assert row["loss"] == pytest.approx(nats / num_targets, rel=1e-4)


def test_videos_that_cannot_be_learned_from(videos: Path, plan: Any, tmp_path: Path) -> None:
    data = LlavaSet(videos, cache=tmp_path / "cache")
    with pytest.raises(
        UnsupportedModelError, match=r"sample r\d: has a video, and this model's training takes images only"
    ):
        train(plan("images only", load_data=lambda: data, num_steps=1))
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(clip.read_bytes()[:400])
    with pytest.raises(VideoError, match=r"sample r\d: .*clip\.mp4"):
        train(plan("damaged", load_data=lambda: data, load_model=video_llava, num_steps=1))
    clip.unlink()
    with pytest.raises(ManifestError, match=r"4 samples lack an image .*(?s:.*)no such file: .*clip\.mp4"):
        LlavaSet(videos, cache=tmp_path / "cache")


def test_a_video_that_does_not_fit_is_cut_off_whole(videos: Path, tmp_path: Path) -> None:
    vlm = video_llava()
    collate = Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, vlm.adapter.image_token_id, 24, video_token_id=5)
    batch = collate([LlavaSet(videos, cache=tmp_path / "cache")[3]])  # 18 visual tokens of the video, and "USER: "
    assert batch.video_of == [] and batch.image_of == [0] and (batch.input_ids != 5).all()
    assert AnswerLoss(vlm).prepare(batch).num_visual_tokens == [9]


@pytest.mark.parametrize("load", [video_llava, published])
def test_every_part_runs_on_every_batch_where_processes_share_the_weights(
    load: Any, videos: Path, tmp_path: Path
) -> None:
    vlm, data = load(), LlavaSet(videos, cache=tmp_path / "cache")
    adapter: Any = vlm.adapter
    collate = Collator(vlm.processor, ModelView(vlm), vicuna_v1, None, adapter.image_token_id, 200, video_token_id=5)
    ran: list[str] = []
    for name, tower in (("image", adapter.tower), ("video", adapter.frame_tower)):
        tower.layers[0].register_forward_hook(lambda *_, name=name: ran.append(name))
    plain, whole = AnswerLoss(vlm), AnswerLoss(vlm, always_whole=True)
    for samples, needed in (([0], ["video"]), ([1], ["image"]), ([2], []), ([3], ["image", "video"])):
        batch = collate([data[number] for number in samples])
        ran.clear()
        loss = plain(batch)
        assert ran == needed
        ran.clear()
        torch.testing.assert_close(whole(batch), loss)
        assert ran == ["image", "video"]
    ran.clear()
    assert whole(collate([])).shape == (0,) and ran == ["image", "video"]


def test_kept_places_are_learned_with_their_positions() -> None:
    processor = tiny.processor()
    model = tiny.llava(vocab_size=len(processor.tokenizer))
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor, positions="original")
    collate = Collator(processor, ModelView(vlm), vicuna_v1, None, vlm.adapter.image_token_id, 200)
    batch = collate([Samples()[number] for number in (1, 5)])  # an image, and text alone
    prepared = AnswerLoss(vlm).prepare(batch)
    alone = vlm.prepare(batch.input_ids[:1], batch.attention_mask[:1], **batch.images)
    length = alone.position_ids.shape[1]
    assert torch.equal(prepared.position_ids[0, :length], alone.position_ids[0])
    assert int(prepared.position_ids[0].max()) > length  # gaps
