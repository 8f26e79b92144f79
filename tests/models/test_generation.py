"""Options of generation against the stock model, arguments that are the wrapper's own, long prompts, strange ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from tests import tiny
from tests.tiny import FAMILIES, IMAGE_TOKEN, Family
from transformers import GenerationConfig, LlamaConfig, LogitsProcessor, TextStreamer

import vzip
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.models.generation import max_positions

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


def stock_ids(family: Family, model: Any, ids: list[int], inputs: dict[str, Any]) -> torch.Tensor:
    (length,) = family.stock_lengths(model, inputs)
    return torch.tensor([[token for i in ids for token in [i] * (length if i == family.token else 1)]])


class Marks(LogitsProcessor):
    """A user's own: makes the model say what stood in the prompt's second place, and its length."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, input_ids[:, 1] if input_ids.shape[1] % 2 else input_ids.shape[1] % scores.shape[1]] = 1e4
        return scores


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "both, with beams": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "num_beams": 3},
    "a word that begins in the prompt": {"sequence_bias": {(8, 20): 50.0}},
    "several answers": {"do_sample": True, "repetition_penalty": 3.0, "num_return_sequences": 2},
    "a first token": {"forced_bos_token_id": 9},
    "a generation config": {"generation_config": GenerationConfig(repetition_penalty=1.8, max_new_tokens=8)},
    "own processors": {"logits_processor": [Marks()]},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_options_that_see_the_prompts_ids_do_what_they_do_in_the_stock_model(family: Family, option: str) -> None:
    model = family.build()
    inputs, settings = family.inputs(1), {"max_new_tokens": 8, **OPTIONS[option]}
    ids = [1, 5, 6, family.token, 7, 8]
    whole = stock_ids(family, model, ids, inputs)
    torch.manual_seed(0)
    stock = model.generate(whole, attention_mask=torch.ones_like(whole), **family.stock(inputs), **settings)[
        :, whole.shape[1] :
    ]
    torch.manual_seed(0)
    vlm = vzip.CompressedVlm(model, vzip.Identity())
    assert torch.equal(vlm.generate(torch.tensor([ids]), **inputs, **settings), stock)
    plain = vlm.generate(torch.tensor([ids]), **inputs, max_new_tokens=8)
    if family is FAMILIES[0] and option != "a first token":
        assert not torch.equal(plain, stock[:1]), "the option has no effect here"


def test_the_models_own_generation_config_is_obeyed_alike() -> None:
    model = tiny.llava(vocab_size=320)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), tiny.processor())
    inputs = vlm.build_inputs(["<image> what is it?"], [[Image.new("RGB", (9, 9), "red")]])
    given = vlm.generate(**inputs, max_new_tokens=8, repetition_penalty=1.8)
    plain = vlm.generate(**inputs, max_new_tokens=8)
    model.generation_config.repetition_penalty = 1.8
    assert torch.equal(vlm.generate(**inputs, max_new_tokens=8), given) and not torch.equal(plain, given)
    said: list[torch.Tensor] = []
    processor: Any = vlm.processor
    processor.chat_template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] or '<image> ' }}"
    processor.chat_template += "{% endfor %}{% endfor %}"
    chat = vlm.chat()
    read = chat._layout.read
    chat._layout.read = lambda ids: (said.append(torch.tensor([ids])), read(ids))[1]  # type: ignore[method-assign]
    chat.ask("what is it?", [Image.new("RGB", (9, 9), "red")], max_new_tokens=8)
    assert torch.equal(said[0], given)


