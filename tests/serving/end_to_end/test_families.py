"""A SigLIP tower, and LLaVA-NeXT with images of six sizes: small random models, answers and probabilities equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.serving.end_to_end import engines
from tests.serving.end_to_end.engines import Asked, check, scene_questions
from transformers import CLIPVisionConfig, LlamaConfig, LlavaProcessor, SiglipVisionConfig

import vzip
from vzip.models.weights import from_config as fresh

pytestmark = pytest.mark.serve

SIDE = 112  # of a crop: 64 patches
BUDGET = {"num_dominant": 12, "num_contextual": 4}
SIZES = [(112, 112), (300, 90), (90, 300), (224, 224), (500, 333), (37, 61)]  # (width, height)


def write(family: str, tower: type, directory: Path, **of_family: object) -> str:
    """A random checkpoint, its attention sharp and its answers about the image, with heads of a width vLLM has."""
    tokenizer = LlavaProcessor.from_pretrained(engines_tiny()).tokenizer
    vision = tower(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(0)
    strategy = "default" if tower is CLIPVisionConfig else "full"
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = fresh.family_config(family, vision, text, image_token, -2, strategy, **of_family)
    model = fresh.new_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(8.0 if tower is CLIPVisionConfig else 3.0)
            elif "language_model" in name and parameter.ndim == 2:
                parameter.mul_(4.0)
    model.save_pretrained(directory)
    fresh.new_processor(config, tokenizer, "").save_pretrained(directory)
    return str(directory)


def engines_tiny() -> str:
    from vzip.models.hub import built_in_folder

    return str(built_in_folder())


def test_a_siglip_tower(tmp_path):
    path = write("llava", SiglipVisionConfig, tmp_path / "model")
    engine = engines.start(path, budget=BUDGET, max_num_seqs=8)
    vlm = vzip.load_vlm(path, compressor=vzip.VisionZip(vzip.TokenBudget(**BUDGET)), preprocess="llava")
    check(engine, vlm, scene_questions(6))


@pytest.mark.parametrize("row_newline", [False, True])
def test_llava_next_with_images_of_six_sizes(tmp_path, row_newline):
    path = write("llava_next", CLIPVisionConfig, tmp_path / "model", image_grid_pinpoints=fresh.pinpoints(SIDE))
    engine = engines.start(path, budget=BUDGET, max_num_seqs=8, row_newline=row_newline, max_model_len=2048)
    compressor = vzip.VisionZip(vzip.TokenBudget(**BUDGET))
    vlm = vzip.load_vlm(path, compressor=compressor, preprocess="llava", row_newline=row_newline)
    asked = [
        Asked([each.images[0].resize(size)], each.text)
        for each, size in zip(scene_questions(len(SIZES)), SIZES, strict=True)
    ]
    outputs = check(engine, vlm, [*asked, Asked([asked[1].images[0], asked[4].images[0]], "Which?")])
    assert len({len(output.prompt_token_ids) for output in outputs}) > 3
