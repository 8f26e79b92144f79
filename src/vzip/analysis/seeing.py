"""A vision tower and what shows it images: a model's own, or that of a bare CLIP or SigLIP checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, CLIPVisionModel, PreTrainedModel, SiglipVisionModel
from transformers.utils import logging as transformers_logging

from vzip.errors import ConfigError, UnsupportedModelError
from vzip.media.images import prepare_images
from vzip.models.families.llava_base import LlavaBase
from vzip.models.hub import Checkpoint
from vzip.models.load import check_complete, reach, read_config, resolve_checkpoint
from vzip.models.towers.structure import Tower, find_tower, geometry_from_config
from vzip.models.vlm import CompressedVlm

from .kept import seen_image

# By the type that config.json names: a whole model, or its image half alone.
BARE: Mapping[str, type[PreTrainedModel]] = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
USUAL_LAYER = -2  # the paper's, for a tower that no model tells how it is used


@dataclass(frozen=True)
class SeeingTower:
    """A tower that images can be given to.

    Attributes:
        name: for captions.
        tower: taken apart.
        select_layer: from 0 (the input of the first layer) to the number of layers.
        prepare: an image -> ``[1, 3, h, w]``, the crop that shows all of it.
        image_processor: which normalises.
        layer_is: what the select layer is, for captions: ``select layer`` where a model says so.
    """

    name: str
    tower: Tower
    select_layer: int
    prepare: Callable[[Image.Image], Tensor]
    image_processor: Any
    layer_is: str

    def see(self, image: Image.Image) -> tuple[Tensor, Image.Image]:
        """What the tower takes, ``[1, 3, h, w]``, and the same to look at, without an edge that no patch covers.

        Raises:
            ImageError: an image that cannot be used.
        """
        pixels = self.prepare(image)
        weight = next(self.tower.embeddings.parameters())
        picture = seen_image(pixels[0], self.image_processor, self.tower.geometry.grid)
        return pixels.to(weight.device, weight.dtype), picture

    def with_layer(self, layer: int | None) -> SeeingTower:
        """The same with another select layer, counted as in the tower's hidden states; None: as it is.

        Raises:
            ConfigError: the tower has no such layer, or there is no attention before it.
        """
        if layer is None:
            number = self.select_layer
        else:
            try:
                number = self.tower.geometry.num_layers_to_run(layer)
            except UnsupportedModelError:
                number = 0
        if number == 0:
            most = self.tower.geometry.num_layers
            which = "vision_feature_layer=0" if layer is None else f"--layer {layer}"
            raise ConfigError(
                f"{which}: the vision tower of {self.name} has attention in layers 1 to {most} (-1: the last)."
            )
        return replace(self, select_layer=number, layer_is=self.layer_is if layer is None else "chosen layer")


def of_vlm(vlm: CompressedVlm, name: str) -> SeeingTower:
    """The tower of a loaded model.

    Raises:
        UnsupportedModelError: neither a CLIP nor a SigLIP tower, nor one like them.
        ConfigError: the model has no processor.
    """
    adapter = vlm.adapter
    if not isinstance(adapter, LlavaBase):
        raise UnsupportedModelError(
            f"model={name}: {type(adapter.model).__name__} has no vision tower of the CLIP or SigLIP kind, whose"
            " attention is shown here. Use a model of LLaVA, Mini-Gemini, Video-LLaVA or InternVL, or"
            " model=DIR with a CLIP or SigLIP checkpoint."
        )
    processor = vlm.processor
    if processor is None:
        raise ConfigError(f"model={name}: the checkpoint has no processor to prepare images with.")

    def prepare(image: Image.Image) -> Tensor:
        visual = adapter.read_inputs(**vlm.preprocess_images([image]))
        return adapter.image_pixels(visual)[adapter.overview_index(visual.images[0])][None]

    layer = adapter.geometry.num_layers_to_run(adapter.select_layer)
    return SeeingTower(name, adapter.tower, layer, prepare, processor.image_processor, "select layer")


def check_bare(name: str) -> Path | str:
    """A directory or hub id of a CLIP or SigLIP checkpoint; nothing but its configuration is read.

    Raises:
        CheckpointError: it cannot be found or read.
        ConfigError: of another type.
        UnsupportedModelError: sizes that cannot be.
    """
    source = resolve_checkpoint(name)
    config = read_config(Checkpoint(source, key="model").directory)
    if config.model_type not in BARE:
        raise ConfigError(
            f"model={name}: of type {config.model_type}. By its directory a bare vision tower is given, of type"
            f" {', '.join(BARE)}; a whole vision-language model by model=llava_local model.name_or_path={name}."
        )
    geometry_from_config(getattr(config, "vision_config", config))
    return source


def load_bare(source: Path | str) -> SeeingTower:
    """The tower of a CLIP or SigLIP checkpoint, on the first GPU where there is one; images are padded to a square.

    Args:
        source: from ``check_bare``.

    Raises:
        CheckpointError: it is incomplete or damaged, or has no image processor.
    """
    checkpoint = Checkpoint(source, key="model")
    directory = checkpoint.fetch_weights()
    model_class = BARE[read_config(directory).model_type]
    processor = reach(source, lambda: AutoImageProcessor.from_pretrained(directory, trust_remote_code=False))
    settings: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": "auto"}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it lists the text half, which is left out on purpose
    try:
        model, report = reach(
            source, lambda: model_class.from_pretrained(directory, trust_remote_code=False, **settings)
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    check_complete(source, report, not_wanted=r"text_model\.|text_projection\.|visual_projection\.|logit_")
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    tower = find_tower(model)

    def prepare(image: Image.Image) -> Tensor:
        return prepare_images([image], processor, "llava")["pixel_values"]

    name = source if isinstance(source, str) else source.resolve().name
    return SeeingTower(
        name, tower, tower.geometry.num_layers_to_run(USUAL_LAYER), prepare, processor, "second-last layer"
    )
