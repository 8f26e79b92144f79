"""Engines of vLLM with the plug-in, and what ``CompressedVlm`` answers to the same prompts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

import vzip
from vzip.demo.dialogues import scene_of
from vzip.demo.questions import reading_questions
from vzip.demo.render import render
from vzip.serving import ARCHITECTURES

# One process, so that an error comes out as it is raised; a fixed cache, so that several engines fit.
# vLLM reads its environment once in a process, so what the test of two processes needs stands here.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else each process would want a NUMA node of its own
}
BUDGET = {"num_dominant": 54, "num_contextual": 10}
NUM_NEW_TOKENS = 8
_alive: list[Any] = []  # an engine that is collected takes the process group of the others with it


@dataclass
class Asked:
    """A prompt with one placeholder an image.

    Attributes:
        images: in the order of their placeholders.
        text: of the question.
        budget: of the request; empty: the server's.
    """

    images: Sequence[Image.Image]
    text: str
    budget: Mapping[str, int] = field(default_factory=dict)

    def ids(self, tokenizer: Any) -> list[int]:
        return tokenizer("USER: " + "<image>\n" * len(self.images) + self.text + " ASSISTANT:")["input_ids"]


def scene_questions(count: int, first: int = 0, **of_each: Any) -> list[Asked]:
    """Questions that the built-in model's images answer; every second image is oblong, so padding matters."""
    scenes = [scene_of(index) for index in range(first, first + count)]
    images = [render(scene) for scene in scenes]
    images = [image.crop((0, 0, 336, 250)) if number % 2 else image for number, image in enumerate(images)]
    return [
        Asked([image], reading_questions(scene)[0].text, **of_each) for image, scene in zip(images, scenes, strict=True)
    ]


def start(checkpoint: str, compressor: Any = "visionzip", budget: Any = BUDGET, **settings: Any) -> Any:
    """An engine; ``settings`` of ``vzip`` by name, all others are vLLM's."""
    os.environ.update(SETTINGS)
    from vllm import LLM
    from vllm.transformers_utils.config import get_config

    (stock,) = get_config(checkpoint, trust_remote_code=False).architectures
    own = {name: settings.pop(name) for name in ("preprocess", "projector", "row_newline") if name in settings}
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": 32, "max_num_seqs": 32}
    usual |= {"limit_mm_per_prompt": {"image": 2}, "seed": 0}
    llm = LLM(
        model=checkpoint,
        hf_overrides={
            "architectures": [ARCHITECTURES[stock]],
            "vzip": {"compressor": compressor, "budget": budget, **own},
        },
        **{**usual, **settings},
    )
    _alive.append(llm)
    return llm


def ask(llm: Any, asked: Sequence[Asked]) -> list[Any]:
    """vLLM's outputs, with the log-probability of each new token, for a batch."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts = []
    for each in asked:
        prompt = {"prompt_token_ids": each.ids(tokenizer), "multi_modal_data": {"image": list(each.images)}}
        if each.budget:
            prompt["mm_processor_kwargs"] = {"vzip": dict(each.budget)}
        prompts.append(prompt)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW_TOKENS, logprobs=0)
    return llm.generate(prompts, sampling, use_tqdm=False)


def expected(vlm: vzip.CompressedVlm, asked: Asked) -> tuple[list[int], float, int]:
    """By ``CompressedVlm`` alone: the new tokens, the first one's log-probability, the tokens of the prompt."""
    compressor = vlm.compressor
    if asked.budget:
        vlm.compressor = vzip.VisionZip(vzip.TokenBudget(**asked.budget))
    ids = torch.tensor([asked.ids(vlm.processor.tokenizer)])
    inputs = vlm.adapter.prepare_images(asked.images, vlm.processor.image_processor, vlm.preprocess)
    with torch.no_grad():
        new = vlm.generate(ids, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, **inputs)
        logits = vlm.forward(ids, **inputs).logits[0, -1]
        length = vlm.prepare(ids, **inputs).inputs_embeds.shape[1]
    vlm.compressor = compressor
    return new[0].tolist(), float(logits.log_softmax(-1)[new[0, 0]]), length


def check(llm: Any, vlm: vzip.CompressedVlm, asked: Sequence[Asked]) -> list[Any]:
    """All answers equal, prompts of the same length, first tokens of the same probability; vLLM's outputs."""
    outputs = ask(llm, asked)
    for output, each in zip(outputs, asked, strict=True):
        tokens, logprob, length = expected(vlm, each)
        answer = output.outputs[0]
        assert list(answer.token_ids) == tokens
        assert len(output.prompt_token_ids) == length
        assert abs(answer.logprobs[0][tokens[0]].logprob - logprob) < 1e-4
    return outputs
