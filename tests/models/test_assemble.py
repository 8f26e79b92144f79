"""A LLaVA of two models that never met: their weights unchanged, one tokenizer, a prompt that training writes too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scripts import assemble_llava
from tests.assembly import IMAGE_SIDE, save_language_model, save_tower
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

import vzip
from vzip.data.conversations import chat, vicuna_v1
from vzip.data.llava_record import Turn
from vzip.errors import CheckpointError, ConfigError, UnsupportedModelError
from vzip.models.assemble import assemble


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with its text tower (``tower``), a tied Llama with grouped heads (``lm``), and both as one (``out``)."""
    folder = tmp_path_factory.mktemp("assembled")
    save_tower(folder / "tower", "clip")
    save_language_model(folder / "lm", tied=True)
    assemble(folder / "tower", folder / "lm", folder / "out")
    return folder


@torch.no_grad()
def test_both_models_are_in_it_unchanged(made: Path) -> None:
    model, report = LlavaForConditionalGeneration.from_pretrained(made / "out", output_loading_info=True)
    assert not any(report.values()), report
    lm = LlamaForCausalLM.from_pretrained(made / "lm").eval()
    ids = torch.arange(3, 11)[None]
    vocabulary = lm.config.vocab_size
    assert torch.equal(model.eval()(input_ids=ids).logits[..., :vocabulary], lm(input_ids=ids).logits)
    assert model.lm_head.weight is model.get_input_embeddings().weight, "tied, as it was"
    assert len(model.lm_head.weight) == vocabulary + 2, "the placeholder's row and padding's"
    tower = CLIPVisionModel.from_pretrained(made / "tower").eval()
    pixels = torch.randn(1, 3, IMAGE_SIDE, IMAGE_SIDE)
    assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    assert model.config.image_seq_length == (IMAGE_SIDE // 16) ** 2


def test_it_is_compressed_like_any_other_model(made: Path) -> None:
    vlm = vzip.load_vlm(made / "out", compressor=vzip.VisionZip(vzip.TokenBudget(4, 2)))
    picture = vlm.preprocess_images([Image.new("RGB", (50, 30))])
    assert vlm.encode_images(**picture)[0].shape == (6, vlm.model.config.text_config.hidden_size)


def test_evaluation_asks_as_training_does(made: Path) -> None:
    processor: Any = vzip.load_vlm(made / "out").processor
    turns = [Turn("user", "<image>\nred?"), Turn("assistant", "no"), Turn("user", "blue?")]
    messages = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    for turn in turns:
        pictures = [{"type": "image"}] * turn.text.count("<image>")
        words = {"type": "text", "text": turn.text.removeprefix("<image>\n")}
        messages.append({"role": turn.role, "content": [*pictures, words]})
    written = "".join(piece.text for piece in vicuna_v1(turns, "Be brief.", processor))
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == written
    assert written == "Be brief. USER: <image>\nred? ASSISTANT: no<|endoftext|>USER: blue? ASSISTANT:"


def test_the_projector_is_new_and_follows_the_seed(made: Path, tmp_path: Path) -> None:
    projectors = []
    for name, seed in (("same", 0), ("other", 1)):
        assemble(made / "tower", made / "lm", tmp_path / name, seed)
        projectors.append(vzip.load_vlm(tmp_path / name).adapter.projector.state_dict())
    first = vzip.load_vlm(made / "out").adapter.projector.state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, projectors[0][name]) and not torch.equal(tensor, projectors[1][name])


def test_a_siglip_tower_and_a_half_precision_language_model(tmp_path: Path) -> None:
    save_tower(tmp_path / "tower", "siglip")
    save_language_model(tmp_path / "lm", tied=False, dtype=torch.bfloat16)
    assemble(tmp_path / "tower", tmp_path / "lm", tmp_path / "out")
    vlm = vzip.load_vlm(tmp_path / "out")
    assert {parameter.dtype for parameter in vlm.model.parameters()} == {torch.bfloat16}
    assert vlm.model.lm_head.weight is not vlm.model.get_input_embeddings().weight
    tower = SiglipVisionModel.from_pretrained(tmp_path / "tower", dtype=torch.bfloat16)
    own = dict(vlm.adapter.vision_tower.named_parameters())
    assert all(torch.equal(own[name], parameter) for name, parameter in tower.named_parameters())
    processor: Any = vlm.processor
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5], "SigLIP's, not CLIP's"
    assert len(vlm.encode_images(**vlm.preprocess_images([Image.new("RGB", (9, 9))]))[0]) == 36, "every patch"


def test_what_cannot_be_put_together(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        assemble(made / "tower", made / "lm", made / "out")
    with pytest.raises(UnsupportedModelError, match="Vision tower of type 'llama' is not supported"):
        assemble(made / "lm", made / "lm", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"tower: the checkpoint cannot be loaded"):
        assemble(made / "tower", made / "tower", tmp_path / "out")
    save_language_model(tmp_path / "endless", tied=True, eos_token=None)
    with pytest.raises(UnsupportedModelError, match="its tokenizer has no end token"):
        assemble(made / "tower", tmp_path / "endless", tmp_path / "out")
    save_tower(tmp_path / "bare", "siglip", with_processor=False)
    with pytest.raises(CheckpointError, match="says how images enter a SigLIP"):
        assemble(tmp_path / "bare", made / "lm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# As instruct models write: a system message first, words alone, no generation prompt after an answer.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|endoftext|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and a language model with a chat template of its own."""
    folder = tmp_path_factory.mktemp("instruct")
    save_tower(folder / "tower", "clip")
    save_language_model(folder / "lm", tied=True)
    (folder / "lm" / "chat_template.jinja").write_text(CHATML)
    return folder


def test_the_language_models_own_chat_template_stays(instruct: Path, tmp_path: Path, capsys: Any) -> None:
    parts = [str(instruct / "tower"), str(instruct / "lm")]
    assert assemble_llava.main([*parts, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: 36 visual tokens an image, the language model's own chat template" in said
    assert "train=projector_new train.template=chat" in said
    processor: Any = vzip.load_vlm(tmp_path / "out").processor
    turns = [Turn("user", "<image>\nred?"), Turn("assistant", "no"), Turn("user", "blue?")]
    words = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>\nred?"}]
    words += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "blue?"}]
    theirs = AutoTokenizer.from_pretrained(instruct / "lm").apply_chat_template(
        words, add_generation_prompt=True, tokenize=False
    )
    pieces = chat(turns, "Be brief.", processor)
    assert "".join(piece.text for piece in pieces) == theirs
    assert [piece.text for piece in pieces if piece.is_target] == ["no<|endoftext|>"]

    assert assemble_llava.main([*parts, str(tmp_path / "vicuna"), "--template", "vicuna"]) == 0
    assert "Vicuna's chat template" in capsys.readouterr().out
    assert vzip.load_vlm(tmp_path / "vicuna").processor.chat_template.startswith("{% for message in messages %}{% if")


def test_a_template_that_is_not_there_and_a_gguf(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lm has no chat template\. Use --template vicuna"):
        assemble(made / "tower", made / "lm", tmp_path / "out", template="own")
    (tmp_path / "quantized").mkdir()
    (tmp_path / "quantized" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for given in (tmp_path / "quantized", tmp_path / "quantized" / "model.Q4_K_M.gguf"):
        with pytest.raises(UnsupportedModelError, match="Convert it to a directory of transformers"):
            assemble(made / "tower", given, tmp_path / "out")
    assert not (tmp_path / "out").exists()
