"""Dialogues: what the model computes turn by turn is what one pass over the whole dialogue gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny, tiny_mini_gemini
from tokenizers.processors import TemplateProcessing

import vzip
from vzip.errors import ConfigError, ImageError, PromptError, UnsupportedModelError
from vzip.models.families import VideoLlavaAdapter

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
# As the published LLaVA-1.5 checkpoints lay out a dialogue (conversation vicuna_v1).
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] if c['type'] != 'text' %}<{{ c['type'] }}>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


def built_in() -> vzip.CompressedVlm:
    return vzip.load_vlm("vzip/tiny", compressor=vzip.VisionZip(vzip.TokenBudget(54, 10)))


def llava(template: str = VICUNA) -> vzip.CompressedVlm:
    processor = tiny.processor()
    processor.chat_template = template
    return vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET), processor)


def llava_next() -> vzip.CompressedVlm:
    processor = tiny.next_processor()
    processor.chat_template = VICUNA
    return vzip.CompressedVlm(tiny.llava_next(vocab_size=320), vzip.VisionZip(BUDGET), processor)


def video_llava(template: str = VICUNA) -> vzip.CompressedVlm:
    processor = tiny.video_processor()
    processor.chat_template = template
    model = tiny.video_llava(vocab_size=320, video_token=5)
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor, num_frames=3)


def mini_gemini() -> vzip.CompressedVlm:
    processor = tiny_mini_gemini.processor()
    processor.chat_template = VICUNA
    return vzip.CompressedVlm(tiny_mini_gemini.mini_gemini(vocab_size=320), vzip.VisionZip(BUDGET), processor)


class Recorder:
    """What a model computes: the logits of each forward pass, its length, and the runs of its vision towers."""

    def __init__(self, vlm: vzip.CompressedVlm) -> None:
        self.logits: list[torch.Tensor] = []
        self.lengths: list[int] = []
        self.num_tower_runs = 0

        def head(_module: Any, _args: Any, output: torch.Tensor) -> None:
            self.logits.append(output[0, -1])

        def text(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            self.lengths.append(kwargs["inputs_embeds"].shape[1])

        def tower(*_: Any) -> None:
            self.num_tower_runs += 1

        self.handles = [
            vlm.model.get_output_embeddings().register_forward_hook(head),
            vlm.adapter.language_model.register_forward_pre_hook(text, with_kwargs=True),
            vlm.adapter.tower.layers[0].register_forward_hook(tower),
        ]
        if isinstance(vlm.adapter, VideoLlavaAdapter):
            self.handles.append(vlm.adapter.frame_tower.layers[0].register_forward_hook(tower))

    def take(self) -> tuple[torch.Tensor, list[int], int]:
        """(logits of each new token ``[new, vocabulary]``, lengths, tower runs) since the last call."""
        taken = torch.stack(self.logits), self.lengths[:], self.num_tower_runs
        self.logits.clear()
        self.lengths.clear()
        self.num_tower_runs = 0
        return taken


@torch.no_grad()
def in_one_pass(
    vlm: vzip.CompressedVlm,
    messages: list[dict[str, Any]],
    pictures: list[Image.Image],
    new_ids: torch.Tensor,
    videos: Sequence[list[Image.Image]] = (),
) -> torch.Tensor:
    """Logits ``[new, vocabulary]`` at ``new_ids`` by one pass without cache, through the public calls."""
    processor: Any = vlm.processor
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = vlm.build_inputs([text], [pictures], [videos])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new_ids[None, :-1]], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return vlm.forward(**inputs, use_cache=False).logits[0, -len(new_ids) :]


# Questions with the images that come with each; sizes that LLaVA-NeXT cuts into different numbers of tiles.
TURNS = [
    ("What color is the star?", [picture(0)]),
    ("And how many?", []),
    ("What changed?", [picture(1, (60, 200)), picture(2, (150, 150))]),
    ("Which is it?", []),
]


@pytest.mark.parametrize("build", [built_in, llava, llava_next, video_llava, mini_gemini])
def test_every_turn_equals_one_pass_over_the_dialogue(build: Callable[[], vzip.CompressedVlm]) -> None:
    vlm = build()
    chat, recorder = vlm.chat(), Recorder(vlm)
    pictures: list[Image.Image] = []
    for question, new_pictures in TURNS:
        answer = chat.ask(question, new_pictures, max_new_tokens=8)
        logits, lengths, tower_runs = recorder.take()
        pictures += new_pictures
        assert tower_runs == len(new_pictures)
        assert chat.messages[-1]["content"] == [{"type": "text", "text": answer}]
        expected = in_one_pass(vlm, chat.messages[:-1], pictures, logits.argmax(dim=-1))
        recorder.take()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        assert lengths[1:] == [1] * (len(logits) - 1)
    assert len(chat.visuals) == 3 and len(chat.messages) == 8


IMAGES_FIRST = VICUNA.replace(
    "{% for c in m['content'] if c['type'] != 'text' %}<{{ c['type'] }}>\n{% endfor %}",
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'video' %}<video>\n{% endfor %}",
)


@pytest.mark.parametrize("template", [VICUNA, IMAGES_FIRST], ids=["in order", "images first"])
def test_a_dialogue_about_videos_equals_one_pass_over_it(template: str) -> None:
    vlm = video_llava(template)
    chat, recorder = vlm.chat(), Recorder(vlm)
    clips = [[picture(10 * number + frame) for frame in range(1, 4)] for number in range(1, 4)]
    chat.add_video(clips[0])
    chat.add_image(picture(0))
    chat.add_video(clips[1])
    turns: list[tuple[str, list[Image.Image], list[Any]]] = [
        ("What happens?", [], []),
        ("And then?", [], []),
        ("Is it the same?", [picture(1)], [clips[2]]),
    ]
    assert recorder.num_tower_runs == 3
    shown = [([picture(0)], clips[:2])] * 2 + [([picture(0), picture(1)], clips)]
    for (question, images, videos), (all_images, all_videos) in zip(turns, shown, strict=True):
        recorder.num_tower_runs = 0
        chat.ask(question, images, videos, max_new_tokens=6)
        logits, lengths, tower_runs = recorder.take()
        assert tower_runs == len(images) + len(videos) and lengths[1:] == [1] * (len(logits) - 1)
        expected = in_one_pass(vlm, chat.messages[:-1], all_images, logits.argmax(dim=-1), all_videos)
        recorder.take()
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert [(v.medium, v.num_visual_tokens, v.num_vanilla_tokens) for v in chat.visuals] == [
        ("video", 27, 195),
        ("image", 9, 64),
        ("video", 27, 195),
        ("image", 9, 64),
        ("video", 27, 195),
    ]


def test_videos_need_a_video_tower_and_no_placeholder() -> None:
    chat = llava().chat()
    with pytest.raises(UnsupportedModelError, match="has no video tower"):
        chat.add_video([picture(0)])
    with pytest.raises(UnsupportedModelError, match="has no video tower"):
        chat.ask("a", videos=[[picture(0)]])
    assert chat.messages == [] and chat.pending == []
    with pytest.raises(PromptError, match=r"'<video>', which marks where a video goes.*add_video"):
        video_llava().chat().ask("what is <video>?")


def test_a_turn_computes_only_what_is_new() -> None:
    vlm = built_in()
    chat, recorder = vlm.chat(), Recorder(vlm)
    processor: Any = vlm.processor
    chat.ask("What color is the star?", [picture(0)])
    first_lengths = recorder.take()[1]
    before = chat.num_cached_tokens
    assert before == sum(first_lengths)
    chat.ask("How many circles are there?")
    _, lengths, _ = recorder.take()
    # The end of the first answer, which nothing was computed on, and the question.
    new = processor.tokenizer("</s>USER: How many circles are there? ASSISTANT:", add_special_tokens=False)
    assert lengths[0] == len(new["input_ids"])
    assert chat.num_cached_tokens == before + sum(lengths)


def test_the_counts_are_those_of_the_images() -> None:
    chat = llava_next().chat()
    chat.ask("a", [picture(0, (112, 200))], max_new_tokens=2)
    added = chat.add_image(picture(1, (200, 200)))
    assert [p.num_visual_tokens for p in chat.visuals] == [3 * 9] and added.num_visual_tokens == 5 * 9
    stock = chat._vlm.build_inputs(["<image>"], [[picture(1, (200, 200))]])
    del stock["input_ids"], stock["attention_mask"], stock["tile_grids"]
    unmodified = chat._vlm.model.model.get_image_features(**stock).pooler_output[0]
    assert added.num_vanilla_tokens == len(unmodified)


def test_images_added_before_wait_for_the_question() -> None:
    vlm = llava()
    chat, other = vlm.chat(), vlm.chat()
    chat.add_image(picture(0))
    recorder = Recorder(vlm)
    assert chat.ask("b", [picture(1)], max_new_tokens=4) == other.ask("b", [picture(0), picture(1)], max_new_tokens=4)
    recorder.take()
    assert chat.pending == [] and len(chat.visuals) == 2 and chat.messages == other.messages


def test_a_reset_forgets_everything_but_the_system_prompt() -> None:
    vlm = llava()
    chat = vlm.chat("Be brief.")
    first = chat.ask("c", [picture(0)], max_new_tokens=4)
    told = list(chat.messages)
    assert told[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    chat.ask("d", max_new_tokens=4)
    chat.add_image(picture(3))
    chat.reset()
    assert chat.messages == told[:1] and chat.visuals == [] and chat.pending == [] and chat.num_cached_tokens == 0
    assert chat.ask("c", [picture(0)], max_new_tokens=4) == first and chat.messages == told


def test_a_template_that_rewrites_earlier_turns_is_still_seen_in_full() -> None:
    """Here the number of turns stands in front of everything, so nothing of the cache can be kept."""
    vlm = llava("{{ messages | length }}" + VICUNA)
    chat, recorder = vlm.chat(), Recorder(vlm)
    chat.ask("e", [picture(0)], max_new_tokens=4)
    recorder.take()
    chat.ask("f", max_new_tokens=4)
    logits, lengths, tower_runs = recorder.take()
    assert lengths[0] > chat.visuals[0].num_visual_tokens and tower_runs == 0
    expected = in_one_pass(vlm, chat.messages[:-1], [picture(0)], logits.argmax(dim=-1))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@contextmanager
def dictated(vlm: vzip.CompressedVlm, ids: list[int]) -> Iterator[None]:
    """While it lasts the model writes these tokens."""
    left = iter(ids)

    def write(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([[next(left)]]), output.shape[-1]).to(output)

    handle = vlm.model.get_output_embeddings().register_forward_hook(write)
    yield
    handle.remove()


@pytest.mark.parametrize("spelled_out", [False, True])
def test_a_placeholder_that_the_model_writes_is_no_image(spelled_out: bool) -> None:
    bare = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] if c['text'] is defined else '<image>' }}"
    vlm = llava(bare + "{% endfor %}{% endfor %}")
    processor: Any = vlm.processor
    written = [tiny.IMAGE_TOKEN] * 3
    if spelled_out:
        written = processor.tokenizer.convert_tokens_to_ids(list("<image>"))
    chat = vlm.chat()
    with dictated(vlm, written):
        assert chat.ask("g", max_new_tokens=len(written)) == ""
    recorder = Recorder(vlm)
    chat.ask("h", [picture(0)], max_new_tokens=3)  # its image comes where the cache holds the written placeholder
    logits, _, _ = recorder.take()
    expected = in_one_pass(vlm, chat.messages[:-1], [picture(0)], logits.argmax(dim=-1))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_words_are_streamed_as_they_come() -> None:
    pieces: list[str] = []
    answer = llava().chat().ask("i", [picture(0)], max_new_tokens=30, on_text=pieces.append)
    assert "".join(pieces).strip() == answer and all(pieces)


def test_each_token_is_told_and_at_the_first_the_cache_holds_the_prompt() -> None:
    chat, lengths, num_bytes = llava().chat(), [], []

    def on_token() -> None:
        lengths.append(chat._cache.get_seq_length())
        num_bytes.append(chat.cache_bytes)

    chat.ask("i", [picture(0)], max_new_tokens=5, on_token=on_token)
    assert lengths == list(range(lengths[0], lengths[0] + 5))
    config = chat._vlm.model.config.text_config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert num_bytes == [length * 2 * 4 * config.num_hidden_layers * heads * width for length in lengths]
    assert chat.num_cached_tokens == lengths[-1]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("l", max_new_tokens=5, on_token=stop)
    assert len(chat.messages) == 2


def test_what_fails_in_a_turn_leaves_the_dialogue_usable() -> None:
    vlm = llava()
    chat, undisturbed = vlm.chat(), vlm.chat()
    for session in (chat, undisturbed):
        session.ask("j", [picture(0)], max_new_tokens=6)
    layers: Any = vlm.adapter.language_model.get_submodule("layers")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    before = (chat.messages, chat.visuals, chat.num_cached_tokens)
    for module in (layers[0], layers[1], vlm.adapter.projector):  # layers[1]: after layer 0 has filled its cache
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            chat.ask("k", [picture(1)], max_new_tokens=6)
        handle.remove()
        assert (chat.messages, chat.visuals) == before[:2] and chat.pending == []
        assert {layer.get_seq_length() for layer in chat._cache.layers} == {chat.num_cached_tokens}

    def stop(text: str) -> None:
        raise RuntimeError(text)

    with pytest.raises(RuntimeError):
        chat.ask("l", [picture(2)], max_new_tokens=30, on_text=stop)
    assert (chat.messages, chat.visuals) == before[:2]
    assert chat.ask("m", [picture(3)], max_new_tokens=6) == undisturbed.ask("m", [picture(3)], max_new_tokens=6)
    assert chat.messages == undisturbed.messages and chat.num_cached_tokens == undisturbed.num_cached_tokens


def test_bad_input_is_refused_before_anything_is_computed() -> None:
    vlm = llava()
    chat = vlm.chat()
    chat.ask("n", [picture(0)], max_new_tokens=2)
    recorder = Recorder(vlm)
    for question, settings, error, message in [
        ("  ", {}, PromptError, "question is empty"),
        ("what is <image>?", {}, PromptError, r"'<image>'.*add_image"),
        ("p", {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        ("p", {"num_beams": 4}, ConfigError, r"ask\(num_beams=\.\.\.\)"),
        ("p", {"temprature": 1.0}, ConfigError, "did you mean 'temperature'"),
        ("p", {"max_new_tokens": 2048}, PromptError, r"up to 2048, but the model reads 2048.*reset"),
    ]:
        with pytest.raises(error, match=message):
            chat.ask(question, **settings)
    with pytest.raises(ImageError):
        chat.ask("p", [Image.new("RGB", (0, 4))])
    with pytest.raises(ImageError):
        chat.add_image("no such file")
    assert not recorder.lengths and recorder.num_tower_runs == 0
    assert len(chat.messages) == 2 and chat.pending == []
    chat.ask("q", max_new_tokens=2)


def test_what_a_dialogue_needs_is_asked_for_at_its_beginning() -> None:
    with pytest.raises(ConfigError, match="has no processor"):
        vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.Identity()).chat()
    with pytest.raises(ConfigError, match="has no chat template"):
        llava("").chat()
    chat = llava("{% for m in messages %}{{ m['content'][-1]['text'] }}{% endfor %}").chat()
    with pytest.raises(PromptError, match="wrote 0 <image> placeholders for 1 images"):
        chat.ask("r", [picture(0)])


def test_a_first_token_of_the_template_is_not_doubled() -> None:
    vlm = llava("<s>" + VICUNA)
    processor: Any = vlm.processor
    beginning = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor.tokenizer.backend_tokenizer.post_processor = beginning
    assert processor.tokenizer("a")["input_ids"][0] == 1
    chat, recorder = vlm.chat(), Recorder(vlm)
    chat.ask("s", max_new_tokens=2)
    _, lengths, _ = recorder.take()
    assert lengths[0] == len(processor.tokenizer("<s>USER: s ASSISTANT:", add_special_tokens=False)["input_ids"])


def test_answers_can_be_sampled() -> None:
    vlm = llava()
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        answers.add(vlm.chat().ask("t", [picture(0)], max_new_tokens=8, do_sample=True, temperature=3.0))
    assert len(answers) > 1


def test_bfloat16_and_gradients() -> None:
    vlm = llava()
    vlm.model.to(torch.bfloat16)
    chat = vlm.chat()
    chat.ask("u", [picture(0)], max_new_tokens=3)
    chat.ask("v", max_new_tokens=3)
    assert chat.visuals[0].tokens.dtype == torch.bfloat16 and not chat.visuals[0].tokens.requires_grad
