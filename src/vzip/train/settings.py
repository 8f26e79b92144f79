"""What a training run is told, as plain values, and what can be wrong with them before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vzip.data.conversations import TEMPLATES
from vzip.errors import ConfigError, RunExistsError

Part = Literal["projector", "language_model", "vision_tower"]
Strategy = Literal["single", "ddp", "zero2", "zero3"]
Precision = Literal["float32", "bfloat16"]
LossNorm = Literal["tokens", "samples"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@dataclass(frozen=True)
class LoraSettings:
    """``train.lora``: low-rank layers in the language model that train with the projector (Hu et al., 2021).

    Attributes:
        r: rank.
        alpha: the layers' output is scaled by ``alpha / r``.
        dropout: at the layers' input.
        target_modules: last names of the linear layers that get one, as ``q_proj``.
        learning_rate: peak of the layers'; None: as the rest.
    """

    r: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    learning_rate: float | None


@dataclass(frozen=True)
class TrainSettings:
    """The ``train`` group: what is learned. Nothing here depends on the machine.

    Attributes:
        parts: what trains; the paper: the projector alone.
        reset_projector: start from a newly initialised projector (training from scratch, first stage).
        template: how conversations are written, see ``vzip.data.conversations``.
        max_length: tokens a conversation may have, visual tokens counted.
        learning_rate: peak.
        tower_learning_rate: peak of the vision tower's; None: as the rest.
        weight_decay: AdamW's.
        warmup_fraction: of all steps, linear from 0; afterwards a cosine to 0.
        num_epochs: passes over the data; ignored if ``num_steps`` is given.
        num_steps: optimizer steps; None: as ``num_epochs`` says.
        samples_per_step: over all processes and accumulated batches.
        max_grad_norm: gradients are scaled down to this norm; None: never.
        loss_norm: what the loss of a step is. ``tokens``: the mean over all of its target tokens. ``samples``: the mean
            over its samples of the mean over each one's own target tokens; a sample without any does not count.
            LLaVA's own trainer (Hugging Face's) takes the mean over the tokens of each batch that a device handles at
            once, and averages these, so its loss depends on how many samples a device takes. ``samples`` is exactly
            that with one sample at a time, ``tokens`` with the whole step at once; LLaVA's 16 lie between them.
        precision: of the frozen parts and of the arithmetic; the trained weights and the optimizer are float32.
        tf32: whether CUDA multiplies float32 matrices in TF32, with 10 bits of mantissa. LLaVA's scripts say so. Of a
            bfloat16 training that touches the scores by which tokens are chosen and the language model's rotary
            angles alone, which are to be those of the evaluation.
        save_every: steps between checkpoints.
        keep_last: checkpoints kept.
        num_validation_samples: kept out of training and asked at every checkpoint; 0: none, and no best checkpoint.
        trackers: besides metrics.jsonl, any of wandb and tensorboard.
        lora: LoRA layers in the language model, or None.
    """

    parts: tuple[Part, ...]
    reset_projector: bool
    template: str
    max_length: int
    learning_rate: float
    tower_learning_rate: float | None
    weight_decay: float
    warmup_fraction: float
    num_epochs: int
    num_steps: int | None
    samples_per_step: int
    max_grad_norm: float | None
    loss_norm: LossNorm
    precision: Precision
    tf32: bool
    save_every: int
    keep_last: int
    num_validation_samples: int
    trackers: tuple[str, ...]
    lora: LoraSettings | None

    @property
    def only_projector(self) -> bool:
        """Whether nothing but the projector trains, as in the paper's fine-tuning."""
        return self.lora is None and set(self.parts) == {"projector"}

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> TrainSettings:
        """From the ``train`` group as it is read from YAML; raises ConfigError for settings that contradict another."""
        given = {key: value for key, value in group.items() if key not in ("name", "kind")}
        lora = given["lora"]
        if lora is not None:
            lora = LoraSettings(**{**lora, "target_modules": tuple(lora["target_modules"])})
        return cls(**{**given, "parts": tuple(given["parts"]), "trackers": tuple(given["trackers"]), "lora": lora})

    def __post_init__(self) -> None:
        assert self.template in TEMPLATES and self.precision in PRECISIONS
        if "vision_tower" not in self.parts and self.tower_learning_rate is not None:
            raise ConfigError(
                f"train.tower_learning_rate={self.tower_learning_rate}: train.parts={list(self.parts)} leaves the"
                " vision tower frozen. Set it to null, or add vision_tower to train.parts."
            )
        if self.lora is not None and "language_model" in self.parts:
            raise ConfigError(
                f"train.parts={list(self.parts)} trains the whole language model, so train.lora has nothing to add:"
                " take language_model out of train.parts, or set train.lora=null."
            )


@dataclass(frozen=True)
class LaunchSettings:
    """The ``launcher`` group: on what a run is carried out. It changes speed and memory, not what is learned.

    Attributes:
        num_threads: CPU threads a process; None: torch's choice.
        device: ``cuda``, ``cpu``, or ``auto``: CUDA if there is one.
        num_processes: on this machine, one a device.
        num_machines: that work together; None: as SLURM says.
        strategy: ``single`` and ``ddp`` keep everything on every device, ``zero2`` shares optimizer and gradients out,
            ``zero3`` the weights too.
        batch_size: samples a process handles at once; the rest of ``samples_per_step`` is accumulated.
        gradient_checkpointing: compute activations twice instead of keeping them.
        num_workers: processes that prepare data, for each process that trains.
    """

    num_threads: int | None
    device: str
    num_processes: int
    num_machines: int | None
    strategy: Strategy
    batch_size: int
    gradient_checkpointing: bool
    num_workers: int

    @property
    def uses_deepspeed(self) -> bool:
        return self.strategy in ("zero2", "zero3")

    def accumulation(self, samples_per_step: int, num_processes: int) -> int:
        """Batches that each process accumulates in a step.

        Raises:
            ConfigError: they do not come out even.
        """
        at_once = self.batch_size * num_processes
        if samples_per_step % at_once:
            raise ConfigError(
                f"train.samples_per_step={samples_per_step} is not a multiple of launcher.batch_size={self.batch_size}"
                f" x {num_processes} processes = {at_once}: change either, so that every process does the same work"
                f" (launcher.batch_size={math.gcd(samples_per_step // num_processes, self.batch_size) or 1}"
                " would go)."
                if samples_per_step % num_processes == 0
                else f"train.samples_per_step={samples_per_step} cannot be shared by {num_processes} processes: change"
                " it, or launcher.num_processes."
            )
        return samples_per_step // at_once


def learning_rate_factor(step: int, num_steps: int, warmup_fraction: float) -> float:
    """Share of the peak rate at a step (0 is the first): linear from 0, then half a cosine down to 0.

    As ``transformers.get_cosine_schedule_with_warmup`` with the warm-up's steps rounded up, which LLaVA trains with.
    """
    num_warmup = math.ceil(warmup_fraction * num_steps)
    if step < num_warmup:
        return step / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def refuse_finished(run_dir: Path) -> None:
    """Refuses a directory whose training is done.

    Raises:
        RunExistsError: it holds tuned weights.
    """
    final = run_dir / "final"
    if final.exists():
        raise RunExistsError(
            f"{final} exists: this run is finished. Evaluate it with model.projector={final}, set"
            " overwrite=true to train it again, or change the seed or paths.run_dir."
        )
