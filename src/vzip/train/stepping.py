"""One optimizer step over any number of processes and accumulated batches, and the validation loss."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vzip.data.collate import Batch, Collator, TrainingSample, TrainingSet
from vzip.data.order import draw_steps, split_step
from vzip.errors import ConfigError, VzipError
from vzip.models.vlm import CompressedVlm
from vzip.results.provenance import peak_memory_gib

from .objective import AnswerLoss
from .settings import LaunchSettings, TrainSettings, learning_rate_factor
from .trainable import parameter_groups

logger = logging.getLogger(__name__)


class DivergedError(VzipError, ArithmeticError):
    """The loss or the gradient is no finite number."""


class StepTimer:
    """Where a step's time goes: each call of ``lap`` adds the time since the last one to a name, in milliseconds.

    A lap waits for the device, so that work still under way there is not counted later.
    """

    def __init__(self, device: torch.device) -> None:
        self.ms: dict[str, float] = {}
        self._device, self._last = device, time.perf_counter()

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.ms[name] = self.ms.get(name, 0.0) + 1000 * (now - self._last)
        self._last = now


class StepSchedule:
    """Which samples each step has, over all epochs.

    Args:
        data: lengths and images of all samples.
        training: numbers of the samples that are trained on.
        settings, seed: of the run.

    Attributes:
        num_steps: of the whole run.
    """

    def __init__(self, data: TrainingSet, training: np.ndarray, settings: TrainSettings, seed: int) -> None:
        self._lengths, self._has_images = data.lengths[training], data.has_images[training]
        self._groups = data.image_groups[training] if settings.share_images else None
        self._training, self._samples_per_step, self._seed = training, settings.samples_per_step, seed
        self._num_budgets = len(settings.budgets or ())
        self._epoch, self._steps = 0, self._draw(0)
        self.num_steps = settings.num_steps or settings.num_epochs * len(self._steps)

    def __getitem__(self, step: int) -> np.ndarray:
        """Numbers of a step's samples, from long to short."""
        epoch, within = divmod(step, len(self._steps))
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._draw(epoch)
        return self._steps[within]

    def budget(self, step: int) -> int:
        """Which of ``train.budgets`` a step is at: a function of the seed and the step alone; 0 where there is one."""
        return int(np.random.RandomState([self._seed, 0xB0D6, step]).randint(max(1, self._num_budgets)))

    def _draw(self, epoch: int) -> np.ndarray:
        drawn = draw_steps(self._lengths, self._has_images, self._samples_per_step, self._seed, epoch, self._groups)
        return self._training[drawn]


class _Batches(Dataset[Batch]):
    """Batch number ``step * accumulation + i`` of one process, made where it is asked for: in a worker."""

    def __init__(self, data: TrainingSet, collators: Sequence[Collator], lists: list[list[int]]) -> None:
        self.data, self.collators, self.lists = data, collators, lists

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, index: int) -> Batch:
        samples: list[TrainingSample] = [self.data[number] for number in self.lists[index]]
        return self.collators[index](samples)


