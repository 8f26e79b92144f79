"""The families with vLLM's modules as their parts: the same tap, methods and packing as in ``CompressedVlm``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vzip.compressors.base import Compressor
from vzip.compressors.vision import VisionShape
from vzip.errors import PromptError, UnsupportedModelError, nearest
from vzip.media.images import Preprocess
from vzip.models.families.base import VisualInputs
from vzip.models.families.llava.adapter import LlavaAdapter
from vzip.models.families.llava_base import LlavaBase
from vzip.models.families.llava_next.adapter import LlavaNextAdapter
from vzip.models.families.llava_next.anyres import llava_grid
from vzip.models.families.options import FamilyOptions
from vzip.models.towers.structure import Tower, parts_of

from . import ARCHITECTURES

Gather = Callable[[Tensor], Tensor]


class AttentionInput(nn.Module):
    """One of the queries, keys and values that an attention module of vLLM is called with, to be read by a hook.

    vLLM projects all three in one go, so no module's output is the queries; behind LoRA the fused one is not even
    called. What arrives at the attention is right in any case; of several processes each has some of the heads.
    """

    def __init__(self, attention: nn.Module, number: int, gather: Gather) -> None:
        super().__init__()
        self._attention, self._number, self._gather = (attention,), number, gather

    def register_forward_hook(self, hook: Any, **_: Any) -> RemovableHandle:
        def read(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hook(module, inputs, self._gather(inputs[self._number]))

        return self._attention[0].register_forward_pre_hook(read)


@dataclass(frozen=True)
class ServedTower(Tower):
    """A vision tower of vLLM, of no more layers than are needed.

    Attributes:
        gather: the heads of all processes side by side, of one process's: all then choose the same.
    """

    gather: Gather = lambda heads: heads

    def run_layer(self, layer_index: int, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        output = self.layers[layer_index](hidden)
        return output[0] if isinstance(output, tuple) else output  # SigLIP's layers return a pair

    def attention_of(self, layer_index: int) -> tuple[nn.Module, nn.Module, float]:
        own = self.layers[layer_index].get_submodule("self_attn")
        attention, gather = own.get_submodule("attn"), self.gather if own.tp_size > 1 else lambda heads: heads  # type: ignore[operator]
        queries, keys = (AttentionInput(attention, number, gather) for number in (0, 1))
        return queries, keys, float(own.scale)  # type: ignore[arg-type]


class ServedAdapter(LlavaBase):
    """What the families served share; without a model (``of_config``) an adapter counts, and no more."""

    model: Any

    def __init__(self, model: Any, options: FamilyOptions, gather: Gather | None = None) -> None:
        self._gather = gather
        super().__init__(model, options)

    @classmethod
    def of_config(cls, config: Any, options: FamilyOptions) -> ServedAdapter:
        """For counts alone."""
        return cls(SimpleNamespace(config=config), options)

    @classmethod
    def num_layers(cls, config: Any, compressor: Compressor) -> int:
        """Layers of the vision tower that the model's output and the method's signals need."""
        layers = {signal.layer for signal in compressor.reads()} - {None}
        geometry = cls.check_config(config)
        return max(
            geometry.num_layers_to_run(layer) for layer in {*layers, cls.read_select_layer(config)} if layer is not None
        )

    @property
    def vision_tower(self) -> nn.Module:
        return self.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        return self.model.multi_modal_projector

    def take_apart(self) -> Tower:
        if self._gather is None:
            return None  # type: ignore[return-value]
        parts = parts_of(self.vision_tower, self.model.config.vision_config)
        return ServedTower(**parts, gather=self._gather)

    def newline(self, like: Tensor) -> Tensor:
        return self.model.image_newline.to(like)

    def image_crops(self, visual: VisualInputs) -> Tensor:
        return visual.tensors["pixel_values"]

    def shape(self, image: Mapping[str, Tensor]) -> VisionShape:
        """The shape of one image, of what ``prepare_images`` returns its own row of each tensor.

        Raises:
            PromptError: pixels that the tower does not take, with which the whole engine would end later.
        """
        side, given = self.image_side, tuple(image["pixel_values"].shape[-2:])
        if given != (side, side):
            raise PromptError(
                f"pixel_values are {given[0]} x {given[1]} pixels (height x width), and the vision tower takes {side} x"
                f" {side}: leave out of mm_processor_kwargs what changes an image's size."
            )
        tensors = {name: image[name][None] for name in self.input_names if name in image}
        return self.image_shapes(tensors)[0]

    def blank(self, height: int, width: int, preprocess: Preprocess) -> dict[str, Tensor]:
        """An image of that size as ``shape`` takes it, without pixels."""
        return {"pixel_values": torch.empty(3, self.image_side, self.image_side, device="meta")}

    def crops(self, image: Mapping[str, Tensor], shape: VisionShape) -> Tensor:
        """An image's crops, ``[num_crops, 3, h, w]``, those left out that only fill up a batch."""
        return image["pixel_values"][None]

    def tokens(self, crops: Sequence[Tensor], shapes: Sequence[VisionShape], compressor: Compressor) -> list[Tensor]:
        """Visual tokens ``[num_visual_tokens, d_text]`` of images of one budget."""
        visual = VisualInputs(list(shapes), [], {"pixel_values": torch.cat(list(crops))})
        return [tokens.rows for tokens in self.encode(visual, compressor)]


class ServedLlava(ServedAdapter, LlavaAdapter):
    """One crop an image."""


class ServedLlavaNext(ServedAdapter, LlavaNextAdapter):
    """A base crop and tiles."""

    def blank(self, height: int, width: int, preprocess: Preprocess) -> dict[str, Tensor]:
        (pixels,) = super().blank(height, width, preprocess).values()
        image = {"pixel_values": pixels.expand(2, -1, -1, -1), "image_sizes": torch.tensor([height, width])}
        if preprocess == "llava":
            image["tile_grids"] = torch.tensor(llava_grid(height, width, self.pinpoints, self.image_side))
        return image

    def crops(self, image: Mapping[str, Tensor], shape: VisionShape) -> Tensor:
        return image["pixel_values"][: shape.num_crops]


_SERVED: dict[str, type[ServedAdapter]] = {
    ARCHITECTURES["LlavaForConditionalGeneration"]: ServedLlava,
    ARCHITECTURES["LlavaNextForConditionalGeneration"]: ServedLlavaNext,
}


def served_adapter(config: Any) -> tuple[str, type[ServedAdapter]]:
    """Our architecture and its adapter class, for a configuration whose architecture is one of ours or the stock one's.

    Raises:
        UnsupportedModelError: it is not served.
    """
    for name in config.architectures or []:
        own = ARCHITECTURES.get(name, name)
        if own in _SERVED:
            return own, _SERVED[own]
    given = ", ".join(config.architectures or ["none"])
    raise UnsupportedModelError(
        f"architectures={given}: not served by vLLM with vzip{nearest(given, ARCHITECTURES)}; served are"
        f" {', '.join(ARCHITECTURES)}. Other models: `python -m vzip embed`, whose visual tokens a stock vLLM takes."
    )
