"""The published way of scoring tokens, for comparison: every attention map of the tower is built and kept.

The published code switches the whole tower to eager attention, asks it for the maps and hidden states of all layers,
and then reads one row of one of them. This is our own rendering of that, on a second instance of the tower that shares
the first one's weights, so that the model being measured stays as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from vzip.bench.hooks import recorded_outputs
from vzip.compressors import CompressedTokens, Compressor, Signal, VisionOutput
from vzip.errors import UnsupportedModelError, VzipError
from vzip.models.devices import full_float32
from vzip.models.towers.structure import Tower, find_tower
from vzip.models.towers.tap import run_tower
from vzip.models.towers.units import as_units
from vzip.ops.attention import mean_keys

ABSOLUTE_TOLERANCE = 1e-6
RELATIVE_TOLERANCE = 1e-4
NUM_CHECK_IMAGES = 3


class NotEquivalentError(VzipError, RuntimeError):
    """The two ways of computing the same visual tokens disagree: a comparison of their speed would mean nothing."""


def _eager_twin(tower_module: PreTrainedModel) -> PreTrainedModel:
    """Builds a second instance of a tower with eager attention over the very same weight storage."""
    config: Any = copy.deepcopy(tower_module.config)
    first = next(tower_module.parameters())
    with torch.device("meta"):
        twin = AutoModel.from_config(config, dtype=first.dtype, attn_implementation="eager")
    if type(twin) is not type(tower_module):
        raise UnsupportedModelError(
            f"eager_maps: {type(tower_module).__name__} is rebuilt from its configuration as {type(twin).__name__}; "
            "leave eager_maps out of methods for this model"
        )
    twin.to_empty(device=first.device)
    twin.load_state_dict(tower_module.state_dict(), assign=True, strict=True)
    sources = dict(tower_module.named_buffers())
    for name, buffer in twin.named_buffers():  # position indices: not part of a state dict
        buffer.copy_(sources[name])
    return cast(PreTrainedModel, twin.eval().requires_grad_(False))


class EagerMaps:
    """Vision tower run the published way.

    Args:
        tower_module: the tower as Hugging Face's module; neither it nor its configuration is changed.
        select_layer: index into its hidden states, as ``run_tower`` takes it.
        stock_offset: handed on to ``VisionOutput``.

    Raises:
        UnsupportedModelError: for a tower that its configuration alone does not rebuild.
    """

    def __init__(self, tower_module: nn.Module, select_layer: int, stock_offset: int | None = None) -> None:
        if not isinstance(tower_module, PreTrainedModel):
            raise UnsupportedModelError(f"eager_maps: {type(tower_module).__name__} is not a Hugging Face model")
        self.twin = _eager_twin(tower_module)
        self.tower = find_tower(self.twin)
        self.stock_offset = stock_offset
        self.layer_index = select_layer_index(self.tower, select_layer)

    def encode(self, pixel_values: Tensor) -> VisionOutput:
        """Runs the whole tower and keeps everything.

        Args:
            pixel_values: ``[N, 3, h, w]``.

        Returns:
            what ``run_tower`` returns, read out of the maps.
        """
        _queries, key_projection, _scale = self.tower.attention_of(self.layer_index)
        with recorded_outputs({"keys": key_projection}) as projections:
            output = self.twin(pixel_values, output_attentions=True, output_hidden_states=True)
        maps = output.attentions[self.layer_index]  # [N, H, L, L]
        geometry = self.tower.geometry
        attention = maps[:, :, 0, 1:].float().sum(dim=1) if geometry.has_cls else maps.float().mean(dim=(1, 2))
        vision = VisionOutput(
            hidden=output.hidden_states[self.layer_index + 1],
            has_cls=geometry.has_cls,
            grid=geometry.grid,
            attention=attention,
            keys=mean_keys(projections["keys"], self.tower.num_heads),
            stock_offset=self.stock_offset,
        )
        return as_units(vision, geometry.unit_side)


def select_layer_index(tower: Tower, select_layer: int) -> int:
    """Returns the 0-based layer whose output ``hidden_states[select_layer]`` is.

    Raises:
        UnsupportedModelError: where that is the input of the first layer, before any attention.
    """
    num_layers = tower.geometry.num_layers_to_run(select_layer)
    if num_layers == 0:
        raise UnsupportedModelError(
            f"vision_feature_layer={select_layer} is the input of the vision tower's first layer: the bench compares "
            "ways of reading attention, and there is none before it"
        )
    return num_layers - 1


@dataclass(frozen=True)
class Agreement:
    """How far the two ways are apart, on images, in float32.

    Attributes:
        max_token_difference: largest absolute difference of a visual token's element.
        max_attention_difference: of a patch's score.
        max_hidden_difference: of the tower's output.
        num_images: images tried until both ways selected the same; 1 unless two scores nearly tie.
    """

    max_token_difference: float
    max_attention_difference: float
    max_hidden_difference: float
    num_images: int


def check_agreement(
    tower_module: nn.Module, select_layer: int, compressor: Compressor, pixel_values: Tensor
) -> Agreement:
    """Checks that ``run_tower`` and ``EagerMaps`` lead to the same visual tokens.

    Half-precision towers are compared through a float32 copy, since the two kernels round differently and a ranking
    amplifies that. Two scores closer than rounding may change places, so images are tried until both select the same;
    scores, features and keys must agree on each of them, and the tokens on the last.

    Args:
        tower_module: the tower as Hugging Face's module.
        select_layer: as ``run_tower`` takes it.
        compressor: what is run on both outputs.
        pixel_values: ``[N, 3, h, w]``; at most ``NUM_CHECK_IMAGES`` are used, one at a time.

    Raises:
        NotEquivalentError: with the differences found.
    """
    if next(tower_module.parameters()).dtype != torch.float32:
        tower_module = copy.deepcopy(tower_module).float()
    eager, tower = EagerMaps(tower_module, select_layer), find_tower(tower_module)
    attention_difference = hidden_difference = 0.0
    images = pixel_values[:NUM_CHECK_IMAGES].float().split(1)
    for num_tried, image in enumerate(images, start=1):
        with torch.inference_mode(), full_float32():
            ours = run_tower(tower, image, select_layer, compressor.reads())
            theirs = eager.encode(image)
            our_tokens, their_tokens = compressor(ours), compressor(theirs)
        hidden_difference = max(hidden_difference, _compare("features", ours.hidden, theirs.hidden))
        scores = (vision.read(Signal("attention")) for vision in (ours, theirs))
        attention_difference = max(attention_difference, _compare("scores", *scores))
        _compare("keys", ours.read(Signal("keys")), theirs.read(Signal("keys")))
        if _same_selection(our_tokens, their_tokens):
            token_difference = _compare("tokens", our_tokens.tokens, their_tokens.tokens)
            return Agreement(token_difference, attention_difference, hidden_difference, num_tried)
    raise NotEquivalentError(
        f"eager_maps and vzip selected different tokens on all {len(images)} images although scores agree to "
        f"{attention_difference:.1e}; their speed cannot be compared (methods=vanilla,vzip leaves eager_maps out)"
    )


def _same_selection(ours: CompressedTokens, theirs: CompressedTokens) -> bool:
    return torch.equal(ours.source_index, theirs.source_index) and torch.equal(ours.merge_index, theirs.merge_index)


def _compare(what: str, ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest absolute difference; raises if it exceeds the tolerances (relative to the largest value)."""
    difference = float((ours - theirs).abs().max())
    allowed = ABSOLUTE_TOLERANCE + RELATIVE_TOLERANCE * float(theirs.abs().max())
    if not difference <= allowed:  # also catches a NaN
        raise NotEquivalentError(
            f"eager_maps and vzip differ in {what}: up to {difference:.2e} where {allowed:.2e} is allowed; their speed "
            "cannot be compared (methods=vanilla,vzip leaves eager_maps out)"
        )
    return difference
