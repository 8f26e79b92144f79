"""Video-LLaVA: frames one by one, counts, images and videos in one prompt, files, checkpoints, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.media.clips import write
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN
from transformers import CLIPVisionConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import vzip
from vzip import cli
from vzip.errors import ConfigError, PromptError, UnsupportedModelError, VideoError
from vzip.media.video import load_video
from vzip.models.families import VideoLlavaAdapter
from vzip.results.token_count import TokenCountError, check_token_counts

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


@pytest.fixture(scope="module")
def model():
    return tiny.video_llava(vocab_size=320, video_token=5)


def wrapped(model, compressor=None, **options):
    return vzip.CompressedVlm(model, compressor or vzip.VisionZip(BUDGET), tiny.video_processor(), **options)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write(folder / "long.mp4"), write(folder / "short.webm", 5, codec="libvpx-vp9")]


@torch.no_grad()
def test_each_frame_is_compressed_by_itself_in_the_video_tower(model):
    vlm, pixels = wrapped(model), tiny.video_inputs(2)["pixel_values_videos"]
    videos = vlm.encode_videos(pixels)
    as_pictures = [vlm.encode_images(frames) for frames in pixels]
    # A wrapper whose image tower has the video tower's weights: the same frames as images, one by one.
    swapped = tiny.video_llava(vocab_size=320, video_token=5)
    swapped.model.image_tower.load_state_dict(model.model.video_tower.state_dict())
    swapped = wrapped(swapped)
    for video, frames, other_tower in zip(videos, pixels, as_pictures, strict=True):
        assert video.shape == (tiny.NUM_FRAMES * 9, 32)
        expected = torch.cat([swapped.encode_images(frame[None])[0] for frame in frames])
        torch.testing.assert_close(video, expected, rtol=0, atol=1e-5)
        assert not torch.allclose(video, torch.cat(other_tower), atol=1e-3)


@pytest.mark.parametrize(("dominant", "contextual"), [(14, 3), (14, 0), (0, 3)])
@torch.no_grad()
def test_frames_keep_their_order_and_their_cls(model, dominant, contextual):
    budget = vzip.TokenBudget(dominant, contextual)
    compressor = vzip.ContextualOnly(budget) if dominant == 0 else vzip.VisionZip(budget)
    vlm, pixels = wrapped(model, compressor), tiny.video_inputs(1)["pixel_values_videos"]
    whole = vlm.encode_videos(pixels)[0]
    parts = [vlm.encode_videos(pixels[:, number : number + 1])[0] for number in range(tiny.NUM_FRAMES)]
    assert [len(part) for part in parts] == [dominant + contextual] * tiny.NUM_FRAMES
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-5)
    vlm.compressor = vzip.Identity()
    uncompressed = vlm.encode_videos(pixels)[0].view(tiny.NUM_FRAMES, 65, -1)
    if dominant:
        assert torch.equal(parts[1][0], uncompressed[1, 0]) or torch.allclose(
            parts[1][0], uncompressed[1, 0], atol=1e-5
        )


@torch.no_grad()
def test_images_and_videos_in_one_prompt_equal_stock():
    model = tiny.video_llava()
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    pictures, videos = tiny.llava_inputs(3), tiny.video_inputs(2, seed=1)
    i, v = [IMAGE_TOKEN] * 64, [VIDEO_TOKEN] * 3 * 65
    rows = [[5, *i, 6, *v, 7], [*v, *i, *i, 8]]
    longest = max(map(len, rows))
    ids = torch.tensor([[3] * (longest - len(row)) + row for row in rows])
    mask = ids.ne(3).long()
    stock_pictures = tiny.FAMILIES[-2].stock(pictures)
    prepared = vlm.prepare(ids, mask, **pictures, **videos)
    assert prepared.num_visual_tokens == [64, 64, 64, 195, 195]
    stock = model(
        input_ids=ids, attention_mask=mask, position_ids=prepared.position_ids, **stock_pictures, **videos
    ).logits
    ours = vlm.forward(ids, mask, **pictures, **videos).logits
    assert torch.equal(ours[mask.bool()], stock[mask.bool()])
    # By the names of the processor's output, and with one placeholder each.
    renamed = {"pixel_values_images": pictures["pixel_values"], **videos}
    assert torch.equal(vlm.forward(ids, mask, **renamed).logits, ours)
    short = torch.tensor([[3, 5, IMAGE_TOKEN, 6, VIDEO_TOKEN, 7], [3, 3, VIDEO_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN, 8]])
    assert torch.equal(vlm.forward(short, short.ne(3).long(), **renamed).logits, ours)
    labels = torch.where(ids.eq(IMAGE_TOKEN) | ids.eq(VIDEO_TOKEN) | ids.eq(3), -100, ids)
    loss = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=prepared.position_ids,
        labels=labels,
        **stock_pictures,
        **videos,
    ).loss
    torch.testing.assert_close(vlm.forward(ids, mask, labels=labels, **renamed).loss, loss)


@torch.no_grad()
def test_a_mixed_batch_of_images_videos_and_text_equals_one_by_one():
    vlm = vzip.CompressedVlm(tiny.video_llava(), vzip.VisionZip(BUDGET))
    pictures, videos = tiny.llava_inputs(2), tiny.video_inputs(2, seed=1)
    ids = torch.tensor([[3, 5, IMAGE_TOKEN, 6, VIDEO_TOKEN], [VIDEO_TOKEN, 7, 8, IMAGE_TOKEN, 9], [3, 3, 5, 6, 7]])
    mask = ids.ne(3).long()
    together = vlm.generate(ids, mask, max_new_tokens=6, do_sample=False, **pictures, **videos)
    assert vlm.last_num_visual_tokens == [9, 9, 27, 27]
    for row in range(3):
        own = tiny.some_of(pictures, row, row + 1) | tiny.some_of(videos, row, row + 1) if row < 2 else {}
        alone = vlm.generate(ids[row : row + 1], mask[row : row + 1], max_new_tokens=6, do_sample=False, **own)
        assert torch.equal(together[row], alone[0])
        assert vlm.last_num_visual_tokens == ([9, 27] if row < 2 else [])


@torch.no_grad()
def test_the_papers_counts_at_the_papers_size():
    """224 pixels in patches of 14, as the 7B model: 136 of 2056 for 8 frames; 80 frames cost 1360 instead of 20560."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    text = tiny.text_config(320)
    config = VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=4, video_token_index=5)
    model = VideoLlavaForConditionalGeneration(config).eval()
    compressor = vzip.VisionZip(vzip.TokenBudget(14, 3))
    for num_frames, compressed, vanilla in [(None, 136, 2056), (80, 1360, 20560)]:
        vlm = vzip.CompressedVlm(model, compressor, num_frames=num_frames)
        assert vlm.num_frames == (num_frames or 8)
        pixels = torch.randn(1, vlm.num_frames, 3, 224, 224)
        embeds = vlm.prepare(torch.tensor([[7, 5, 8, 9]]), pixel_values_videos=pixels).inputs_embeds
        assert vlm.last_num_visual_tokens == [compressed] and embeds.shape[1] == 3 + compressed
        assert [s.num_vanilla for s in vlm.adapter.read_inputs(pixel_values_videos=pixels).videos] == [vanilla]


