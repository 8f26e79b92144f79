"""What is watched: one optimizer step, or one answer; the same code on tensors with content and without."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

from vzip.data.collate import Batch
from vzip.models.vlm import CompressedVlm
from vzip.train.objective import AnswerLoss
from vzip.train.settings import LaunchSettings, TrainSettings
from vzip.train.stepping import Stepper
from vzip.train.trainable import choose_trainable, parameter_groups

from .ledger import ACTIVATIONS, Ledger
from .workload import tensors_of

WEIGHTS, GRADIENTS, OPTIMIZER, CACHE = "weights", "gradients", "optimizer states", "key-value cache"
BACKWARD, UPDATE = "forward and backward", "update"


class OneProcess:
    """What ``Stepper`` needs of accelerate's ``Accelerator``, for one process on the CPU and one batch a step."""

    device = torch.device("cpu")
    num_processes, process_index = 1, 0
    sync_gradients = True

    @contextmanager
    def accumulate(self, _model: nn.Module) -> Iterator[None]:
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor


class _Mixed(nn.Module):
    """The loss under autocast, as accelerate wraps it."""

    def __init__(self, loss: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.loss, self.context = loss, context

    def forward(self, batch: Any) -> Tensor:
        with self.context():
            return self.loss(batch)


def prepare_training(vlm: CompressedVlm, train: TrainSettings, launch: LaunchSettings) -> None:
    """Freezes, converts and checkpoints as ``vzip.train.loop.train`` does."""
    choose_trainable(vlm, train, in_float32=not launch.uses_deepspeed)
    if launch.gradient_checkpointing:
        vlm.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def watch_training(
    vlm: CompressedVlm,
    train: TrainSettings,
    launch: LaunchSettings,
    batch: Batch,
    accumulates: bool,
    on_cuda: bool,
    ledger: Ledger,
) -> None:
    """The last batch of a step that is not the first: the optimizer has its states already.

    Args:
        vlm: from ``prepare_training``.
        train, launch: the run's settings.
        batch: with contents.
        accumulates: whether there are gradients of earlier batches.
        on_cuda: update all weights at once, as torch does on CUDA (``foreach``).
        ledger: entered within; weights, gradients and states are named.
    """
    parameters = parameter_groups(vlm, train)
    optimizer = torch.optim.AdamW(parameters, lr=train.learning_rate, weight_decay=train.weight_decay, foreach=on_cuda)
    trained = [parameter for group in parameters for parameter in group["params"]]
    _make_gradients(trained)
    optimizer.step()
    optimizer.zero_grad()
    if accumulates:
        _make_gradients(trained)
        ledger.name(GRADIENTS, [parameter.grad for parameter in trained if parameter.grad is not None])
    ledger.name(WEIGHTS, itertools.chain(vlm.model.parameters(), vlm.model.buffers()))
    states = [value for state in optimizer.state.values() for value in state.values()]
    ledger.name(OPTIMIZER, [state for state in states if isinstance(state, Tensor)])

    def before_update(*_: Any) -> None:
        ledger.name(GRADIENTS, [p.grad for p in trained if p.grad is not None])
        ledger.begin(UPDATE)

    optimizer.register_step_pre_hook(before_update)
    half = train.precision == "bfloat16" and not launch.uses_deepspeed
    model = _Mixed(AnswerLoss(vlm), lambda: torch.autocast("cpu", torch.bfloat16) if half else nullcontext())
    process: Any = OneProcess()
    one_batch = replace(train, samples_per_step=launch.batch_size)
    stepper = Stepper(process, model, optimizer, one_batch, launch, seed=0)
    ledger.name(ACTIVATIONS, tensors_of(batch))
    ledger.begin(BACKWARD)
    with ledger:
        stepper.step(1, 2, iter([batch]))


def _make_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def watch_inference(vlm: CompressedVlm, inputs: Mapping[str, Tensor], num_new_tokens: int, ledger: Ledger) -> None:
    """The prompts, and the last of the new tokens, with all others in the cache; named as in ``watch_training``.

    Generation itself cannot be followed without content, since each step decides on the last one's result.
    """
    ledger.name(WEIGHTS, itertools.chain(vlm.model.parameters(), vlm.model.buffers()))
    ledger.name(ACTIVATIONS, inputs.values())
    with ledger:
        prepared = vlm.prepare(**inputs, padding_side="left")
        output = vlm.model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            use_cache=True,
            logits_to_keep=1,
        )
        keys_and_values = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        ledger.name(CACHE, itertools.chain(*keys_and_values))
        if num_new_tokens < 2:
            return
        shapes = [pair[0].shape for pair in keys_and_values]
        del output, keys_and_values
        cache = DynamicCache(config=vlm.model.config.get_text_config())
        for index, (*most, length, width) in enumerate(shapes):
            room = prepared.inputs_embeds.new_empty((*most, length + num_new_tokens - 2, width))
            ledger.name(CACHE, cache.update(room, room.clone(), index))
        mask = functional.pad(prepared.attention_mask, (0, num_new_tokens - 1), value=1)
        vlm.model(
            input_ids=inputs["input_ids"][:, :1],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ledger.name(CACHE, itertools.chain(*((layer.keys, layer.values) for layer in cache.layers)))
