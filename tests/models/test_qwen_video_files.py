"""Video files of Qwen2.5-VL and Qwen3-VL: frames, pixels, times and prompts as transformers' processors make them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scripts import make_random_model
from tests import tiny_qwen
from tests.media.clips import write
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

import vzip
from vzip.errors import ConfigError, PromptError, UnsupportedModelError, VideoError
from vzip.models.families.options import FamilyOptions
from vzip.models.families.qwen2_5_vl.videos import Qwen3VideoRules, VideoRules, read_settings

GOLDEN = Path(__file__).parents[1] / "golden/qwen_videos.safetensors"
RULES = {"qwen2_5_vl": (VideoRules, 300, 500), "qwen3_vl": (Qwen3VideoRules, 1000, 1600)}
BUDGET = vzip.TokenBudget(num_dominant=2, num_contextual=1)
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize("name", RULES)
def test_frames_and_pixels_are_the_processors(name):
    kind, smallest, largest = RULES[name]
    golden = load_file(GOLDEN)
    patches, grid = kind(smallest=smallest, largest=largest, patch_size=4).pixels(
        [Image.fromarray(frame) for frame in golden["frames"].numpy()]
    )
    assert [list(grid)] == golden[f"{name}.video_grid_thw"].tolist()
    # On a machine without AVX2 torch may round a byte the other way when it resizes.
    torch.testing.assert_close(patches, golden[f"{name}.pixel_values_videos"], rtol=0, atol=0.02)
    for key, taken in golden.items():
        if key.startswith(f"{name}.sampled."):
            total, rate = key.removeprefix(f"{name}.sampled.").rsplit(".", 1)[0].split(".", 1)
            num_frames = None if key.endswith("None") else int(key.rsplit(".", 1)[1])
            assert kind(num_frames=num_frames).sample(int(total), float(rate)) == taken.tolist(), key


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def vlm(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / request.param
    make_random_model.save(request.param, directory)
    vlm = vzip.load_vlm(directory, compressor=vzip.VisionZip(BUDGET), max_frame_pixels=9000)
    with torch.no_grad():  # its usual weights are small: wider ones say different words to different videos
        for name, parameter in vlm.model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(0, parameter[0].numel() ** -0.5 * 1.5)
    return vlm


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """10 frames a second: three seconds, and one."""
    folder = tmp_path_factory.mktemp("clips")
    return write(folder / "long.mp4", 30), write(folder / "short.mp4", 10)


def test_times_are_the_processors(vlm, clips):
    inputs = vlm.build_inputs([f"a {VIDEO} b {VIDEO} c"], videos=[list(clips)])
    (steps, rows, cols), (fewer, *_) = inputs["video_grid_thw"].tolist()
    taken = [vlm.adapter.video_rules().sample(30, 10.0), vlm.adapter.video_rules().sample(10, 10.0)]
    assert (steps, fewer) == (3, 2) and rows * cols * 14**2 <= 9000 * 2
    metadata = [
        VideoMetadata(total_num_frames=n, fps=10.0, frames_indices=own) for n, own in zip((30, 10), taken, strict=True)
    ]
    if vlm.adapter.writes_steps:
        own = SimpleNamespace(
            video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
            vision_start_token="<|vision_start|>",
            video_token="<|video_pad|>",
            vision_end_token="<|vision_end|>",
        )
        own._calculate_timestamps = lambda *args: Qwen3VLProcessor._calculate_timestamps(own, *args)
        found = {"video_grid_thw": inputs["video_grid_thw"], "video_metadata": metadata}
        texts = [Qwen3VLProcessor.replace_video_token(own, found, number) for number in range(2)]
        expanded = f"a <|vision_start|>{texts[0]}<|vision_end|> b <|vision_start|>{texts[1]}<|vision_end|> c"
        ids = vlm.processor.tokenizer(expanded)["input_ids"]
        # A placeholder a step here, of the processor as many as it has visual tokens.
        token = vlm.adapter.video_token_id
        runs = [i for n, i in enumerate(ids) if i != token or ids[n - 1] != token]
        assert inputs["input_ids"][0].tolist()[-len(runs) :] == runs
    else:
        assert inputs["second_per_grid_ts"].tolist() == pytest.approx([2 / own.sampled_fps for own in metadata])


@torch.no_grad()
def test_files_beside_images_equal_stock_and_a_batch_equals_singles(vlm, clips):
    still = Image.new("RGB", (84, 56), (200, 30, 60))
    texts = [f"{IMAGE} and {VIDEO} what?", f"{VIDEO} then {VIDEO} what?"]
    images, videos = [[still], []], [[clips[0]], [clips[1], clips[0]]]
    inputs = vlm.build_inputs(texts, images, videos)
    together = vlm.forward(**inputs).logits
    assert vlm.last_num_visual_tokens == vlm.expected_num_visual_tokens(**inputs)
    for number in range(2):
        single = vlm.build_inputs(texts[number : number + 1], images[number : number + 1], videos[number : number + 1])
        alone = vlm.forward(**single).logits[0]
        torch.testing.assert_close(together[number, -len(alone) :], alone, rtol=0, atol=1e-3)
    whole = vzip.CompressedVlm(vlm.model, vzip.Identity(), vlm.processor, max_frame_pixels=9000)
    ours = whole.forward(**inputs)
    # The unmodified model gets the placeholders expanded, and no times: it reads them in the prompt.
    lengths = iter(
        whole.adapter.read_inputs(**{n: v for n, v in inputs.items() if n in whole.adapter.input_names}).videos
    )
    ids = inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()
    shape = next(lengths)
    per_run = shape.num_vanilla // (shape.num_crops if vlm.adapter.writes_steps else 1)
    runs = {
        vlm.adapter.image_token_id: int(inputs["image_grid_thw"].prod()) // 4,
        vlm.adapter.video_token_id: per_run,
    }
    expanded = torch.tensor([[i for token in ids for i in [token] * runs.get(token, 1)]])
    num_patches = int(inputs["video_grid_thw"][0].prod())
    own = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    own |= {"pixel_values_videos": inputs["pixel_values_videos"][:num_patches]}
    own |= {"video_grid_thw": inputs["video_grid_thw"][:1]}
    if not vlm.adapter.writes_steps:
        own["second_per_grid_ts"] = inputs["second_per_grid_ts"][:1]
    types = (expanded == vlm.adapter.image_token_id).int() + 2 * (expanded == vlm.adapter.video_token_id).int()
    theirs = vlm.model(input_ids=expanded, mm_token_type_ids=types, **own).logits[0]
    vlm.model.model.rope_deltas = None
    torch.testing.assert_close(ours.logits[0, -len(theirs) :], theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("scope", ["crop", "video"])
@torch.no_grad()
def test_a_dialogue_with_videos_and_an_image(vlm, clips, scope):
    """Later turns equal one cold pass over everything, and the first ``generate``; steps may be left empty."""
    usual, vlm.compressor = vlm.compressor, vzip.VisionZip(vzip.TokenBudget(2, 1, scope=scope))
    try:
        chat, still = vlm.chat(), Image.new("RGB", (84, 56), (200, 30, 60))
        answers = [chat.ask("What?", videos=[clips[0]], max_new_tokens=4)]
        assert chat.visuals[0].num_visual_tokens == (3 if scope == "video" else 9)
        answers.append(chat.ask("And?", images=[still], videos=[clips[1]], max_new_tokens=4))
        answers.append(chat.ask("Now?", max_new_tokens=4))
        cold = vlm.chat()
        cold.messages, cold.visuals = chat.messages[:4], list(chat.visuals)
        assert cold.ask("Now?", max_new_tokens=4) == answers[2]
        for warm, whole in zip(chat._cache.layers, cold._cache.layers, strict=True):
            torch.testing.assert_close(warm.keys, whole.keys, rtol=0, atol=1e-4)
        text = vlm.processor.apply_chat_template(chat.messages[:1], add_generation_prompt=True, tokenize=False)
        new = vlm.generate(**vlm.build_inputs([text], videos=[[clips[0]]]), max_new_tokens=4, do_sample=False)
        assert vlm.processor.tokenizer.decode(new[0], skip_special_tokens=True).strip() == answers[0]
    finally:
        vlm.compressor = usual


def test_settings_decide_frames_and_pixels(vlm, clips):
    few = vzip.CompressedVlm(vlm.model, vzip.Identity(), vlm.processor, num_frames=4, max_frame_pixels=4000)
    grid = few.preprocess_videos([clips[0]])["video_grid_thw"].tolist()[0]
    assert grid[0] == 2 and grid[1] * grid[2] * vlm.model.config.vision_config.patch_size**2 <= 4000
    slow = vzip.CompressedVlm(vlm.model, vzip.Identity(), vlm.processor, fps=4, min_frame_pixels=30_000)
    grid = slow.preprocess_videos([clips[0]])["video_grid_thw"].tolist()[0]
    assert grid[0] == 6 and grid[1] * grid[2] * vlm.model.config.vision_config.patch_size**2 >= 30_000
    # Images are frames at that rate already; one alone fills a step.
    frames = [Image.new("RGB", (60, 40), (9 * number, 0, 0)) for number in range(6)]
    assert slow.preprocess_videos([frames, frames[:1]])["video_grid_thw"][:, 0].tolist() == [3, 1]


def test_what_cannot_be_is_refused(vlm, clips):
    with pytest.raises(ConfigError, match=r"num_frames=4 with model.fps=2: set one of them"):
        vzip.CompressedVlm(vlm.model, vzip.Identity(), num_frames=4, fps=2)
    with pytest.raises(ConfigError, match=r"num_frames=1: a temporal step of Qwen.* shows 2 frames"):
        vzip.CompressedVlm(vlm.model, vzip.Identity(), num_frames=1)
    with pytest.raises(ConfigError, match=r"model.fps=0: must be a number of frames a second, above 0"):
        FamilyOptions(fps=0)
    with pytest.raises(ConfigError, match=r"min_frame_pixels=9 with model.max_frame_pixels=4"):
        FamilyOptions(min_frame_pixels=9, max_frame_pixels=4)
    with pytest.raises(
        PromptError, match=r"holds 1 <\|vision_start\|><\|video_pad\|><\|vision_end\|> placeholders but 2"
    ):
        vlm.build_inputs([VIDEO], videos=[list(clips)])
    with pytest.raises(VideoError, match="of several sizes"):
        vlm.preprocess_videos([[Image.new("RGB", (40, 40)), Image.new("RGB", (40, 60))]])
    with pytest.raises(VideoError, match="more oblong than 200:1"):
        vlm.preprocess_videos([[Image.new("RGB", (4, 1000))] * 2])
    with pytest.raises(UnsupportedModelError, match="do_resize=False for videos"):
        VideoRules.of({"do_resize": False}, vlm.model.config.vision_config, FamilyOptions(), None)


def test_a_checkpoints_own_settings(tmp_path):
    """transformers' order of files; Qwen2.5-VL's bounds under their old names too."""
    config = tiny_qwen.build().config.vision_config
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 12845056}')
    rules = VideoRules.of(read_settings(tmp_path), config, FamilyOptions(), None)
    assert (rules.smallest, rules.largest, rules.fps, rules.patch_size) == (3136, 12845056, 2.0, config.patch_size)
    own = '{"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "fps": 1, "max_frames": 64}'
    (tmp_path / "video_preprocessor_config.json").write_text(own)
    rules = Qwen3VideoRules.of(read_settings(tmp_path), config, FamilyOptions(), None)
    assert (rules.smallest, rules.largest, rules.fps, rules.max_frames) == (4096, 25165824, 1, 64)
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"fps": 3}}')
    assert VideoRules.of(read_settings(tmp_path), config, FamilyOptions(fps=0.5), None).fps == 0.5
