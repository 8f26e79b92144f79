"""Estimated peaks against measured ones and against counts made by hand; the measure against a second one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.bench.memory.conftest import CPU, both, settings, tiny_shape, wide_shape
from tests.families import FAMILIES
from tests.tiny import Family

import vzip
from vzip.bench.device_memory import kv_cache_formula_bytes
from vzip.bench.memory import measure, steps
from vzip.bench.memory.estimate import estimate_training
from vzip.bench.memory.ledger import ACTIVATIONS, Ledger
from vzip.bench.memory.meta_device import fill, pretending
from vzip.bench.memory.partition import BUCKET_NUMBERS, BUCKETS, GATHERED, model_size
from vzip.bench.memory.steps import BACKWARD, CACHE, GRADIENTS, OPTIMIZER, WEIGHTS
from vzip.bench.memory.workload import ModelShape, Workload, prompts, tensors_of, training_batch
from vzip.train.objective import AnswerLoss
from vzip.train.settings import LoraSettings

LORA = LoraSettings(r=4, alpha=8, dropout=0.1, target_modules=("q_proj", "down_proj"), learning_rate=None)
EVERYTHING = ("projector", "language_model", "vision_tower")
LOAD = Workload(num_pictures=4, num_dialogues=1, length=120)
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
    assert estimated.total == pytest.approx(measured, rel=0.05)
    assert estimated.num_bytes[ACTIVATIONS] > measured / 4  # not a sum of weights alone


def test_an_inference_is_estimated_as_it_is_measured() -> None:
    estimated, measured = both(tiny_shape(), Workload(4, 1, 120, num_new_tokens=8), trains=False)
    assert estimated.total == pytest.approx(measured, rel=0.1)


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
    assert estimated.total == pytest.approx(measured, rel=0.1)


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
    assert estimated.total == pytest.approx(measured, rel=0.05)


def test_the_profilers_record_agrees_with_the_ledger() -> None:
    vlm = tiny_shape().with_random_weights(CPU, torch.float32)
    train, launch = settings(LOAD)
    steps.prepare_training(vlm, train, launch)
    batch, loss = training_batch(vlm, LOAD), AnswerLoss(vlm)
    ledger = Ledger()
    ledger.name(WEIGHTS, vlm.model.parameters())
    ledger.name(WEIGHTS, vlm.model.buffers())
    ledger.name(ACTIVATIONS, tensors_of(batch))
    with ledger:
        loss(batch).sum().backward()
    vlm.model.zero_grad()
    before = [*vlm.model.parameters(), *vlm.model.buffers(), *tensors_of(batch)]
    by_profiler = measure._peak(lambda: loss(batch).sum().backward(), CPU, before)
    assert ledger.peak().total == pytest.approx(by_profiler, rel=0.02)


def test_what_is_kept_is_counted_to_the_byte() -> None:
    train, launch = settings(LOAD)
    peak = estimate_training(tiny_shape(), train, launch, LOAD).num_bytes
    vlm = tiny_shape().with_random_weights(CPU, torch.float32)
    assert peak[WEIGHTS] == sum(t.nbytes for t in (*vlm.model.parameters(), *vlm.model.buffers()))
    assert peak[GRADIENTS] == 4 * PROJECTOR
    assert peak[OPTIMIZER] == 8 * PROJECTOR + 4 * 4  # two moments; a counter of steps for each of four tensors


def test_the_cache_is_that_of_the_formula() -> None:
    load = Workload(num_pictures=2, num_dialogues=1, length=100, num_new_tokens=50)
    vlm, ledger = tiny_shape().on_paper(torch.bfloat16), Ledger()
    inputs = prompts(vlm, load)
    with pretending():
        fill(vlm.model)
        steps.watch_inference(vlm, inputs, load.num_new_tokens, ledger)
    whole, layer = (
        kv_cache_formula_bytes(
            num_layers=count, num_kv_heads=2, head_dim=8, num_tokens=149, batch_size=2, element_bytes=2
        )
        for count in (2, 1)
    )
    # While a layer's cache grows by a token, the old keys or values are there too.
    assert whole <= ledger.peak(purpose=CACHE).num_bytes[CACHE] <= whole + layer


def test_what_should_save_memory_does() -> None:
    def activations(shape: ModelShape, length: int, **changes: Any) -> int:
        train, launch = settings(LOAD, **changes)
        return estimate_training(shape, train, launch, Workload(4, 1, length)).num_bytes[ACTIVATIONS]

    tiny_vanilla = activations(tiny_shape(vzip.Identity()), 120)
    assert activations(tiny_shape(), 120 - 64 + 9) < 0.7 * tiny_vanilla
    wide_vanilla = activations(wide_shape(vzip.Identity()), 700)
    assert activations(wide_shape(vzip.Identity()), 700, gradient_checkpointing=True) < 0.8 * wide_vanilla


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_sharing_divides_what_it_divides(strategy: Any) -> None:
    train, launch = settings(LOAD, strategy=strategy, precision="bfloat16", samples_per_step=64)
    single = estimate_training(tiny_shape(), train, settings(LOAD)[1], LOAD).num_bytes
    vlm = tiny_shape().on_paper(torch.bfloat16)
    peak = estimate_training(tiny_shape(), train, launch, LOAD, num_processes=8).num_bytes
    if strategy == "ddp":
        assert peak == {**single, BUCKETS: 4 * PROJECTOR}
        return
    steps.prepare_training(vlm, train, launch)
    size = model_size(vlm)
    assert peak[OPTIMIZER] == 12 * (PROJECTOR // 8)
    assert peak[GRADIENTS] == 2 * PROJECTOR // 8
    assert peak[BUCKETS] == 2 * BUCKET_NUMBERS
    if strategy == "zero2":
        assert peak[WEIGHTS] == size.num_weight_bytes and GATHERED not in peak
    else:
        # All of the tiny model's tensors are below the size from which ZeRO-3 shares them out.
        assert peak[WEIGHTS] == size.num_small_bytes == size.num_weight_bytes
        assert peak[GATHERED] == 2 * size.num_parameters


@pytest.mark.parametrize(("quantization", "num_bytes"), [("4bit", 1 / 2 + 4 / 64), ("8bit", 1)])
def test_a_quantized_language_model_is_smaller_by_its_linear_layers(quantization: str, num_bytes: float) -> None:
    shape = tiny_shape()
    full, packed = (
        model_size(type(shape)(shape.config, shape.compressor, quantization=q).on_paper(torch.bfloat16))
        for q in (None, quantization)
    )
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    rows = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32) * 4 if quantization == "8bit" else 0
    assert full.num_weight_bytes - packed.num_weight_bytes == linear * 2 - int(linear * num_bytes) - rows


def test_eight_bits_keep_the_inputs_that_checkpointing_would_compute_again() -> None:
    train, launch = settings(LOAD, gradient_checkpointing=True, precision="bfloat16")
    shape = tiny_shape()
    kept = {}
    for quantization in ("4bit", "8bit"):
        quantized = type(shape)(shape.config, shape.compressor, quantization=quantization)
        kept[quantization] = estimate_training(quantized, train, launch, LOAD).num_bytes[ACTIVATIONS]
    assert kept["8bit"] > kept["4bit"]


def test_phases_and_purposes_of_a_ledger() -> None:
    ledger = Ledger()
    weight = torch.zeros(100)
    ledger.name(WEIGHTS, [weight, weight.view(10, 10)])
    ledger.begin(BACKWARD)
    with ledger:
        kept = weight + 1
        del kept
        kept = weight * 2
        ledger.begin("later")
        more = kept.view(4, 25) - kept.view(4, 25).clone()
        del more
    assert ledger.peak(BACKWARD).num_bytes == {WEIGHTS: 400, ACTIVATIONS: 400}
    assert ledger.peak().num_bytes == {WEIGHTS: 400, ACTIVATIONS: 1200}
    assert ledger.peak(purpose=WEIGHTS).num_bytes == {WEIGHTS: 400}
