"""The fixed input of a measurement: a model, pictures, prompts and a compressor, all made from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from vzip.bench import shapes
from vzip.bench.memory import refuse_if_too_large
from vzip.bench.settings import BenchSettings, estimate_bytes
from vzip.bench.shapes import BenchModel
from vzip.compressors import Compressor, VisionZip
from vzip.errors import CheckpointError, ConfigError
from vzip.models.adapters import Adapter, adapter_for_model
from vzip.models.load import load_vlm
from vzip.models.towers import Tower, find_tower, geometry_from_config

PICTURE_SIZE = (640, 480)
TOWER_ONLY_SELECT_LAYER = -2


@dataclass(frozen=True)
class Workload:
    """Everything a pass reads; nothing in it changes between passes.

    Attributes:
        settings: of the measurement.
        device: where the model is.
        dtype: of its weights.
        model: the Hugging Face model (a bare tower where that is measured alone).
        adapter: how to reach its parts, or None for a bare tower.
        tower_module: the vision tower as Hugging Face's module.
        tower: the same, taken apart.
        select_layer: index into its hidden states.
        stock_offset: first row of the tower's output the unmodified model uses.
        compressor: the method measured as ``vzip`` and ``eager_maps``.
        image_processor: Hugging Face's, for the preprocess stage.
        pictures: one a tower input, ``batch_size * num_crops`` in all.
        input_ids: int64 ``[batch_size, prompt_tokens + num_crops]`` with one placeholder a picture, or None.
        num_crops: tower inputs in each prompt.
    """

    settings: BenchSettings
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    adapter: Adapter | None
    tower_module: nn.Module
    tower: Tower
    select_layer: int
    stock_offset: int
    compressor: Compressor
    image_processor: Any
    pictures: list[Image.Image]
    input_ids: Tensor | None
    num_crops: int


def check(settings: BenchSettings, model: BenchModel) -> None:
    """Refuses, before anything is allocated, what cannot be measured.

    Raises:
        ConfigError: a budget that does not fit the tower, a prompt longer than the language model's positions, or more
            memory than there is.
        UnsupportedModelError: a vision tower there is no support for.
    """
    geometry = geometry_from_config(model.vision_config)
    _name, budget = settings.token_budget(model)
    VisionZip(budget).check_fits(geometry.num_patches, geometry.has_cls)
    if not model.tower_only:
        num_visual = settings.crops_per_prompt(model) * (geometry.num_patches + int(geometry.has_cls))
        longest = num_visual + settings.prompt_tokens + settings.num_new_tokens
        allowed = model.config.text_config.max_position_embeddings
        if longest > allowed:
            raise ConfigError(
                f"a prompt of up to {num_visual} visual, {settings.prompt_tokens} text and "
                f"{settings.num_new_tokens} new tokens is {longest} long, and {model.name} has {allowed} positions; "
                "lower num_crops, prompt_tokens or num_new_tokens"
            )
    num_parameters = sum(p.numel() for p in shapes.build_meta(model, settings.torch_dtype).parameters())
    needed = estimate_bytes(settings, model, num_parameters)
    refuse_if_too_large(needed, settings.torch_device, f"model={model.name} at {settings.torch_dtype}")


def build(settings: BenchSettings, model: BenchModel) -> Workload:
    """Builds the model and its inputs; call ``check`` first.

    Raises:
        CheckpointError: weights that cannot be found or loaded.
        ConfigError, UnsupportedModelError: as ``check``, for what only the weights can tell.
    """
    device, dtype = settings.torch_device, settings.torch_dtype
    weights = model.default_weights if settings.weights == "auto" else settings.weights
    image_processor: Any = None  # taken from the checkpoint, or else CLIP's
    if weights == "random":
        hf_model = shapes.build_random(model, device, dtype, settings.seed)
    elif model.tower_only:
        hf_model = _load_tower(model, device, dtype)
    else:
        name = "vzip/tiny" if model.name == shapes.TINY else model.checkpoint
        vlm = load_vlm(name, dtype=str(dtype).removeprefix("torch."), device_map=None)
        hf_model = vlm.model.to(device).eval()
        if vlm.processor is not None:
            image_processor = vlm.processor.image_processor
    adapter = None if model.tower_only else adapter_for_model(hf_model)
    tower_module: nn.Module = hf_model if adapter is None else adapter.vision_tower
    tower = find_tower(tower_module) if adapter is None else adapter.tower
    num_crops = settings.crops_per_prompt(model)
    side = tower.geometry.image_size
    return Workload(
        settings=settings,
        device=device,
        dtype=dtype,
        model=hf_model,
        adapter=adapter,
        tower_module=tower_module,
        tower=tower,
        select_layer=TOWER_ONLY_SELECT_LAYER if adapter is None else adapter.select_layer,
        stock_offset=int(tower.geometry.has_cls) if adapter is None else adapter.stock_offset,
        compressor=VisionZip(settings.token_budget(model)[1]),
        image_processor=image_processor or _clip_image_processor(side),
        pictures=make_pictures(settings.batch_size * num_crops, settings.seed),
        input_ids=None if adapter is None else make_prompts(settings, adapter, num_crops),
        num_crops=num_crops,
    )


def _clip_image_processor(side: int) -> Any:
    from transformers import CLIPImageProcessor  # here, because it warns about torchvision when it is imported

    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _load_tower(model: BenchModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import CLIPVisionModel, SiglipVisionModel

    loader = SiglipVisionModel if model.config.model_type == "siglip_vision_model" else CLIPVisionModel
    try:
        loaded = loader.from_pretrained(model.checkpoint, dtype=dtype, attn_implementation="sdpa")
    except OSError as error:
        raise CheckpointError(
            f"model={model.name} weights=pretrained: {model.checkpoint} could not be loaded ({error}); without a "
            "network give a local directory as model=DIR, or weights=random, which measures the same shapes"
        ) from error
    return loaded.to(device).eval().requires_grad_(False)


def make_pictures(num_pictures: int, seed: int) -> list[Image.Image]:
    """Makes smooth coloured pictures, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    width, height = PICTURE_SIZE
    pictures = []
    for _ in range(num_pictures):
        coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator)
        smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        pictures.append(Image.fromarray((smooth * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()))
    return pictures


def make_prompts(settings: BenchSettings, adapter: Adapter, num_crops: int) -> Tensor:
    """Makes prompts of random text tokens with the placeholders after the first.

    Returns:
        int64 ``[batch_size, prompt_tokens + num_crops]`` on the model's device.
    """
    vocabulary = adapter.embed_tokens.get_parameter("weight").shape[0]
    generator = torch.Generator().manual_seed(settings.seed)
    text = torch.randint(0, vocabulary, (settings.batch_size, settings.prompt_tokens), generator=generator)
    text[text == adapter.image_token_id] = (adapter.image_token_id + 1) % vocabulary
    placeholders = torch.full((settings.batch_size, num_crops), adapter.image_token_id)
    return torch.cat([text[:, :1], placeholders, text[:, 1:]], dim=1).to(settings.torch_device)
