"""The peak of a training or an inference from shapes alone: the real code on tensors without content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers import DynamicCache

from vzip.models.vlm import CompressedVlm
from vzip.train.distributed import has_cuda
from vzip.train.objective import AnswerLoss
from vzip.train.settings import LaunchSettings, Strategy, TrainSettings
from vzip.train.trainable import parameter_groups, prepare_training

from .live_bytes import ACTIVATIONS, CACHE, GRADIENTS, OPTIMIZER, WEIGHTS, LiveBytes
from .model_shape import ModelShape
from .workload import Workload, prompts, tensors_of, training_batch

BUCKETS, GATHERED = "communication buffers", "weights gathered from the others"
# DeepSpeed's defaults (0.19, runtime/zero), in numbers, which vzip.train.distributed.deepspeed_config leaves alone.
BUCKET_NUMBERS = 500_000_000  # reduce_bucket_size, allocated whole, however few weights train
GATHERED_NUMBERS = 1_000_000_000  # stage3_max_live_parameters
UPDATED_NUMBERS = 1_000_000_000  # sub_group_size: what ZeRO-3 updates at once
WHOLE_BELOW_NUMBERS = 100_000  # stage3_param_persistence_threshold: smaller parameters are not sharded


def estimate_training(
    shape: ModelShape,
    train: TrainSettings,
    launch: LaunchSettings,
    load: Workload,
    num_processes: int = 1,
) -> Counter[str]:
    """The peak of a training step on each device: bytes by what they are for.

    Args:
        shape: the model.
        train, launch: the run's settings; the GPUs that ``launch.device`` names need not be here.
        load: the batch that is on a device at once.
        num_processes: over all machines.

    Raises:
        ConfigError: settings that contradict one another, or a length that leaves no room for text.
        UnsupportedModelError: a model that cannot be served or trained so.
    """
    accumulates = launch.accumulation(train.samples_per_step, num_processes) > 1
    vlm = shape.on_meta_device(getattr(torch, train.precision))
    prepare_training(vlm, train, launch)
    batch = training_batch(vlm, load)
    trained = [parameter for parameter in vlm.model.parameters() if parameter.requires_grad]
    mixed = train.precision == "bfloat16" and not launch.uses_deepspeed
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        _fill(vlm, live, tensors_of(batch))
        optimizer = None if launch.uses_deepspeed else _adamw(vlm, train, launch, live)
        for parameter in trained:
            if accumulates and optimizer is not None:
                parameter.grad = torch.zeros_like(parameter)
                live.name(GRADIENTS, [parameter.grad])
            parameter.register_post_accumulate_grad_hook(lambda p: _end_gradient(p, optimizer is None, live))
        live.forget_peak()
        with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
            loss = AnswerLoss(vlm)(batch).sum()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
    if launch.uses_deepspeed:
        return _sharded(live.peak, vlm, launch.strategy, num_processes)
    # DDP copies gradients into buckets of the same size, which stay.
    buckets = {BUCKETS: sum(p.nbytes for p in trained)} if launch.strategy == "ddp" else {}
    return live.peak + Counter(buckets)


def estimate_inference(shape: ModelShape, dtype: torch.dtype, load: Workload) -> Counter[str]:
    """The peak of generating answers on one device; raises as ``estimate_training``.

    Generation itself cannot be followed without content, since each step decides on the last one's result: the prompts
    are, and the last of the new tokens, with all others in the cache.
    """
    vlm = shape.on_meta_device(dtype)
    inputs = prompts(vlm, load)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, torch.no_grad():
        _fill(vlm, live, inputs.values())
        live.forget_peak()
        prepared = vlm.prepare(**inputs, padding_side="left")
        mask, cache = prepared.attention_mask, _NamedCache(vlm, live)
        with vlm.adapter.language_context(prepared.visual_index, prepared.planes):
            vlm.model(
                inputs_embeds=prepared.inputs_embeds.clone(),  # as generate does
                attention_mask=mask,
                position_ids=prepared.position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        if load.num_new_tokens > 1:
            shapes = [layer.keys.shape for layer in cache.layers]
            cache = _NamedCache(vlm, live)
            for index, (*most, length, width) in enumerate(shapes):
                past = prepared.inputs_embeds.new_empty((*most, length + load.num_new_tokens - 2, width))
                cache.update(past, past.clone(), index)
            mask = functional.pad(mask, (0, load.num_new_tokens - 1), value=1)
            token = inputs["input_ids"][:, :1]
            vlm.model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return live.peak


def _fill(vlm: CompressedVlm, live: LiveBytes, inputs: Iterable[Tensor]) -> None:
    """Turns a model on the meta device into one that computes without content, in place."""
    vlm.model.to_empty(device=torch.device("cpu"))
    vlm.model.tie_weights()  # to_empty gives each user of a shared weight its own
    live.name(WEIGHTS, [*vlm.model.parameters(), *vlm.model.buffers()])
    live.name(ACTIVATIONS, inputs)


def _adamw(vlm: CompressedVlm, train: TrainSettings, launch: LaunchSettings, live: LiveBytes) -> torch.optim.AdamW:
    """The optimizer, which has taken a step: it has its states."""
    groups = parameter_groups(vlm, train)
    # On a GPU torch updates all weights at once.
    foreach = launch.device == "cuda" or (launch.device == "auto" and has_cuda())
    optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, foreach=foreach)
    for parameter in (parameter for group in groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    live.name(OPTIMIZER, (s for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)))
    return optimizer


def _end_gradient(parameter: Tensor, moves_on: bool, live: LiveBytes) -> None:
    """Names a finished gradient; DeepSpeed moves it into its bucket at once."""
    assert parameter.grad is not None
    live.name(GRADIENTS, [parameter.grad])
    if moves_on:
        parameter.grad = None


class _NamedCache(DynamicCache):
    """A key-value cache that is counted as one."""

    def __init__(self, vlm: CompressedVlm, live: LiveBytes) -> None:
        super().__init__(config=vlm.model.config.get_text_config())
        self._live_bytes = live

    def update(self, *args: Any, **kwargs: Any) -> Any:
        keys_and_values = super().update(*args, **kwargs)
        self._live_bytes.name(CACHE, keys_and_values)
        return keys_and_values


def _sharded(peak: Counter[str], vlm: CompressedVlm, strategy: Strategy, num_processes: int) -> Counter[str]:
    """DeepSpeed's peak on each device: activations as of one process, the rest by its own rules."""
    parameters = list(vlm.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    own = sum(parameter.numel() for parameter in trained) // num_processes
    width = trained[0].element_size()
    # Of the optimizer: two moments, and the weights once more in float32.
    kept = Counter({WEIGHTS: peak[WEIGHTS], GRADIENTS: width * own, OPTIMIZER: 12 * own})
    updated = own
    if strategy == "zero3":
        sharded = sum(p.nbytes for p in parameters if p.numel() >= WHOLE_BELOW_NUMBERS)
        kept[WEIGHTS] -= sharded - sharded // num_processes
        kept[GATHERED] = width * min(GATHERED_NUMBERS, sum(p.numel() for p in parameters))
        updated = min(UPDATED_NUMBERS, own)
    buckets = {BUCKETS: width * BUCKET_NUMBERS}
    backward = kept + Counter({**buckets, ACTIVATIONS: peak[ACTIVATIONS]})
    # The gradients once more in float32, and what the optimizer computes from them.
    update = kept + Counter({GRADIENTS: 4 * updated, ACTIVATIONS: 4 * updated})
    if strategy == "zero3":
        update += Counter(buckets)
    return max(backward, update, key=Counter.total)
