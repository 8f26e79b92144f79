"""Other methods than VisionZip, by configuration alone; tuned weights; either way to prepare images; embeddings."""

from __future__ import annotations

import pytest
import torch
from tests.serving.end_to_end import engines
from tests.serving.end_to_end.engines import ask, check, scene_questions

import vzip
from vzip.methods import find_method
from vzip.models.weights.tuned import describe, save_tuned

pytestmark = pytest.mark.serve


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("divprune", {}),  # of the projected tokens
        ("prumerge", {}),  # by the last layer, which the model itself does not use
        ("visionzip", {"merge_rule": "mean", "score_layer": 3}),
    ],
)
def test_another_method(tiny_path, name, settings):
    engine = engines.start(tiny_path, {"name": name, **settings}, max_num_seqs=8)
    compressor = find_method(name).build(vzip.TokenBudget(**engines.BUDGET), **settings)
    check(engine, vzip.load_vlm("vzip/tiny", compressor=compressor), scene_questions(6))


def test_without_compression_and_without_padding(tiny_path):
    """Images as Hugging Face's processor prepares them: it cuts the middle out of an oblong one."""
    engine = engines.start(tiny_path, "none", None, preprocess="hf", max_num_seqs=8)
    check(engine, vzip.load_vlm("vzip/tiny", preprocess="hf"), scene_questions(4))


def test_a_tuned_projector(tiny_path, tmp_path):
    compressor = vzip.VisionZip(vzip.TokenBudget(**engines.BUDGET))
    base = vzip.load_vlm("vzip/tiny", compressor=compressor)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: p.detach() * (1 + 0.2 * torch.randn(p.shape, generator=generator))
        for name, p in base.model.named_parameters()
        if "multi_modal_projector" in name
    }
    save_tuned(tmp_path / "final", tensors, describe(base.adapter, compressor, "vzip/tiny", None, ["projector"]))
    engine = engines.start(tiny_path, projector=str(tmp_path / "final"), max_num_seqs=8)
    tuned = vzip.load_vlm("vzip/tiny", compressor=compressor, projector=tmp_path / "final")
    asked = scene_questions(6)
    outputs = check(engine, tuned, asked)
    untuned = [engines.expected(base, each)[1] for each in asked]
    logprobs = [output.outputs[0].logprobs[0][output.outputs[0].token_ids[0]].logprob for output in outputs]
    assert max(abs(a - b) for a, b in zip(logprobs, untuned, strict=True)) > 1e-3


@pytest.mark.parametrize("num_images", [2, 0])
def test_embeddings_made_elsewhere(tiny_path, num_images):
    """What carries text-aware methods: tokens of any number go through as they are, also where no tower is loaded."""
    from vllm import SamplingParams

    vlm = vzip.load_vlm("vzip/tiny")
    limit = {"image": num_images}
    engine = engines.start(tiny_path, enable_mm_embeds=True, limit_mm_per_prompt=limit, max_num_seqs=8)
    prompts, wanted = [], []
    for asked, budget in zip(scene_questions(3), ((54, 10), (27, 5), (8, 0)), strict=True):
        vlm.compressor = find_method("mmtok").build(vzip.TokenBudget(*budget))
        inputs = vlm.adapter.prepare_images(asked.images, vlm.processor.image_processor, vlm.preprocess)
        ids = asked.ids(vlm.processor.tokenizer)
        with torch.no_grad():
            (rows,) = vlm.encode_images(questions=[asked.text], **inputs)
            new = vlm.generate(torch.tensor([ids]), questions=[asked.text], max_new_tokens=8, do_sample=False, **inputs)
        prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": rows[None]}})
        wanted.append(new[0].tolist())
    # All at once: different numbers of tokens meet in a step, which vLLM's own class does not survive.
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    if num_images:
        assert ask(engine, scene_questions(1))[0].outputs[0].token_ids
