"""How long answering and training take on a GPU that is not at hand: an estimate from operations and bytes.

A pass through a model takes as long as its matrix products at a share of the GPU's peak, or as reading the weights at a
share of its bandwidth, whichever is longer; a decoded token reads all weights and the cache. What the CPU does (reading
images, starting kernels) is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PretrainedConfig

from vzip.bench import flops


@dataclass(frozen=True)
class Gpu:
    """A GPU by its maker's word; see ``gpus.json``.

    Attributes:
        title: a part of the name that CUDA gives it.
        memory_gib: of one.
        tflops: 10^12 operations a second, at most.
        gb_per_s: memory bandwidth in 10^9 bytes a second.
        source: of these numbers.
    """

    title: str
    memory_gib: float
    tflops: float
    gb_per_s: float
    source: str


@dataclass(frozen=True)
class Assumptions:
    """What no formula gives.

    Attributes:
        utilisation: share of the peak that matrix products reach.
        bandwidth_share: share of the bandwidth that reading weights and cache reaches.
        text_tokens: of a prompt, beside the visual ones.
        sample_text_tokens: of a training sample, likewise.
    """

    utilisation: float = 0.4
    bandwidth_share: float = 0.6
    text_tokens: int = 100
    sample_text_tokens: int = 250


@dataclass(frozen=True)
class ModelWork:
    """What a model has to do for one prompt.

    Attributes:
        text_config: of the language model.
        vision_operations: of tower, projector and whatever lies between them.
        num_visual_tokens: that enter the language model.
        weight_bytes: of the language model.
    """

    text_config: PretrainedConfig
    vision_operations: int
    num_visual_tokens: int
    weight_bytes: int

    @property
    def cache_bytes_per_token(self) -> int:
        text = self.text_config
        heads = text.num_key_value_heads or text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * flops.head_width(text) * 2

    def decoder_operations(self, num_new: int, num_past: int, num_logits: int) -> int:
        counted = flops.decoder_formula(self.text_config, num_new=num_new, num_past=num_past, num_logits=num_logits)
        assert counted is not None, self.text_config.model_type  # all families have a Llama or Mistral
        return counted


@cache
def gpus() -> Mapping[str, Gpu]:
    """The GPUs that are known, by the name one types."""
    content = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
    return {name: Gpu(**fields) for name, fields in content["gpus"].items()}


def question_seconds(
    work: ModelWork, gpu: Gpu, assumed: Assumptions, num_answer_tokens: int, batch_size: int = 1
) -> float:
    """Seconds for one question, of a batch of ``batch_size``."""
    length = work.num_visual_tokens + assumed.text_tokens
    prefill = work.vision_operations + work.decoder_operations(length, 0, 1)
    seconds = _seconds(batch_size * prefill, work.weight_bytes, gpu, assumed)
    for step in range(1, num_answer_tokens):
        past = length + step
        read = work.weight_bytes + batch_size * past * work.cache_bytes_per_token
        seconds += _seconds(batch_size * work.decoder_operations(1, past, 1), read, gpu, assumed)
    return seconds / batch_size


def sample_seconds(work: ModelWork, gpu: Gpu, assumed: Assumptions, num_passes: int) -> float:
    """Seconds for one training sample.

    Args:
        work: of the model.
        gpu, assumed: see their classes.
        num_passes: through the language model, each as costly as a forward one: a forward pass, one back for the
            activations, one more for the weights where they train, one more where activations are computed twice.
    """
    length = work.num_visual_tokens + assumed.sample_text_tokens
    operations = work.vision_operations + num_passes * work.decoder_operations(length, 0, length)
    return operations / (gpu.tflops * 1e12 * assumed.utilisation)


def _seconds(operations: int, num_bytes: int, gpu: Gpu, assumed: Assumptions) -> float:
    of_products = operations / (gpu.tflops * 1e12 * assumed.utilisation)
    return max(of_products, num_bytes / (gpu.gb_per_s * 1e9 * assumed.bandwidth_share))