@torch.no_grad()
def test_files_and_images_to_answers(model, clips):
    vlm = wrapped(model, num_frames=4)
    picture = Image.linear_gradient("L").resize((90, 50)).convert("RGB")
    texts = ["<video> and <image>?", "<video><video>", "hello"]
    frames = [Image.new("RGB", (20, 20), (value, 0, 0)) for value in (0, 250)]
    inputs = vlm.build_inputs(texts, [[picture], [], []], [[clips[0]], [str(clips[1]), frames], []])
    assert inputs["pixel_values_videos"].shape == (3, 4, 3, 112, 112)
    assert inputs["pixel_values"].shape == (1, 3, 112, 112)
    assert vlm.generate(max_new_tokens=3, do_sample=False, **inputs).shape == (3, 3)
    assert vlm.last_num_visual_tokens == [9, 36, 36, 36]
    same = vlm.preprocess_videos([load_video(clips[0], 4)])
    assert torch.equal(same["pixel_values_videos"][0], inputs["pixel_values_videos"][0])


@pytest.mark.parametrize("layout", ["transformers 5", "the hub's"])
@torch.no_grad()
def test_a_saved_checkpoint_comes_back_with_its_processor(model, clips, tmp_path, layout):
    processor = tiny.video_processor()
    model.save_pretrained(tmp_path)
    if layout == "transformers 5":
        processor.save_pretrained(tmp_path)
    else:  # as VideoLlavaProcessor of transformers 4 wrote it, which transformers 5 reads with torchvision only
        processor.tokenizer.save_pretrained(tmp_path)
        processor.image_processor.save_pretrained(tmp_path)
        name = {"processor_class": "VideoLlavaProcessor"}
        file = tmp_path / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | name))
        more = {"patch_size": 14, "image_token": "<image>", "video_token": "<video>", "num_additional_image_tokens": 1}
        (tmp_path / "processor_config.json").write_text(json.dumps(name | more))
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": tiny.CHAT_TEMPLATE}))
    vlm = vzip.load_vlm(tmp_path, compressor=vzip.VisionZip(BUDGET), num_frames=2)
    assert isinstance(vlm.adapter, VideoLlavaAdapter) and vlm.num_frames == 2
    assert vlm.processor.chat_template == tiny.CHAT_TEMPLATE
    picture = Image.linear_gradient("L").resize((90, 50)).convert("RGB")
    inputs = vlm.build_inputs(["<image> <video> hm?"], [[picture]], [[clips[0]]])
    expected = wrapped(model, num_frames=2)
    for name, value in expected.build_inputs(["<image> <video> hm?"], [[picture]], [[clips[0]]]).items():
        assert torch.equal(inputs[name], value)
    assert torch.equal(vlm.forward(**inputs).logits, expected.forward(**inputs).logits)


