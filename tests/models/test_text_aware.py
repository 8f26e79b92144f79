"""Text-aware methods at every door: the question decides, is never missing, and nothing of another one is handed on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests import methods, tiny
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

import vzip
from vzip.compressors import Signal
from vzip.errors import CheckpointError, ConfigError, PromptError
from vzip.models.towers.cache import TowerCache
from vzip.models.towers.text import TextEncoder
from vzip.train.trainable import choose_trainable

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)
QUESTIONS = list(methods.QUESTIONS)


def prompts(num_prompts: int) -> torch.Tensor:
    return torch.tensor([[1, 7, tiny.IMAGE_TOKEN, 9, 11]] * num_prompts)


def model(compressor: vzip.Compressor | None = None) -> vzip.CompressedVlm:
    return vzip.CompressedVlm(tiny.llava(), compressor or vzip.MMTok(BUDGET), methods.Words())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of which the tiny LLaVA's tower is the image model by its sizes; texts of eight tokens at most."""
    folder = tmp_path_factory.mktemp("clip")
    text = CLIPTextConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    text.max_position_embeddings, text.bos_token_id, text.eos_token_id, text.pad_token_id = 8, 1, 2, 3
    torch.manual_seed(3)
    whole = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=tiny.vision_config("clip").to_dict(), projection_dim=12)
    )
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    whole.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_prompts_question_decides_about_all_its_images() -> None:
    vlm, inputs, ids = model(), tiny.llava_inputs(4), prompts(2).repeat_interleave(torch.tensor([1, 1, 2, 1, 1]), dim=1)
    together = vlm.prepare(ids, **inputs, questions=[QUESTIONS[0], QUESTIONS[2]])
    asked = [QUESTIONS[0], QUESTIONS[0], QUESTIONS[2], QUESTIONS[2]]
    tokens = vlm.encode_images(**inputs, questions=asked)
    for row in range(2):
        shown = together.inputs_embeds[row, 2:20]
        assert torch.equal(shown, torch.cat(tokens[2 * row : 2 * row + 2]))
    other = vlm.encode_images(**inputs, questions=asked[::-1])
    assert not any(torch.equal(one, two) for one, two in zip(tokens, other, strict=True))
    for number in range(4):
        (alone,) = vlm.encode_images(**tiny.some_of(inputs, number, number + 1), questions=asked[number : number + 1])
        torch.testing.assert_close(alone, tokens[number], rtol=0, atol=1e-6)
    logits = vlm.forward(ids, **inputs, questions=[QUESTIONS[0], QUESTIONS[2]], logits_to_keep=1).logits
    new = vlm.generate(ids, **inputs, questions=[QUESTIONS[0], QUESTIONS[2]], max_new_tokens=1, do_sample=False)
    assert torch.equal(logits[:, -1].argmax(dim=-1), new[:, 0])


def test_without_a_question_nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, inputs, ids = model(), tiny.llava_inputs(1), prompts(1)
    monkeypatch.setattr(type(vlm.adapter), "image_outputs", lambda *_, **__: pytest.fail("encoded"))
    missing = r"questions is missing: MMTok is text-aware.*Pass questions=\[\.\.\.\]"
    for call in (
        lambda: vlm.prepare(ids, **inputs),
        lambda: vlm.forward(ids, **inputs),
        lambda: vlm.generate(ids, **inputs, max_new_tokens=1),
        lambda: vlm.encode_images(**inputs),
        lambda: vlm.adapter.encode(vlm.adapter.read_inputs(**inputs), vlm.compressor),
    ):
        with pytest.raises(PromptError, match=missing):
            call()
    for questions, message in (
        ("What?", r"questions='What\?': must be a list of texts, one for each prompt"),
        (["What?"] * 2, "2 questions for 1 prompts: MMTok needs one for each prompt"),
        ([" "], r"questions\[0\]=' ': must be the raw question of prompt 0"),
        ([None], r"questions\[0\]=None"),
    ):
        with pytest.raises(PromptError, match=message):
            vlm.prepare(ids, **inputs, questions=questions)
    with pytest.raises(ConfigError, match="MMTok reads questions by the language model's tokenizer, and this wrapper"):
        vzip.CompressedVlm(tiny.llava(), vzip.MMTok(BUDGET)).prepare(ids, **inputs, questions=["What?"])


