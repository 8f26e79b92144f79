"""Models whose memory is both estimated and measured: a tiny one, and one of some tens of millions of parameters."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from tests import tiny
from tests.train.kit import BUDGET, LAUNCH, SETTINGS
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

import vzip
from vzip.bench.memory.estimate import estimate_inference, estimate_training
from vzip.bench.memory.measure import measure_inference, measure_training
from vzip.bench.memory.model_shape import ModelShape
from vzip.bench.memory.workload import Workload
from vzip.train.settings import LaunchSettings, TrainSettings

CPU = torch.device("cpu")


def tiny_shape(compressor: Any = None) -> ModelShape:
    """Sixty thousand parameters, so that nearly all memory is activations."""
    return ModelShape(tiny.llava().config, compressor or vzip.VisionZip(BUDGET))


def wide_shape(compressor: Any = None) -> ModelShape:
    """31 million parameters: a CLIP tower of the true number of patches, grouped queries, another width."""
    tower = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=8000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=7, vision_feature_layer=-2)
    budget = vzip.TokenBudget(num_dominant=54, num_contextual=10)
    return ModelShape(config, compressor or vzip.VisionZip(budget))


def settings(load: Workload, **changes: Any) -> tuple[TrainSettings, LaunchSettings]:
    """Two batches of this load a step; keyword arguments change whichever object has them."""
    changes = {"batch_size": load.num_images, "samples_per_step": 2 * load.num_images, **changes}
    train = {f.name for f in dataclasses.fields(SETTINGS)} & set(changes)
    launch = {f.name for f in dataclasses.fields(LAUNCH)} & set(changes)
    return (
        dataclasses.replace(SETTINGS, **{name: changes[name] for name in train}),
        dataclasses.replace(LAUNCH, **{name: changes[name] for name in launch}),
    )


def both(shape: ModelShape, load: Workload, trains: bool = True, **changes: Any) -> tuple[Counter[str], int]:
    """The estimate and the measured peak of the same work."""
    train, launch = settings(load, **changes)
    dtype = getattr(torch, train.precision)
    if not trains:
        return estimate_inference(shape, dtype, load), measure_inference(shape.with_random_weights(CPU, dtype), load)
    estimated = estimate_training(shape, train, launch, load)
    return estimated, measure_training(shape.with_random_weights(CPU, dtype), train, launch, load)