def test_a_batch_is_penalised_as_its_prompts_alone() -> None:
    """Whatever stands in the padding; the placeholder lies outside the vocabulary."""
    model = tiny.llava(vocab_size=320)
    model.config.image_token_id = 320
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET))
    ids = torch.tensor([[3, 3, 3, 5, 6, 320, 7], [1, 320, 9, 9, 8, 7, 6], [3, 3, 3, 3, 12, 11, 10]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 12, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    pixels = tiny.pixels(2)
    batch = vlm.generate(ids, mask, pixel_values=pixels, **settings)
    for row, own in enumerate((pixels[:1], pixels[1:], None)):
        alone = vlm.generate(ids[row : row + 1], mask[row : row + 1], pixel_values=own, **settings)
        assert torch.equal(batch[row : row + 1], alone)


def test_a_streamer_and_an_output_object_get_the_answer_alone(capsys: pytest.CaptureFixture[str]) -> None:
    vlm = vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET), tiny.processor())
    processor: Any = vlm.processor
    inputs = vlm.build_inputs(["<image> what is it?"], [[Image.new("RGB", (9, 9))]])
    expected = vlm.generate(**inputs, max_new_tokens=4)
    for skips in (True, False):
        vlm.generate(**inputs, max_new_tokens=4, streamer=TextStreamer(processor.tokenizer, skip_prompt=skips))
        assert capsys.readouterr().out == processor.tokenizer.decode(expected[0]) + "\n"
    output = vlm.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, expected) and len(output.scores) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", torch.nn.Linear(1, 1)),
        ("prompt_lookup_num_tokens", 2),
        ("guidance_scale", 1.5),
        ("encoder_repetition_penalty", 1.2),
        ("encoder_no_repeat_ngram_size", 2),
        ("prefill_chunk_size", 4),
        ("token_healing", True),
    ],
)
def test_options_that_cannot_have_the_images_are_refused_by_name(name: str, value: Any) -> None:
    model = tiny.llava(vocab_size=320)
    vlm = vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), tiny.processor())
    ids = torch.tensor([[5, IMAGE_TOKEN, 6]])
    with pytest.raises(ConfigError, match=rf"generate\({name}=.*ids alone, without the images"):
        vlm.generate(ids, pixel_values=tiny.pixels(1), **{name: value})
    setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError, match=rf"generate\({name}=.*generation_config\.json"):
        vlm.generate(ids, pixel_values=tiny.pixels(1))
    with pytest.raises(ConfigError, match=name):
        vlm.chat().ask("what?")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_arguments_of_a_step_that_is_the_wrappers_are_obeyed_or_refused(family: Family) -> None:
    vlm = vzip.CompressedVlm(family.build(), vzip.VisionZip(BUDGET))
    layer, strategy = vlm.model.config.vision_feature_layer, vlm.model.config.vision_feature_select_strategy
    ids, inputs = torch.tensor([[5, family.token, 6]]), family.inputs(1)
    wrong: dict[str, Any] = {
        "vision_feature_layer": -3,
        "vision_feature_select_strategy": "full" if strategy == "default" else "default",
        "interpolate_pos_encoding": True,
        "mm_encoder_outputs": torch.zeros(1),
        "vision_aspect_ratio": "anyres",
        "batch_num_images": torch.tensor([2]),
    }
    for call in (vlm.forward, vlm.generate, vlm.prepare):
        for name, value in wrong.items():
            with pytest.raises(PromptError, match=name):
                call(ids, **inputs, **{name: value})
    with pytest.raises(PromptError, match=rf"vision_feature_layer=\[-2, -3\].*vision_feature_layer={layer}\)"):
        vlm.forward(ids, **inputs, vision_feature_layer=[-2, -3])
    # What the model does anyway may be said.
    said = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy, "mm_encoder_outputs": None}
    assert torch.equal(vlm.forward(ids, **inputs, **said).logits, vlm.forward(ids, **inputs).logits)
    assert vlm.generate(ids, **inputs, **said, max_new_tokens=1).shape == (1, 1)


def test_inputs_of_other_families_are_refused() -> None:
    vlm = vzip.CompressedVlm(tiny.llava(), vzip.VisionZip(BUDGET))
    ids, pixels = torch.tensor([[5, IMAGE_TOKEN, 6]]), tiny.pixels(1)
    for call in (vlm.forward, vlm.generate):
        with pytest.raises(PromptError, match="image_sizes: no input of Llava"):
            call(ids, pixel_values=pixels, image_sizes=torch.tensor([[9, 9]]))
        with pytest.raises(UnsupportedModelError, match="no video tower"):
            call(ids, pixel_values=pixels, pixel_values_videos=pixels[None])


ROPES: list[tuple[dict[str, Any], int]] = [
    ({}, 100),
    ({"rope_type": "linear", "factor": 4.0}, 400),
    ({"rope_type": "dynamic", "factor": 2.0}, 200),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100}, 400),
    # Llama 3.1's limit is the scaled one already.
    ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 10, "low_freq_factor": 1.0}, 100),
]


@pytest.mark.parametrize(("rope", "limit"), ROPES)
def test_the_tokens_a_model_reads(rope: dict[str, Any], limit: int) -> None:
    of_rope = {"rope_parameters": {"rope_theta": 1e4, "high_freq_factor": 4.0, **rope}} if rope else {}
    assert max_positions(LlamaConfig(max_position_embeddings=100, **of_rope)) == limit


def limited(limit: int, **rope: Any) -> vzip.CompressedVlm:
    model = tiny.llava(vocab_size=320)
    text = model.config.text_config
    text.max_position_embeddings = limit
    text.rope_parameters = {**text.rope_parameters, **rope}
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), tiny.processor())