@torch.no_grad()
def test_where_no_question_is_read_none_is_needed_and_any_is_harmless() -> None:
    vlm, inputs, ids = model(vzip.VisionZip(BUDGET)), tiny.llava_inputs(1), prompts(1)
    plain = vlm.prepare(ids, **inputs).inputs_embeds
    for questions in (["What?"], ["", "two"], "What?"):
        assert torch.equal(vlm.prepare(ids, **inputs, questions=questions).inputs_embeds, plain)
    text = torch.tensor([[1, 7, 9]])
    assert torch.equal(model().forward(text).logits, vlm.forward(text).logits)


@torch.no_grad()
def test_the_towers_cache_hands_on_nothing_of_another_question() -> None:
    vlm, inputs = model(vzip.MMTok(BUDGET)), tiny.llava_inputs(1)
    plain = [vlm.encode_images(**inputs, questions=[question])[0] for question in QUESTIONS]
    assert not torch.equal(plain[0], plain[2])
    cache = vlm.adapter.tower_cache = TowerCache(1.0)
    for _ in range(2):
        for question, wanted in zip(QUESTIONS, plain, strict=True):
            assert torch.equal(vlm.encode_images(**inputs, questions=[question])[0], wanted)
    assert cache.counts == {"num_hits": 5, "num_misses": 1}, "the tower itself ran once"


@torch.no_grad()
def test_clip_reads_the_question_and_its_image_model_is_the_tower(clip: Path) -> None:
    """By Hugging Face's own calls: text embeddings of eight tokens each, the patches of the second-last layer."""
    vlm = model(vzip.CDPruner(BUDGET, text_encoder=str(clip)))
    inputs, question = tiny.llava_inputs(2), "what is it? what is that?"
    visual = vlm.asked(vlm.adapter.read_inputs(**inputs), [question, "what?"])
    whole, tokenizer = CLIPModel.from_pretrained(clip).eval(), tiny.tokenizer()
    for text, rows in zip((question, "what?"), visual.texts, strict=True):
        ids = tokenizer(text)["input_ids"]
        ids = torch.tensor(ids + [0] * (-len(ids) % 8)).view(-1, 8)
        assert len(rows) == len(ids)
        pooled = whole.text_model(input_ids=ids).pooler_output
        torch.testing.assert_close(rows, whole.text_projection(pooled), rtol=0, atol=1e-6)
    assert len(visual.texts[0]) > 1 and len(visual.texts[1]) == 1
    vision = vlm.adapter.image_output(visual, frozenset({Signal("hidden", -2)}))
    beside = vlm.adapter.beside(vision, vlm.compressor, visual.texts, [1, 1])
    wanted = whole.visual_projection(whole.vision_model.post_layernorm(vision.read(Signal("hidden", -2))))
    torch.testing.assert_close(beside.read(Signal("aligned", -2)), wanted, rtol=0, atol=1e-6)
    kept = vlm.compressor(beside).tokens
    for tokens, own in zip(vlm.encode_images(**inputs, questions=[question, "what?"]), kept, strict=True):
        torch.testing.assert_close(tokens, own)
    positive = vzip.CDPruner(BUDGET, text_encoder=str(clip), relevance="positive")
    assert not torch.equal(positive(beside).source_index, vlm.compressor(beside).source_index)
    first = vlm.adapter.text_encoder
    vlm.encode_images(**inputs, questions=["what?"] * 2)
    assert vlm.adapter.text_encoder is first, "loaded once"