def load_batches(
    data: TrainingSet,
    collators: Sequence[Collator],
    lists: list[list[int]],
    num_workers: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of the samples listed, each by the collator at its place, in order, prepared ahead by workers.

    For a GPU they are in pinned memory.
    """
    loader = DataLoader(
        _Batches(data, collators, lists),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        # Forked workers share the model's memory, of which they only read the configuration.
        multiprocessing_context="fork" if num_workers else None,
    )
    return iter(loader)


class Stepper:
    """Takes optimizer steps.

    Args:
        accelerator: joins the processes.
        model: ``AnswerLoss``, prepared by the accelerator.
        optimizer: likewise; each group has its ``peak`` learning rate.
        settings, launch, seed: of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        settings: TrainSettings,
        launch: LaunchSettings,
        seed: int,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.settings, self.launch, self.seed = settings, launch, seed
        self.accumulation = launch.accumulation(settings.samples_per_step, accelerator.num_processes)

    @classmethod
    def of(
        cls, accelerator: Accelerator, vlm: CompressedVlm, settings: TrainSettings, launch: LaunchSettings, seed: int
    ) -> Stepper:
        """Of a model that ``prepare_training`` has seen: its loss and AdamW, prepared by the accelerator."""
        groups = parameter_groups(vlm, settings)
        adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        shared = accelerator.num_processes > 1 and (not settings.only_projector or launch.strategy == "zero3")
        model, optimizer = accelerator.prepare(AnswerLoss(vlm, always_whole=shared), adamw)
        return cls(accelerator, model, optimizer, settings, launch, seed)

    def lists(self, schedule: StepSchedule, start: int) -> list[list[int]]:
        """Samples of each of this process's batches, from step ``start`` on."""
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        return [
            batch.tolist()
            for step in range(start, schedule.num_steps)
            for batch in split_step(schedule[step], self.launch.batch_size, process, count)
        ]

    def step(self, step: int, num_steps: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """Takes one step; returns its metrics.

        Its time is told as ``data_ms`` (waiting for batches), ``forward_ms``, ``backward_ms`` (with DeepSpeed also its
        optimizer step) and ``update_ms`` (clipping, optimizer and what is left).

        Samples that taught nothing (``num_skipped``) are named in a warning.

        Raises:
            DivergedError: naming the samples; the weights are those before the step.
            ConfigError: ``train.max_length`` leaves nothing in the whole step to learn from.
        """
        timer = StepTimer(self.accelerator.device)
        mine = list(islice(batches, self.accumulation))
        timer.lap("data_ms")
        # What is random in a model (dropout) depends on the step alone, so a resumed run draws the same.
        torch.manual_seed((self.seed * 1_000_003 + step) * 1_009 + self.accelerator.process_index)
        rate = learning_rate_factor(step, num_steps, self.settings.warmup_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        skipped = [name for batch in mine for name in batch.skipped]
        cut_off = [name for batch in mine for name in batch.cut_off]
        counts = self._summed(
            [
                sum(batch.num_targets for batch in mine),
                sum(sum(batch.num_visual_tokens) + sum(batch.num_video_tokens) for batch in mine),
                len(skipped) + len(cut_off),
                sum(self._count(batch) for batch in mine),
            ]
        )
        self._tell_of_left_out(f"step {step + 1}", skipped, cut_off, counts[0])
        loss, norm = self._backward(mine, counts[3], timer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        timer.lap("update_ms")
        seconds = sum(timer.ms.values()) / 1000
        memory = peak_memory_gib()
        return {
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "num_target_tokens": int(counts[0]),
            "num_visual_tokens": int(counts[1]),
            "num_skipped": int(counts[2]),
            "samples_per_s": round(self.settings.samples_per_step / seconds, 2),
            "target_tokens_per_s": round(counts[0] / seconds, 1),
            **{name: round(ms, 1) for name, ms in timer.ms.items()},
            "peak_memory_gib": memory["cuda"] or memory["process"],
        }

    def _tell_of_left_out(self, where: str, skipped: list[str], cut_off: list[str], num_targets: float) -> None:
        """Names this process's samples that teach nothing.

        Args:
            where: they are of.
            skipped, cut_off: as of a ``Batch``.
            num_targets: of all processes' batches.

        Raises:
            ConfigError: there are no targets, and ``train.max_length`` is the reason.
        """
        if skipped:
            logger.warning("%s: left out, since an image or video cannot be read: %s", where, _listed(skipped))
        # Summed, so that all processes end where one has to.
        if not num_targets and self._summed([len(cut_off)])[0]:
            raise ConfigError(
                f"train.max_length={self.settings.max_length}: {where} has nothing left to learn, since images and"
                f" questions alone are longer; its samples: {_listed(cut_off) or 'those of other processes'}. Raise"
                " train.max_length or use a smaller budget."
            )
        if cut_off:
            logger.warning(
                "%s: train.max_length=%d leaves no target of an answer: %s",
                where,
                self.settings.max_length,
                _listed(cut_off),
            )

    def _count(self, batch: Batch) -> int:
        """What a batch adds to the number that the step's loss is divided by."""
        if self.settings.loss_norm == "tokens":
            return batch.num_targets
        return sum(count > 0 for count in batch.num_targets_by_sample)

    def _added(self, nats: Tensor, batch: Batch) -> Tensor:
        """What a batch adds to the step's loss before that division.

        Args:
            nats: ``[samples]``, summed over each one's target tokens.
            batch: whose they are.
        """
        if self.settings.loss_norm == "tokens":
            return nats.sum()
        return (nats / nats.new_tensor(batch.num_targets_by_sample).clamp(min=1)).sum()

    def _backward(self, mine: list[Batch], divisor: float, timer: StepTimer) -> tuple[float, float]:
        """Gradients of the step's loss; returns the loss and the gradient's norm before clipping.

        Args:
            mine: this process's batches.
            divisor: the sum of ``_count`` over the whole step.
            timer: of the step.
        """
        # Processes' gradients are averaged and accumulate() divides by the batches: both are undone here, so that what
        # remains is the sum over the whole step divided by the step's divisor.
        scale = self.accelerator.num_processes * self.accumulation / max(1.0, divisor)
        summed = 0.0
        norm = 0.0
        for batch in mine:
            with self.accelerator.accumulate(self.model):
                nats = self.model(batch.to(self.accelerator.device))
                self._refuse_infinite(nats, batch)
                added = self._added(nats, batch)
                summed += added.item()
                timer.lap("forward_ms")
                self.accelerator.backward(added * scale)
                del nats, added  # with the graph, in which bitsandbytes' 8-bit layers still keep their inputs
                timer.lap("backward_ms")
                if self.accelerator.sync_gradients:
                    limit = self.settings.max_grad_norm or float("inf")
                    trained = [p for group in self.optimizer.param_groups for p in group["params"]]
                    norm = float(self.accelerator.clip_grad_norm_(trained, limit) or 0.0)
        if not np.isfinite(norm):
            ids = [name for batch in mine for name in batch.ids]
            raise DivergedError(
                f"the gradient's norm is {norm}, though every loss is finite; the step's samples: {_listed(ids)}. Lower"
                " train.learning_rate, or train in float32; the last checkpoint is from before this step."
            )
        return self._summed([summed])[0] / max(1.0, divisor), norm

    def _refuse_infinite(self, nats: Tensor, batch: Batch) -> None:
        finite = torch.isfinite(nats.detach())
        if not bool(finite.all()):
            bad = [name for name, good in zip(batch.ids, finite.tolist(), strict=True) if not good]
            raise DivergedError(
                f"the loss of {len(bad)} samples is not a finite number: {_listed(bad)}. Look at these samples; lower"
                " train.learning_rate, or train in float32. The last checkpoint is from before this step."
            )

    @torch.no_grad()
    def validate(self, data: TrainingSet, numbers: np.ndarray, collator: Collator) -> float:
        """The loss over the samples given as over a step's, shared out over the processes."""
        mine = numbers[self.accelerator.process_index :: self.accelerator.num_processes].tolist()
        size = self.launch.batch_size
        # As many for each process, the last maybe empty: with the weights shared out all run the model together.
        num_batches = -(-len(numbers) // (size * self.accelerator.num_processes))
        lists = [mine[start : start + size] for start in range(0, size * num_batches, size)]
        added = counted = num_targets = 0.0
        skipped: list[str] = []
        cut_off: list[str] = []
        objective = self.accelerator.unwrap_model(self.model)
        collators = [collator] * len(lists)
        for batch in load_batches(data, collators, lists, self.launch.num_workers, self.accelerator.device):
            with self.accelerator.autocast():
                nats = objective(batch.to(self.accelerator.device))
            added += self._added(nats, batch).item()
            counted += self._count(batch)
            num_targets += batch.num_targets
            skipped += batch.skipped
            cut_off += batch.cut_off
        totals = self._summed([added, counted, num_targets])
        self._tell_of_left_out("the validation set", skipped, cut_off, totals[2])
        return totals[0] / max(1.0, totals[1])

    def _summed(self, values: list[float]) -> list[float]:
        """The values summed over all processes."""
        own = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        summed = self.accelerator.reduce(own, reduction="sum")
        assert isinstance(summed, Tensor)
        return summed.tolist()


def _listed(names: list[str], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
