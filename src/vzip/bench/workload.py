"""The fixed input of a measurement: a model, images, prompts and a compressor, all made from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from vzip.bench import shapes
from vzip.bench.device_memory import refuse_if_too_large
from vzip.bench.settings import DEFAULT_METHODS, BenchSettings, estimate_bytes
from vzip.bench.shapes import BenchModel
from vzip.bench.visuals import IMAGE_SIZE, Images, Visuals, visuals_of
from vzip.compressors import Compressor, Identity
from vzip.compressors.base import check_reads_no_text
from vzip.errors import CheckpointError, ConfigError
from vzip.models.compiled import check_compiler, check_compiles, check_parts
from vzip.models.families import Adapter, FamilyOptions, VisualInputs, adapter_class_for_config, adapter_for_model
from vzip.models.families.llava_base import LlavaBase
from vzip.models.families.options import check_fit
from vzip.models.generation import max_positions
from vzip.models.hub import READ_ERRORS, Checkpoint
from vzip.models.load import load_vlm, resolve_checkpoint
from vzip.models.towers.structure import geometry_from_config
from vzip.models.weights.from_config import new_image_processor

TOWER_ONLY_SELECT_LAYER = -2
QUESTION = "How many people can be seen in the picture, and what do they do?"


@dataclass(frozen=True)
class Workload:
    """Everything a pass reads; nothing in it changes between passes.

    Attributes:
        settings: of the measurement.
        device: where the model is.
        dtype: of its weights.
        model: the Hugging Face model (a bare tower where that is measured alone).
        adapter: how to reach its parts, or None for a bare tower.
        visuals: what the prompts show, and the vision tower that reads it.
        select_layer: index into the tower's hidden states.
        compressor: the method measured as ``vzip`` and ``eager_maps``.
        image_processor: Hugging Face's, for the preprocess stage.
        images: ``visuals.num_files`` a prompt.
        input_ids: int64 ``[batch_size, prompt_tokens + placeholders]``, or None for a bare tower.
    """

    settings: BenchSettings
    device: torch.device
    dtype: torch.dtype
    model: PreTrainedModel
    adapter: Adapter | None
    visuals: Visuals
    select_layer: int
    compressor: Compressor
    image_processor: Any
    images: list[Image.Image]
    input_ids: Tensor | None

    def asked(self, visual: VisualInputs) -> VisualInputs:
        """With each image's question, for a text-aware method: its prompt's text, of tokens and without words.

        A text model of its own, which needs words, reads ``QUESTION``.
        """
        adapter, ids = self.adapter, self.input_ids
        assert adapter is not None and ids is not None and isinstance(self.visuals, Images)
        if self.compressor.text_encoder is not None:
            return adapter.asked(visual, self.compressor, [QUESTION] * len(visual.shapes), None)
        is_text = ids[0] != self.visuals.placeholder
        of_prompts = adapter.embed_tokens(ids[:, is_text])
        per_prompt = len(visual.shapes) // len(ids)
        return replace(visual, texts=tuple(rows for rows in of_prompts for _ in range(per_prompt)))

    @property
    def num_inputs(self) -> int:
        """Inputs of the vision tower in the batch."""
        return self.settings.batch_size * self.visuals.num_crops


def fitting(settings: BenchSettings, model: BenchModel) -> BenchSettings:
    """The settings with the methods that the model can be measured by; ConfigError where another is asked for."""
    if model.has_fixed_crops or "eager_maps" not in settings.methods:
        return settings
    if settings.methods != DEFAULT_METHODS:
        raise ConfigError(
            f"methods={','.join(settings.methods)}: eager_maps is the published way of CLIP towers; leave it out with"
            f" model={model.name}"
        )
    return replace(settings, methods=tuple(name for name in settings.methods if name != "eager_maps"))


def check(settings: BenchSettings, model: BenchModel) -> None:
    """Refuses, before anything is allocated, what cannot be measured.

    Raises:
        ConfigError: a budget or pruner that does not fit the model, a number of crops that the family does not make, a
            prompt longer than the language model's positions, or more memory than there is.
        UnsupportedModelError: a vision tower there is no support for.
    """
    compressor = settings.method(model)
    if model.tower_only:
        check_reads_no_text(compressor, f"{model.name} is a vision tower alone, of which nothing is asked")
        check_fit(compressor, geometry_from_config(model.vision_config), FamilyOptions())
    else:
        adapter_class_for_config(model.config).check_settings(model.config, compressor, FamilyOptions())
    meta = shapes.build_meta(model, settings.torch_dtype)
    if (pruner := settings.built_pruner()) is not None:
        if model.tower_only:
            raise ConfigError(
                f"pruner={settings.pruner}: {model.name} is a vision tower alone, and pruners drop in language models."
            )
        adapter_for_model(meta).check_pruner(model.config, pruner)
    if settings.compile:
        _check_compiles(settings, model, compressor)
    num_visual = 0
    if not model.tower_only:
        num_crops = settings.crops_per_prompt(model)
        visuals = visuals_of(adapter_for_model(meta), num_crops, model.medium)
        is_whole = not {"vanilla", settings.pruner}.isdisjoint(settings.methods)
        method = Identity() if is_whole else compressor
        num_visual = sum(method.num_visual_tokens(shape) for shape in visuals.shapes())
        longest = num_visual + settings.prompt_tokens + settings.num_new_tokens
        allowed = max_positions(model.config)
        if allowed is not None and longest > allowed:
            raise ConfigError(
                f"a prompt of up to {num_visual} visual, {settings.prompt_tokens} text and "
                f"{settings.num_new_tokens} new tokens is {longest} long, and {model.name} has {allowed} positions; "
                "lower num_crops, prompt_tokens or num_new_tokens, or leave vanilla out of methods"
            )
    num_parameters = sum(p.numel() for p in meta.parameters())
    needed = estimate_bytes(settings, model, num_parameters, num_visual)
    refuse_if_too_large(needed, settings.torch_device, f"model={model.name} at {settings.torch_dtype}")


def _check_compiles(settings: BenchSettings, model: BenchModel, compressor: Compressor) -> None:
    """Raises as ``check``, or MissingPackageError, for what cannot be compiled here."""
    if model.tower_only:
        raise ConfigError(
            f"compile={','.join(settings.compile)}: {model.name} is a vision tower alone, and a whole model's parts are"
            " compiled."
        )
    parts = check_parts(settings.compile)
    check_compiler(parts, settings.torch_device)
    check_compiles(parts, adapter_class_for_config(model.config), model.config, compressor)


def build(settings: BenchSettings, model: BenchModel) -> Workload:
    """Builds the model and its inputs; call ``check`` first.

    Raises:
        CheckpointError: weights that cannot be found or loaded.
        ConfigError, UnsupportedModelError: as ``check``, for what only the weights can tell.
    """
    return around(settings, model, *build_model(settings, model))


def around(settings: BenchSettings, model: BenchModel, hf_model: PreTrainedModel, image_processor: Any) -> Workload:
    """The inputs of a measurement for a model that is built, both from ``build_model``."""
    adapter, visuals = parts_of(hf_model, model, settings.crops_per_prompt(model))
    images = make_images(settings.batch_size * visuals.num_files, settings.seed, visuals.image_size)
    return Workload(
        settings=settings,
        device=settings.torch_device,
        dtype=settings.torch_dtype,
        model=hf_model,
        adapter=adapter,
        visuals=visuals,
        select_layer=adapter.select_layer if isinstance(adapter, LlavaBase) else TOWER_ONLY_SELECT_LAYER,
        compressor=settings.method(model),
        image_processor=image_processor or new_image_processor(model.config),
        images=images,
        input_ids=make_prompts(settings, visuals) if isinstance(visuals, Images) else None,
    )


def build_model(settings: BenchSettings, model: BenchModel) -> tuple[PreTrainedModel, Any]:
    """The Hugging Face model on its device, and the checkpoint's image processor, or None where there is none.

    Raises:
        CheckpointError: weights that cannot be found or loaded.
    """
    device, dtype = settings.torch_device, settings.torch_dtype
    if settings.weights_of(model) == "random":
        return shapes.build_random(model, device, dtype, settings.seed), None
    if model.tower_only:
        return _load_tower(model, device, dtype), None
    name = "vzip/tiny" if model.name == shapes.TINY else model.checkpoint
    vlm = load_vlm(name, dtype=str(dtype).removeprefix("torch."), device_map=None)
    image_processor = None if vlm.processor is None else vlm.processor.image_processor
    return vlm.model.to(device).eval(), image_processor


def parts_of(hf_model: PreTrainedModel, model: BenchModel, num_crops: int) -> tuple[Adapter | None, Visuals]:
    """The adapter (None for a bare tower) of a built model, and what its prompts show."""
    if model.tower_only:
        return None, Visuals(hf_model, num_crops)
    adapter = adapter_for_model(hf_model)
    return adapter, visuals_of(adapter, num_crops, model.medium)


def _load_tower(model: BenchModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import CLIPVisionModel, SiglipVisionModel

    loader = SiglipVisionModel if model.config.model_type == "siglip_vision_model" else CLIPVisionModel
    try:
        directory = Checkpoint(resolve_checkpoint(model.checkpoint)).fetch_weights()
        loaded = loader.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
    except READ_ERRORS as error:
        raise CheckpointError(
            f"model={model.name} weights=pretrained: {model.checkpoint} could not be loaded ({error}); without a "
            "network give a local directory as model=DIR, or weights=random, which measures the same shapes"
        ) from error
    return loaded.to(device).eval().requires_grad_(False)


def make_images(num_images: int, seed: int, size: tuple[int, int] = IMAGE_SIZE) -> list[Image.Image]:
    """Makes smooth coloured images of ``size`` (width, height), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    width, height = size
    images = []
    for _ in range(num_images):
        coarse = torch.rand(1, 3, height // 16, width // 16, generator=generator)
        smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        images.append(Image.fromarray((smooth * 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()))
    return images


def make_prompts(settings: BenchSettings, visuals: Images) -> Tensor:
    """Makes prompts of random text tokens with the placeholders after the first, or with a token before each.

    Returns:
        int64 ``[batch_size, prompt_tokens + placeholders]`` on the model's device.
    """
    adapter = visuals.adapter
    vocabulary = adapter.embed_tokens.get_parameter("weight").shape[0]
    tokens = (adapter.image_token_id, adapter.video_token_id)
    special = sorted(token for token in tokens if token is not None and token < vocabulary)  # Mini-Gemini's is outside
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.prompt_tokens)
    text = torch.randint(0, vocabulary - len(special), shape, generator=generator)
    for token in special:
        text += text >= token
    num_placeholders, between = visuals.num_placeholders, int(visuals.text_between)
    placeholders = torch.full((settings.batch_size, 1), visuals.placeholder)
    parts = [part for number in range(num_placeholders) for part in (text[:, number : number + 1], placeholders)]
    if not between:
        parts = [text[:, :1], *[placeholders] * num_placeholders]
    num_before = num_placeholders if between else 1
    return torch.cat([*parts, text[:, num_before:]], dim=1).to(settings.torch_device)