def test_a_prompt_longer_than_the_model_reads_is_refused_before_anything_is_encoded() -> None:
    ids, pixels = torch.tensor([[3, 5, IMAGE_TOKEN, 6], [5, IMAGE_TOKEN, 6, 7]]), tiny.pixels(2)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    vlm = limited(11)
    vlm.adapter.encode = None  # type: ignore[method-assign, assignment]  # calling it would fail
    for call in (vlm.forward, vlm.generate, vlm.prepare):
        with pytest.raises(PromptError, match=r"Prompt 1 is 12 tokens long, but the language model reads 11 \(max_"):
            call(ids, mask, pixel_values=pixels)
    vlm = limited(15)
    with pytest.raises(PromptError, match=r"Prompt 1 is 12 .* its answer up to 4, but .* 15 .*: lower max_new_tokens"):
        vlm.generate(ids, mask, pixel_values=pixels, max_new_tokens=4)
    with pytest.raises(PromptError, match="its answer up to 5"):
        vlm.generate(ids, mask, pixel_values=pixels, max_length=17)
    assert vlm.generate(ids, mask, pixel_values=pixels, max_new_tokens=3).shape == (2, 3)
    vlm.compressor = vzip.Identity()
    with pytest.raises(PromptError, match="Prompt 1 is 67 tokens long"):
        vlm.forward(ids, mask, pixel_values=pixels)
    assert limited(11, rope_type="linear", factor=2.0).forward(ids, mask, pixel_values=pixels).logits.shape[1] == 12


@pytest.mark.parametrize("pad", [-1, -100, 320, 10**6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_mask_excludes_may_be_no_word_at_all(pad: int, side: str) -> None:
    vlm = vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET))
    words, pixels = [5, IMAGE_TOKEN, 6, 7], tiny.pixels(1)
    padded = [pad, pad, *words] if side == "left" else [*words, pad, pad]
    ids, mask = torch.tensor([padded]), torch.tensor([[int(i != pad) for i in padded]])
    alone = torch.tensor([words])
    for given in (ids, torch.where(mask.bool(), ids, IMAGE_TOKEN)):  # a placeholder there stands for nothing either
        logits = vlm.forward(given, mask, pixel_values=pixels).logits
        assert torch.equal(logits, vlm.forward(alone, pixel_values=pixels).logits)
    settings = {"max_new_tokens": 4, "repetition_penalty": 1.7}
    assert torch.equal(
        vlm.generate(ids, mask, pixel_values=pixels, **settings), vlm.generate(alone, pixel_values=pixels, **settings)
    )
    labels = torch.where(mask.bool(), ids, -100)
    assert vlm.forward(ids, mask, labels=labels, pixel_values=pixels).loss.isfinite()
    for call in (vlm.forward, vlm.generate, vlm.prepare):
        with pytest.raises(PromptError, match=rf"Prompt 0 holds the ids {pad}: the text embedding has rows 0 to 319"):
            call(ids, pixel_values=pixels)


@pytest.mark.parametrize("label", [-1, 320, 10**6])
def test_labels_that_are_no_words_are_refused_and_those_that_do_not_count_may_be_anything(label: int) -> None:
    vlm = vzip.CompressedVlm(tiny.llava(vocab_size=320), vzip.VisionZip(BUDGET))
    ids, mask, pixels = torch.tensor([[0, 5, IMAGE_TOKEN, 6, 7]]), torch.tensor([[0, 1, 1, 1, 1]]), tiny.pixels(1)
    good = torch.tensor([[-100, -100, -100, 6, 7]])
    anything = torch.tensor([[label, -100, label, 6, 7]])  # padding and placeholders have none in the result
    losses = [vlm.forward(ids, mask, labels=own, pixel_values=pixels).loss for own in (good, anything)]
    assert torch.equal(*losses)
    for call in (vlm.forward, vlm.prepare):
        with pytest.raises(
            PromptError, match=rf"labels of prompt 0 hold {label}: must be words of the model, 0 to 319"
        ):
            call(ids, mask, labels=torch.tensor([[-100, -100, -100, label, 7]]), pixel_values=pixels)
        with pytest.raises(PromptError, match=r"labels is torch.float32 of shape \(1, 5\): must be integers"):
            call(ids, mask, labels=good.float(), pixel_values=pixels)
        with pytest.raises(PromptError, match=r"labels is torch.int64 of shape \(1, 4\)"):
            call(ids, mask, labels=good[:, 1:], pixel_values=pixels)


def test_a_tokenizer_with_more_words_than_the_model_is_named_in_a_dialogue() -> None:
    processor = tiny.processor()
    processor.tokenizer.add_tokens(["zebra"])
    vlm = vzip.CompressedVlm(tiny.llava(vocab_size=260), vzip.VisionZip(BUDGET), processor)
    with pytest.raises(PromptError, match=r"The dialogue holds the ids 2\d\d.*rows 0 to 259"):
        vlm.chat().ask("zebra?")
