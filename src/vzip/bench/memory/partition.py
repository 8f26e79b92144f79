"""What several devices share out among themselves, and what it costs them to talk.

Single processes are followed operation by operation. For DeepSpeed the activations are, and the rest is counted by its
own rules (0.19, ``runtime/zero``) with the defaults that ``vzip.train.distributed.deepspeed_config`` leaves alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from vzip.models.vlm import CompressedVlm
from vzip.train.settings import Strategy

from .ledger import ACTIVATIONS, Ledger, Peak
from .steps import BACKWARD, GRADIENTS, OPTIMIZER, WEIGHTS

BUCKETS = "communication buffers"
GATHERED = "weights gathered from the others"
BUCKET_NUMBERS = 500_000_000  # reduce_bucket_size, allocated whole, however few weights train
GATHERED_NUMBERS = 1_000_000_000  # stage3_max_live_parameters
SUBGROUP_NUMBERS = 1_000_000_000  # sub_group_size: what ZeRO-3 updates at once
WHOLE_BELOW_NUMBERS = 100_000  # stage3_param_persistence_threshold: smaller parameters are not shared out
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """A model that is ready to train.

    Attributes:
        num_weight_bytes: of all parameters and buffers.
        num_small_bytes: of the parameters that ZeRO-3 leaves whole, and the buffers.
        num_trained: parameters that train, in numbers.
        num_trained_bytes: the same in bytes.
        num_parameters: all, in numbers.
    """

    num_weight_bytes: int
    num_small_bytes: int
    num_trained: int
    num_trained_bytes: int
    num_parameters: int


def model_size(vlm: CompressedVlm) -> ModelSize:
    """Counts a model's parameters and buffers."""
    parameters, buffers = list(vlm.model.parameters()), sum(b.nbytes for b in vlm.model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    return ModelSize(
        num_weight_bytes=sum(p.nbytes for p in parameters) + buffers,
        num_small_bytes=sum(p.nbytes for p in parameters if p.numel() < WHOLE_BELOW_NUMBERS) + buffers,
        num_trained=sum(p.numel() for p in trained),
        num_trained_bytes=sum(p.nbytes for p in trained),
        num_parameters=sum(p.numel() for p in parameters),
    )


def shared_out(ledger: Ledger, size: ModelSize, strategy: Strategy, num_processes: int) -> Peak:
    """The peak on each device, from that of a single one.

    Args:
        ledger: of a step of one process.
        size: of its model.
        strategy: how the processes share.
        num_processes: over all machines.
    """
    if strategy == "single":
        return ledger.peak()
    if strategy == "ddp":
        # Gradients are copied into buckets of the same size, which stay.
        return Peak({**ledger.peak().num_bytes, BUCKETS: size.num_trained_bytes})
    activations = ledger.peak(BACKWARD, ACTIVATIONS).num_bytes.get(ACTIVATIONS, 0)
    share = size.num_trained // num_processes
    own_gradients = size.num_trained_bytes // num_processes
    width = size.num_trained_bytes // max(1, size.num_trained)
    kept = {
        WEIGHTS: size.num_weight_bytes,
        # Two moments, and the weights once more in float32.
        OPTIMIZER: 3 * FLOAT32_BYTES * share,
    }
    at_once = share
    if strategy == "zero3":
        shared = size.num_weight_bytes - size.num_small_bytes
        kept[WEIGHTS] = size.num_small_bytes + shared // num_processes
        kept[GATHERED] = min(GATHERED_NUMBERS, size.num_parameters) * width
        kept[BUCKETS] = BUCKET_NUMBERS * width
        at_once = min(SUBGROUP_NUMBERS, share)
    backward = {**kept, GRADIENTS: own_gradients, BUCKETS: BUCKET_NUMBERS * width, ACTIVATIONS: activations}
    # The gradients once more in float32, and what the optimizer computes from them.
    update = {**kept, GRADIENTS: own_gradients + FLOAT32_BYTES * at_once, ACTIVATIONS: FLOAT32_BYTES * at_once}
    return max(Peak(backward), Peak(update), key=lambda peak: peak.total)
