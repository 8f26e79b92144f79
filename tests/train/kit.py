"""A tiny training: a random model, two dozen generated samples, settings that take a second."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests import tiny

os.environ["HF_HUB_OFFLINE"] = "1"

import vzip
from vzip.data.collate import TrainingSample
from vzip.data.llava_record import Turn
from vzip.train import stepping
from vzip.train.loop import TrainPlan
from vzip.train.settings import LaunchSettings, LoraSettings, TrainSettings
from vzip.train.trainable import choose_trainable

BUDGET = vzip.TokenBudget(num_dominant=6, num_contextual=3)


class Samples:
    """Images of noise with answers of different lengths; every fifth sample is text only, every seventh asks twice.

    Args:
        broken: number of a sample whose image is no image.
    """

    def __init__(self, count: int = 24, broken: int | None = None) -> None:
        self.count, self.broken = count, broken
        self.lengths = np.arange(count) % 11
        self.has_images = np.arange(count) % 5 != 0
        self.image_groups = np.arange(count)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> TrainingSample:
        pictures: list[Any] = []
        if self.has_images[index]:
            noise = np.random.RandomState(index).randint(0, 255, (40, 60, 3), dtype=np.uint8)
            pictures = [Path("nowhere.png") if index == self.broken else Image.fromarray(noise)]
        start = "<image>\n" if pictures else ""
        dialogue = [Turn("user", f"{start}what {index}"), Turn("assistant", "xyz"[index % 3] * (1 + index % 11))]
        return TrainingSample(f"s{index}", pictures, [dialogue] * (2 if index % 7 == 0 else 1))

    def describe(self) -> str:
        return f"{self.count} samples of noise"


def load_model(precision: str = "float32") -> vzip.CompressedVlm:
    """A fresh tiny LLaVA with VisionZip at 9 tokens."""
    processor = tiny.processor()
    model = tiny.llava(vocab_size=len(processor.tokenizer))
    return vzip.CompressedVlm(model, vzip.VisionZip(BUDGET), processor)


def load_in_float64(monkeypatch: pytest.MonkeyPatch) -> vzip.CompressedVlm:
    """The same with its projector to be trained, all in float64."""
    # Hugging Face's norms compute in torch.float32 whatever the model is in; here that name means float64 too.
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # and so does its loss
    vlm = load_model()
    choose_trainable(vlm, SETTINGS, in_float32=False)
    vlm.model.double()
    return vlm


SETTINGS = TrainSettings(
    parts=("projector",),
    reset_projector=False,
    template="vicuna_v1",
    max_length=200,
    learning_rate=1e-2,
    tower_learning_rate=None,
    weight_decay=0.0,
    warmup_fraction=0.1,
    num_epochs=2,
    num_steps=None,
    samples_per_step=8,
    share_images=False,
    max_grad_norm=1.0,
    loss_norm="tokens",
    tf32=False,
    precision="float32",
    save_every=2,
    keep_last=2,
    num_validation_samples=0,
    trackers=(),
    lora=None,
)
LORA = LoraSettings(r=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj"), learning_rate=3e-2)
LAUNCH = LaunchSettings(
    num_threads=1,
    device="cpu",
    num_processes=1,
    num_machines=1,
    strategy="single",
    batch_size=4,
    gradient_checkpointing=False,
    num_workers=0,
)


def make_plan(run_dir: Path, **changes: Any) -> TrainPlan:
    """A plan; keyword arguments change it, its settings or its launch settings, whichever has the name."""
    settings = {k: changes.pop(k) for k in list(changes) if k in {f.name for f in dataclasses.fields(TrainSettings)}}
    launch = {k: changes.pop(k) for k in list(changes) if k in {f.name for f in dataclasses.fields(LaunchSettings)}}
    plan = TrainPlan(
        load_data=Samples,
        load_model=load_model,
        train=dataclasses.replace(SETTINGS, **settings),
        launch=dataclasses.replace(LAUNCH, **launch),
        run_dir=run_dir,
        seed=0,
        overwrite=False,
        system_prompt=None,
        name_or_path="a/tiny-llava",
        skip_unreadable=False,
        identity={"model": "tiny"},
    )
    return dataclasses.replace(plan, **changes)


@contextmanager
def dying_at(step: int, is_command: bool = False) -> Iterator[None]:
    """Interrupts the training when it is about to take this step (counted from 0), and expects to see it die.

    A whole command tells the interruption and ends with its exit code instead.
    """
    real = stepping.Stepper.step

    def dies(self: Any, now: int, *rest: Any) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return real(self, now, *rest)

    kept = r"^step \d+ of \d+ is kept in .*step-0|^.* has no checkpoint yet"
    dead = contextlib.nullcontext() if is_command else pytest.raises(KeyboardInterrupt, match=kept)
    with pytest.MonkeyPatch.context() as patch, dead:
        patch.setattr(stepping.Stepper, "step", dies)
        yield
