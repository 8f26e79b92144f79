"""Estimated peaks against measured ones and against counts made by hand; the measure against a second one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.bench.memory.conftest import CPU, both, settings, tiny_shape, wide_shape
from tests.families import FAMILIES
from tests.tiny import Family

import vzip
from vzip.bench.device_memory import kv_cache_formula_bytes
from vzip.bench.memory import measure
from vzip.bench.memory.estimate import BUCKET_NUMBERS, BUCKETS, GATHERED, estimate_inference, estimate_training
from vzip.bench.memory.live_bytes import ACTIVATIONS, CACHE, GRADIENTS, OPTIMIZER, WEIGHTS, LiveBytes
from vzip.bench.memory.model_shape import ModelShape
from vzip.bench.memory.workload import Workload, tensors_of, training_batch
from vzip.train.objective import AnswerLoss
from vzip.train.settings import LoraSettings
from vzip.train.trainable import prepare_training

LORA = LoraSettings(r=4, alpha=8, dropout=0.1, target_modules=("q_proj", "down_proj"), learning_rate=None)
EVERYTHING = ("projector", "language_model", "vision_tower")
LOAD = Workload(num_images=4, num_dialogues=1, length=120)
PROJECTOR = 32 * 32 + 32 + 32 * 32 + 32  # two layers with biases


@pytest.mark.parametrize(
    ("load", "compressor", "changes"),
    [
        (LOAD, None, {}),
        (LOAD, None, {"gradient_checkpointing": True}),
        (Workload(1, 3, 60), None, {"lora": LORA}),
        (LOAD, None, {"parts": EVERYTHING}),
    ],
    ids=["projector", "checkpointing", "lora, three dialogues", "everything"],
)
def test_a_training_is_estimated_as_it_is_measured(load: Workload, compressor: Any, changes: dict[str, Any]) -> None:
    estimated, measured = both(tiny_shape(compressor), load, **changes)
    assert estimated.total() == pytest.approx(measured, rel=0.05)
    assert estimated[ACTIVATIONS] > measured / 4  # not a sum of weights alone


def test_an_inference_is_estimated_as_it_is_measured() -> None:
    estimated, measured = both(tiny_shape(), Workload(4, 1, 120, num_new_tokens=8), trains=False)
    assert estimated.total() == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_every_family_is_estimated_as_it_is_measured(family: Family, trains: bool) -> None:
    model = family.build()
    budget = vzip.TokenBudget(num_dominant=6, num_contextual=3)
    is_video = family.medium == "video"
    if is_video and trains:
        pytest.skip("trainings have no videos")
    load = Workload(2, 1, 200, num_new_tokens=0 if trains else 8, num_frames=3 if is_video else None)
    estimated, measured = both(ModelShape(model.config, vzip.VisionZip(budget)), load, trains=trains)
    assert estimated.total() == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("load", "compressor", "changes"),
    [
        (Workload(2, 1, 200), None, {}),
        (Workload(2, 1, 200), None, {"gradient_checkpointing": True}),
        (Workload(4, 1, 200), None, {"precision": "bfloat16"}),
        (Workload(2, 1, 700), vzip.Identity(), {}),
        (Workload(2, 1, 200), None, {"lora": LORA}),
        (Workload(2, 1, 200), None, {"parts": EVERYTHING}),
        (Workload(2, 1, 200, num_new_tokens=20), None, {"trains": False}),
        (Workload(2, 1, 700, num_new_tokens=20), vzip.Identity(), {"trains": False, "precision": "bfloat16"}),
    ],
    ids=["projector", "checkpointing", "bfloat16", "vanilla", "lora", "everything", "inference", "vanilla inference"],
)
def test_a_larger_model_is_estimated_as_it_is_measured(
    load: Workload, compressor: Any, changes: dict[str, Any]
) -> None:
    estimated, measured = both(wide_shape(compressor), load, **changes)
    assert estimated.total() == pytest.approx(measured, rel=0.05)


def test_the_profilers_record_agrees_with_the_count() -> None:
    vlm = tiny_shape().with_random_weights(CPU, torch.float32)
    train, launch = settings(LOAD)
    prepare_training(vlm, train, launch)
    batch, loss, live = training_batch(vlm, LOAD), AnswerLoss(vlm), LiveBytes()
    before = [*vlm.model.parameters(), *vlm.model.buffers(), *tensors_of(batch)]
    live.name(WEIGHTS, before)
    with live:
        loss(batch).sum().backward()
    vlm.model.zero_grad()
    by_profiler = measure._peak(lambda: loss(batch).sum().backward(), CPU, before)
    assert live.peak.total() == pytest.approx(by_profiler, rel=0.02)


def test_what_is_kept_is_counted_to_the_byte() -> None:
    train, launch = settings(LOAD)
    peak = estimate_training(tiny_shape(), train, launch, LOAD)
    vlm = tiny_shape().with_random_weights(CPU, torch.float32)
    assert peak[WEIGHTS] == sum(t.nbytes for t in (*vlm.model.parameters(), *vlm.model.buffers()))
    assert peak[GRADIENTS] == 4 * PROJECTOR
    assert peak[OPTIMIZER] == 8 * PROJECTOR + 4 * 4  # two moments; a counter of steps for each of four tensors


def test_the_cache_is_that_of_the_formula() -> None:
    # So many new tokens that the last one is the worst moment.
    load = Workload(num_images=2, num_dialogues=1, length=100, num_new_tokens=2000)
    peak = estimate_inference(tiny_shape(), torch.bfloat16, load)
    whole, layer = (
        kv_cache_formula_bytes(
            num_layers=count, num_kv_heads=2, head_dim=8, num_tokens=2099, batch_size=2, element_bytes=2
        )
        for count in (2, 1)
    )
    # While a layer's cache grows by a token, the old keys or values are there too.
    assert whole - layer < peak[CACHE] <= whole + layer


def test_what_should_save_memory_does() -> None:
    def activations(shape: ModelShape, length: int, **changes: Any) -> int:
        train, launch = settings(LOAD, **changes)
        return estimate_training(shape, train, launch, Workload(4, 1, length))[ACTIVATIONS]

    tiny_vanilla = activations(tiny_shape(vzip.Identity()), 120)
    assert activations(tiny_shape(), 120 - 64 + 9) < 0.7 * tiny_vanilla
    wide_vanilla = activations(wide_shape(vzip.Identity()), 700)
    assert activations(wide_shape(vzip.Identity()), 700, gradient_checkpointing=True) < 0.8 * wide_vanilla


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_sharing_divides_what_it_divides(strategy: Any) -> None:
    train, launch = settings(LOAD, strategy=strategy, precision="bfloat16", samples_per_step=64)
    single = estimate_training(tiny_shape(), train, settings(LOAD)[1], LOAD)
    peak = estimate_training(tiny_shape(), train, launch, LOAD, num_processes=8)
    if strategy == "ddp":
        assert peak == {**single, BUCKETS: 4 * PROJECTOR}
        return
    assert peak[OPTIMIZER] == 12 * (PROJECTOR // 8)
    assert peak[GRADIENTS] == 2 * PROJECTOR // 8
    assert peak[BUCKETS] == 2 * BUCKET_NUMBERS
    # All of the tiny model's tensors are below the size from which ZeRO-3 shards them.
    vlm = tiny_shape().on_meta_device(torch.bfloat16)
    assert peak[WEIGHTS] == sum(tensor.nbytes for tensor in (*vlm.model.parameters(), *vlm.model.buffers()))
    num_parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    assert peak[GATHERED] == (2 * num_parameters if strategy == "zero3" else 0)


def test_zero3_shards_large_weights() -> None:
    train, launch = settings(LOAD, strategy="zero3", precision="bfloat16", samples_per_step=64)
    peak = estimate_training(wide_shape(), train, launch, Workload(4, 1, 200), num_processes=8)
    model = wide_shape().on_meta_device(torch.bfloat16).model
    kept = [*model.buffers(), *(parameter for parameter in model.parameters() if parameter.numel() < 100_000)]
    large = sum(parameter.nbytes for parameter in model.parameters() if parameter.numel() >= 100_000)
    assert large > 50e6 and peak[WEIGHTS] == sum(tensor.nbytes for tensor in kept) + large // 8


@pytest.mark.parametrize(("quantization", "num_bytes"), [("4bit", 1 / 2 + 4 / 64), ("8bit", 1)])
def test_a_quantized_language_model_is_smaller_by_its_linear_layers(quantization: str, num_bytes: float) -> None:
    load = Workload(1, 1, 100)
    full, packed = (
        estimate_inference(dataclasses.replace(tiny_shape(), quantization=q), torch.bfloat16, load)[WEIGHTS]
        for q in (None, quantization)
    )
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32) * 4 if quantization == "8bit" else 0
    assert full - packed == linear * 2 - int(linear * num_bytes) - rows


def test_eight_bits_keep_the_inputs_that_checkpointing_would_compute_again() -> None:
    train, launch = settings(LOAD, gradient_checkpointing=True, precision="bfloat16")
    shapes = (dataclasses.replace(tiny_shape(), quantization=quantization) for quantization in ("4bit", "8bit"))
    four, eight = (estimate_training(shape, train, launch, LOAD)[ACTIVATIONS] for shape in shapes)
    assert eight > four


def test_a_storage_counts_once_and_for_what_it_is() -> None:
    live, weight = LiveBytes(), torch.zeros(100)
    live.name(WEIGHTS, [weight, weight.view(10, 10)])
    with live:
        kept = weight + 1
        assert live.peak == {WEIGHTS: 400, ACTIVATIONS: 400}
        del kept
        kept = weight * 2
        more = kept.view(4, 25) - kept.view(4, 25).clone()
        assert live.peak == {WEIGHTS: 400, ACTIVATIONS: 1200}
        live.name(GRADIENTS, [more])
        del kept
        live.forget_peak()
    assert live.peak == {WEIGHTS: 400, ACTIVATIONS: 0, GRADIENTS: 400}