def test_a_text_model_that_is_not_the_towers_is_refused_before_weights_are_read(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextEncoder, "load", lambda *_: pytest.fail("loaded"))
    own = vzip.CDPruner(BUDGET, text_encoder=str(clip))
    for built, message in (
        (tiny.llava(num_layers=5), r"is not this vision tower \(num_hidden_layers 4, not 5\).*text_encoder=null"),
        (tiny.llava("siglip", "full"), "this vision tower is of type siglip_vision_model"),
    ):
        with pytest.raises(ConfigError, match=message):
            vzip.CompressedVlm(built, own)
        assert vzip.CompressedVlm(built, vzip.CDPruner(BUDGET)), "the language model's embeddings serve all"
    for name, error, message in (
        ("no where", ConfigError, "neither a directory here nor a hub id"),
        ("openai/clip-vit-large-patch14-336", CheckpointError, r"compressor.text_encoder=openai/.* at revision ce19dc"),
    ):
        with pytest.raises(error, match=message):
            model(vzip.CDPruner(BUDGET, text_encoder=name))
    tiny.llava().config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is of type llava: must be a whole CLIP model"):
        model(vzip.CDPruner(BUDGET, text_encoder=str(tmp_path)))


def test_an_incomplete_text_model_is_refused(clip: Path, tmp_path: Path) -> None:
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    vlm = model(vzip.CDPruner(BUDGET, text_encoder=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"1 parameters are not in the checkpoint \(text_projection.weight\)"):
        vlm.encode_images(**tiny.llava_inputs(1), questions=["What?"])


def dialogue(compressor: vzip.Compressor, positions: Any = None) -> vzip.CompressedVlm:
    processor = tiny.processor()
    return vzip.CompressedVlm(tiny.llava(vocab_size=320), compressor, processor, positions=positions)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "repacked"])
@pytest.mark.parametrize("pruner", [None, vzip.FastV(1, 5)], ids=["whole", "pruned"])
def test_a_dialogue_is_what_asking_it_from_scratch_gives(pruner: vzip.Pruner | None, positions: str) -> None:
    vlm = dialogue(vzip.MMTok(BUDGET), positions)
    vlm.pruner = pruner
    images = [_picture(1), _picture(2)]
    chat, messages = vlm.chat(), []
    for turn, (question, new) in enumerate(
        [
            ("what is the red thing?", images[:1]),
            ("count green boats", images[1:]),
            ("count dogs", []),
            ("count dogs", []),
        ]
    ):
        content = [*({"type": "image"} for _ in new), {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        said = chat.ask(question, new, max_new_tokens=4)
        assert [each.num_visual_tokens for each in chat.visuals] == [9] * len(chat.visuals)
        prompt: Any = vlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = vlm.build_inputs([prompt], [images[: len(chat.visuals)]])
        ids = vlm.generate(**inputs, questions=[question], max_new_tokens=4, do_sample=False)
        assert chat._layout.read(ids[0].tolist()) == said, turn
        tokens = vlm.encode_images(inputs["pixel_values"], questions=[question] * len(chat.visuals))
        for each, wanted in zip(chat.visuals, tokens, strict=True):
            torch.testing.assert_close(each.tokens, wanted)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})


def _picture(seed: int) -> Image.Image:
    values = torch.randint(0, 256, (60, 90, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.to(torch.uint8).numpy())


def test_a_dialogues_images_wait_for_the_question_and_keep_their_method() -> None:
    vlm = dialogue(vzip.MMTok(BUDGET))
    chat = vlm.chat()
    added = chat.add_image(_picture(1))
    assert added.num_visual_tokens == 9 and added.tokens is None
    vlm.compressor = vzip.VisionZip(vzip.TokenBudget(4, 1))
    chat.add_image(_picture(2))
    chat.ask("what?", max_new_tokens=1)
    first = [each.tokens for each in chat.visuals]
    assert [len(tokens) for tokens in first if tokens is not None] == [9, 5]
    chat.ask("count the dogs", max_new_tokens=1)
    second = [each.tokens for each in chat.visuals]
    assert not torch.equal(second[0], first[0]) and torch.equal(second[1], first[1])


def test_training_refuses_them() -> None:
    settings: Any = SimpleNamespace(template=None)  # nothing more is looked at
    with pytest.raises(ConfigError, match=r"MMTok is text-aware.*a training encodes each image once"):
        choose_trainable(model(), settings, in_float32=True)
