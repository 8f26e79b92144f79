"""What a training run is told, as plain values, and what can be wrong with them before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from vzip.errors import ConfigError, RunExistsError
from vzip.keys import POSITIVE, SHARE, Rule, key, once_each, texts

Part = Literal["projector", "language_model", "vision_tower"]
Template = Literal["vicuna_v1", "plain", "chat"]  # those of vzip.data.conversations, which loads torch
Strategy = Literal["single", "ddp", "zero2", "zero3"]
Precision = Literal["float32", "bfloat16"]
LossNorm = Literal["tokens", "samples"]


def _are_several(names: Any) -> bool:
    return texts("").allows(names) and len(names) > 1


@dataclass(frozen=True)
class LoraSettings:
    """``train.lora``: low-rank layers in the language model that train with the projector (Hu et al., 2021)."""

    r: int = key("rank of the layers", at_least=1)
    alpha: float = key("the layers' output is scaled by alpha / r", rule=POSITIVE)
    dropout: float = key("share of the layers' input that is dropped", rule=SHARE)
    target_modules: tuple[str, ...] = key(
        "last names of the linear layers that get one",
        what="a list of at least one name of the language model's linear layers, as [q_proj,v_proj]",
    )
    learning_rate: float | None = key("peak rate of these layers; null: train.learning_rate")


@dataclass(frozen=True)
class TrainSettings:
    """The ``train`` group: what is learned. Nothing here depends on the machine."""

    parts: tuple[Part, ...] = key("what trains; the paper: the projector alone", at_least=1)
    reset_projector: bool = key("start from a newly initialised projector (training from scratch, first stage)")
    template: Template | None = key(
        "how conversations are written; plain: image and caption; chat: the checkpoint's own; null: as the family is"
        " trained (LLaVA vicuna_v1, Qwen chat)"
    )
    max_length: int = key("tokens of a conversation, visual ones too; longer ones are cut, in no image", at_least=16)
    learning_rate: float = key("peak rate, reached after the warm-up")
    tower_learning_rate: float | None = key("peak rate of the vision tower; null: train.learning_rate")
    weight_decay: float = key("of AdamW")
    warmup_fraction: float = key("share of all steps in which the rate rises from 0; then a cosine to 0", rule=SHARE)
    num_epochs: int = key("passes over the data, where train.num_steps is null", at_least=1)
    num_steps: int | None = key("optimizer steps; null: as train.num_epochs says", at_least=1)
    # The last samples of an epoch that fill no step are left out.
    samples_per_step: int = key("samples of a step, over all processes and accumulated batches", at_least=1)
    # What is learned from a step is the same; samples about the same images come in the same step.
    share_images: bool = key("conversations about the same images share their visual tokens, in one row of max_length")
    max_grad_norm: float | None = key("gradients are scaled down to this norm; null: never", rule=POSITIVE)
    # LLaVA's own trainer (Hugging Face's) takes the mean over the tokens of each batch that a device handles at once,
    # and averages these, so its loss depends on how many samples a device takes. `samples` is exactly that with one
    # sample at a time (one without any target does not count), `tokens` with the whole step at once; LLaVA's 16 lie
    # between them.
    loss_norm: LossNorm = key("a step's loss: the mean over target tokens, or over samples of each one's mean")
    precision: Precision = key("of frozen weights and arithmetic; what trains and the optimizer are float32")
    # Of a bfloat16 training TF32 touches the scores by which tokens are chosen and the language model's rotary angles
    # alone, which are to be those of the evaluation.
    tf32: bool = key("whether CUDA multiplies float32 matrices with 10 bits of mantissa (LLaVA's scripts: true)")
    save_every: int = key("steps between checkpoints", at_least=1)
    keep_last: int = key("checkpoints kept", at_least=1)
    num_validation_samples: int = key("samples kept out, asked at every checkpoint; 0: none, and no best one")
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = key("what is told of it besides metrics.jsonl")
    lora: LoraSettings | None = key(
        "LoRA layers in the language model, besides train.parts; null: none",
        what="a mapping (train=projector_lora has one)",
    )
    budgets: tuple[str, ...] | None = key(
        "one training for several budgets: each step is at one of these, drawn by the seed; null: all at budget",
        rule=once_each(Rule("a list of two budgets or more by their names, as [64tok,128tok,192tok]", _are_several)),
        default=None,
    )

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
        lists = {key: tuple(given[key]) for key in ("parts", "trackers")}
        budgets = given.get("budgets")
        return cls(**{**given, **lists, "lora": lora, "budgets": None if budgets is None else tuple(budgets)})

    def __post_init__(self) -> None:
        assert self.template in (None, *get_args(Template)) and self.precision in get_args(Precision)
        if "vision_tower" not in self.parts and self.tower_learning_rate is not None:
            raise ConfigError(
                f"train.tower_learning_rate={self.tower_learning_rate}: train.parts={list(self.parts)} leaves the"
                " vision tower frozen. Set it to null, or add vision_tower to train.parts."
            )
        if self.share_images and self.template == "plain":
            raise ConfigError(
                "train.share_images=true with train.template=plain: a caption is foretold by the image's last token, so"
                " several cannot share it. Set train.share_images=false."
            )
        if self.lora is not None and "language_model" in self.parts:
            raise ConfigError(
                f"train.parts={list(self.parts)} trains the whole language model, so train.lora has nothing to add:"
                " take language_model out of train.parts, or set train.lora=null."
            )


@dataclass(frozen=True)
class LaunchSettings:
    """The ``launcher`` group: on what a run is carried out. It changes speed and memory, not what is learned."""

    num_threads: int | None = key("CPU threads a process uses; null: torch's own choice", at_least=1)
    device: Literal["auto", "cpu", "cuda"] = key("what the processes run on; auto: CUDA if there is one")
    num_processes: int = key("processes on each machine, one a device (train.py and eval.py)", at_least=1)
    num_machines: int | None = key("machines that work together; null: as SLURM says", at_least=1)
    strategy: Strategy = key("what DeepSpeed shards; zero2: optimizer and gradients; zero3: the weights too")
    batch_size: int = key("training samples a process handles at once; a step's rest is accumulated", at_least=1)
    gradient_checkpointing: bool = key("compute activations twice: less memory, about a third slower")
    num_workers: int = key("processes that prepare data, for each that trains (eval.py: eval.num_workers)")

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