def test_ask_about_a_video_and_an_image(model, clips, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    model.save_pretrained(checkpoint)
    tiny.video_processor().save_pretrained(checkpoint)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    words = ["--model", "llava_local", "--max-new-tokens", "2", f"model.name_or_path={checkpoint}", "budget=17tok"]
    words.append("model.device_map=null")
    assert cli.main(["ask", str(clips[0]), "hm?", *words]) == 0
    assert "(136 visual tokens, 520 without compression)" in capsys.readouterr().out
    assert cli.main(["ask", str(clips[0]), "hm?", *words, "model.num_frames=80"]) == 0
    assert "(1360 visual tokens, 5200 without compression)" in capsys.readouterr().out
    assert cli.main(["ask", str(tmp_path / "a.png"), "hm?", *words]) == 0
    assert "(17 visual tokens, 64 without compression)" in capsys.readouterr().out
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    assert cli.main(["ask", str(text), "hm?", *words]) == 2
    assert "text.mp4: not a video" in capsys.readouterr().err
    assert cli.main(["ask", str(clips[0]), "hm?"]) == 2  # the built-in model
    assert "has no video tower and takes images only" in capsys.readouterr().err


def test_bad_input_is_named(model, clips):
    vlm, videos = wrapped(model), tiny.video_inputs(2)
    values = videos["pixel_values_videos"]
    one, two = torch.tensor([[6, 5, 7]]), torch.tensor([[6, 5, 5]])
    assert model.config.video_token_id == 5
    cases = [
        (one, {"pixel_values_videos": values}, r"hold 1 <video> placeholders \(prompt 0: 1\) but 2 videos were given"),
        (two, {"pixel_values_videos": values[:1]}, r"hold 2 <video> placeholders .* but 1 videos.*a run of 195"),
        (two, {}, r"2 <video> placeholders .* but 0 videos"),
        (one, {"pixel_values": values[0, :1]}, r"0 <image> placeholders .* but 1 images"),
        (one, {"pixel_values_videos": values[0]}, r"\(3, 3, 112, 112\).*\[videos, frames, 3, height, width\]"),
        (one, {"pixel_values_videos": values[:1, :0]}, r"\(1, 0, 3, 112, 112\).*at least one frame"),
        (one, {"pixel_values_videos": values[:1, ..., :56]}, r"this vision tower takes \[crops, 3, 112, 112\]"),
        (one, {"pixel_values": values[0], "pixel_values_images": values[0]}, "two names of the same images"),
    ]
    for ids, wrong, message in cases:
        with pytest.raises(PromptError, match=message):
            vlm.prepare(ids, **wrong)
    with pytest.raises(PromptError, match=r"Prompt 0 holds 1 <video> placeholders but 2 videos"):
        vlm.build_inputs(["<video>"], videos=[clips])
    with pytest.raises(PromptError, match=r"1 prompts but 2 lists of videos"):
        vlm.build_inputs(["<video>"], videos=[clips, []])
    with pytest.raises(VideoError, match=r"absent\.mp4"):
        vlm.build_inputs(["<video>"], videos=[["absent.mp4"]])
    with pytest.raises(ConfigError, match=r"num_frames=0: must be a whole number"):
        wrapped(model, num_frames=0)
    with pytest.raises(ConfigError, match=r"preprocess_videos needs the checkpoint's processor"):
        vzip.CompressedVlm(model, vzip.Identity()).preprocess_videos(clips)


def test_a_model_without_a_video_tower_says_so(clips):
    vlm = vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET), tiny.processor())
    values = tiny.video_inputs(1)["pixel_values_videos"]
    for call in (
        lambda: vlm.encode_videos(values),
        lambda: vlm.prepare(torch.tensor([[5, 6]]), pixel_values_videos=values),
        lambda: vlm.build_inputs(["hm?"], videos=[[clips[0]]]),
    ):
        with pytest.raises(UnsupportedModelError, match=r"LlavaForConditionalGeneration has no video tower"):
            call()
    with pytest.raises(ConfigError, match=r"model.num_frames=8: LlavaForConditionalGeneration has no video tower"):
        vzip.CompressedVlm(tiny.llava(), vzip.Identity(), num_frames=8)


def test_the_evaluations_count_check_sees_a_difference(model):
    pictures, videos = tiny.llava_inputs(2), tiny.video_inputs(2)["pixel_values_videos"]
    for compressor, picture, video in [(vzip.VisionZip(BUDGET), 9, 27), (vzip.Identity(), 64, 195)]:
        vlm = wrapped(model, compressor)
        ids = torch.tensor([[IMAGE_TOKEN, IMAGE_TOKEN, 5], [6, 7, 5]])
        vlm.prepare(ids, **pictures, pixel_values_videos=videos)
        arguments = (vlm, {**pictures, "pixel_values_videos": videos}, [2, 0], [1, 1])
        assert check_token_counts(*arguments) == [[picture, picture, video], [video]]
        vlm.last_num_visual_tokens[3] += 1
        with pytest.raises(TokenCountError, match=str(video + 1)):
            check_token_counts(*arguments)
        vlm.last_num_visual_tokens.pop()
        with pytest.raises(TokenCountError, match="2 images and 2 videos were asked about, 3 entered"):
            check_token_counts(*arguments)
