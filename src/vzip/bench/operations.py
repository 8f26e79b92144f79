"""Operations of every method's stages, counted on the meta device and held against closed formulas."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vzip.bench import flops
from vzip.bench.shapes import BenchModel, build_meta
from vzip.bench.stages import METHOD_CLASSES, Method, Vanilla, Vzip, preprocess
from vzip.bench.visuals import AnySize, Frames, Images
from vzip.bench.workload import Workload, parts_of
from vzip.compressors import Signal, VisionOutput
from vzip.models.families import LlavaOnevisionAdapter, MiniGeminiAdapter, Qwen2_5VlAdapter


@dataclass(frozen=True)
class StageFlops:
    """Operations of one stage.

    Attributes:
        counted: by torch's counter.
        formula: by the closed formula, or None where there is none.
    """

    counted: int
    formula: int | None

    def __add__(self, other: StageFlops) -> StageFlops:
        both = None if self.formula is None or other.formula is None else self.formula + other.formula
        return StageFlops(self.counted + other.counted, both)


def count_method(
    workload: Workload,
    model: BenchModel,
    method_name: str,
    num_visual_tokens: int,
    cached_tokens: Sequence[int] = (),
) -> dict[str, StageFlops]:
    """Counts one pass of a method on a copy of the model without contents.

    Args:
        workload: of the measurement.
        model: what it was built from.
        method_name: one of ``METHOD_CLASSES``. What a pruner itself computes, a row of attention, is not counted.
        num_visual_tokens: of each prompt, as the pass measured.
        cached_tokens: of each layer, likewise; needed of a pruner whose schedule depends on the data.

    Returns:
        stage -> operations, over the whole batch; ``decode_per_token`` is the first token after prefill.
    """
    meta = _on_meta(workload, model)
    method = METHOD_CLASSES[method_name](meta)
    if isinstance(workload.visuals, AnySize):
        return _of_any_size(meta, model, method, num_visual_tokens)
    side = meta.visuals.tower.geometry.image_size
    pixel_values = torch.empty(meta.num_inputs, 3, side, side, device="meta", dtype=meta.dtype)
    result = {"tower": _tower(method, model, pixel_values)}
    if (
        isinstance(method, Vzip) and method.compressor.tower_use == "pruned"
    ):  # how many patches a layer sees, data decide
        real, inputs = METHOD_CLASSES[method_name](workload), preprocess(workload)
        pixels = workload.visuals.tower_inputs(inputs)
        result["tower"] = StageFlops(flops.count(lambda: real.run_tower(pixels)), None)
    with torch.no_grad():
        vision = _with_text(meta, workload, model, method.run_tower(pixel_values))
    rows = None
    if isinstance(meta.adapter, LlavaOnevisionAdapter) and isinstance(meta.visuals, Frames):
        rows = vision.hidden[:, vision.first_stock_row :]  # all are projected, then pooled
        with torch.no_grad():
            vision = meta.adapter.pooled(vision)
    if isinstance(meta.adapter, MiniGeminiAdapter):
        result |= _mining(meta.adapter, vision, pixel_values)
    if not isinstance(method, Vanilla):
        result["selection"] = StageFlops(flops.count(lambda: method.compressor(vision)), None)
    if meta.adapter is None:
        return result
    if rows is not None:
        tokens = rows
    elif method.compressor.space == "projected":  # every row goes through the projector, before the selection
        tokens = vision.hidden[:, vision.first_stock_row :]
    else:
        with torch.no_grad():
            tokens = method.compressor(vision).tokens
    return result | _language(meta, model, tokens, _layers_of(meta, model, method, num_visual_tokens, cached_tokens))


def _with_text(meta: Workload, workload: Workload, model: BenchModel, vision: VisionOutput) -> VisionOutput:
    """What a text-aware method reads beside the tower's output, without contents."""
    if not meta.compressor.reads_text:
        return vision
    num_crops, num_units = vision.hidden.shape[:2]
    encoder = None if workload.adapter is None else workload.adapter.text_encoder
    shape = (meta.settings.prompt_tokens, model.config.text_config.hidden_size)
    if meta.compressor.text_encoder is not None and encoder is not None:
        shape = (1, encoder.text_projection.out_features)
    signals = {**vision.signals, Signal("text"): vision.hidden.new_empty(num_crops, *shape)}
    for signal in meta.compressor.reads():
        if signal.name == "aligned":
            signals[signal] = vision.hidden.new_empty(num_crops, num_units, shape[1])
    assert meta.adapter is not None
    return replace(vision, signals=signals, project=meta.adapter.projector)


def _of_any_size(meta: Workload, model: BenchModel, method: Method, num_visual_tokens: int) -> dict[str, StageFlops]:
    """The same of a family that runs its tower itself: by its formula alone, since its loops need contents."""
    adapter, visuals = meta.adapter, meta.visuals
    assert isinstance(adapter, Qwen2_5VlAdapter) and isinstance(visuals, AnySize)
    (own,) = (value for name, value in visuals.blank().items() if name.endswith("grid_thw"))
    grids = own.tolist() * meta.settings.batch_size
    is_scored = Signal("attention") in method.compressor.reads()
    result = {"tower": StageFlops(adapter.tower.num_operations(grids, is_scored=is_scored), None)}
    return result | _language(meta, model, None, _layers_of(meta, model, method, num_visual_tokens))


def _tower(method: Method, model: BenchModel, pixel_values: Tensor) -> StageFlops:
    visuals, config = method.workload.visuals, model.vision_config
    geometry, num_crops = visuals.tower.geometry, pixel_values.shape[0]
    stops_early = isinstance(method, Vzip)
    num_layers = geometry.num_layers_to_run(method.workload.select_layer) if stops_early else geometry.num_layers
    formula = flops.tower_formula(config, num_layers=num_layers, num_crops=num_crops, has_cls=geometry.has_cls)
    if stops_early:
        formula += flops.scoring_formula(config, num_crops=num_crops, has_cls=geometry.has_cls)
    # No formula for the pooling after SigLIP's last layer, and for what other methods read, of other layers maybe.
    has_head = config.model_type == "siglip_vision_model" and not stops_early
    reads_otherwise = stops_early and method.compressor.reads() != {Signal("attention"), Signal("keys")}
    counted = flops.count(lambda: method.run_tower(pixel_values))
    return StageFlops(counted, None if has_head or reads_otherwise else formula)


def _mining(adapter: MiniGeminiAdapter, vision: VisionOutput, pixel_values: Tensor) -> dict[str, StageFlops]:
    """Both of Mini-Gemini's own stages."""
    config = adapter.model.config
    num_images, side = pixel_values.shape[0], config.high_res_image_size
    images = pixel_values.new_empty(num_images, 3, side, side)
    with torch.no_grad():
        highres = adapter.high_res(images)
    num_patches, num_channels = vision.num_patches, highres.shape[1]
    return {
        "high_res_tower": StageFlops(
            flops.count(lambda: adapter.high_res(images)),
            flops.convnext_formula(config.high_res_config, image_size=side, num_images=num_images),
        ),
        "mining": StageFlops(
            flops.count(lambda: adapter.mined(vision, highres)),
            flops.mining_formula(
                num_patches=num_patches,
                window=highres.shape[2] * highres.shape[3] // num_patches,
                patch_dim=vision.hidden.shape[2],
                num_channels=num_channels,
                num_images=num_images,
            ),
        ),
    }


def _layers_of(
    meta: Workload, model: BenchModel, method: Method, num_visual_tokens: int, cached_tokens: Sequence[int] = ()
) -> list[tuple[Workload, BenchModel, int]]:
    """The language model as models of some of its layers each, with the visual tokens of a prompt that these read."""
    if method.pruner is None or not isinstance(meta.visuals, Images):
        return [(meta, model, num_visual_tokens)]
    num_images = meta.visuals.num_placeholders
    num_layers = model.config.text_config.num_hidden_layers
    schedule = method.pruner.schedule(num_visual_tokens // num_images, num_layers)
    if schedule is None:
        by_layer = [length - meta.settings.prompt_tokens for length in cached_tokens]
    else:
        by_layer = [num_images * kept for kept in schedule]
    parts = []
    for kept, layers in itertools.groupby(by_layer):
        config = copy.deepcopy(model.config)
        config.text_config.num_hidden_layers = len(list(layers))
        part = replace(model, config=config)
        parts.append((_on_meta(meta, part), part, kept))
    return parts


def _language(
    meta: Workload, model: BenchModel, tokens: Tensor | None, parts: list[tuple[Workload, BenchModel, int]]
) -> dict[str, StageFlops]:
    """The stages after compression; ``tokens [N, K, D]`` go to the projector, ``parts`` are ``_layers_of``."""
    text = model.config.text_config
    batch_size = meta.settings.batch_size
    head = meta.model.get_output_embeddings()
    row = torch.empty(batch_size, text.hidden_size, device="meta", dtype=meta.dtype)
    heads = (len(parts) - 1) * flops.count(lambda: head(row))
    prefill, decode = StageFlops(-heads, 0), StageFlops(-heads, 0)
    for number, (part, of_part, num_visual) in enumerate(parts):
        num_tokens = meta.settings.prompt_tokens + num_visual
        with torch.no_grad():
            cache = _read(part, num_tokens, None).past_key_values
        formula = functools.partial(
            flops.decoder_formula,
            of_part.config.text_config,
            num_logits=int(number == 0),
            batch_size=batch_size,
        )
        prefill += StageFlops(
            flops.count(functools.partial(_read, part, num_tokens, None)), formula(num_new=num_tokens, num_past=0)
        )
        decode += StageFlops(
            flops.count(functools.partial(_read, part, 1, cache)), formula(num_new=1, num_past=num_tokens)
        )
    after = {"prefill": prefill, "decode_per_token": decode}
    if tokens is None:
        return after
    assert meta.adapter is not None
    projector = meta.adapter.projector
    of_projector = flops.projector_formula(
        num_tokens=tokens.shape[0] * tokens.shape[1],
        vision_dim=tokens.shape[2],
        text_dim=text.hidden_size,
    )
    return {"projector": StageFlops(flops.count(lambda: projector(tokens)), of_projector), **after}


def _on_meta(workload: Workload, model: BenchModel) -> Workload:
    built = build_meta(model, workload.dtype)
    adapter, visuals = parts_of(built, model, workload.visuals.num_crops)
    return replace(workload, device=torch.device("meta"), model=built, adapter=adapter, visuals=visuals)


def _read(meta: Workload, num_new: int, cache: Any) -> Any:
    """The language model on ``num_new`` positions after a cache, with a mask of its final shape.

    The four-dimensional mask keeps transformers from looking into a two-dimensional one, which has no contents here.
    """
    text = meta.model.config.get_text_config()
    batch_size = meta.settings.batch_size
    num_past = 0 if cache is None else cache.get_seq_length()
    return meta.model(
        inputs_embeds=torch.empty(batch_size, num_new, text.hidden_size, device="meta", dtype=meta.dtype),
        attention_mask=torch.zeros(batch_size, 1, num_new, num_past + num_new, device="meta", dtype=meta.dtype),
        position_ids=torch.zeros(batch_size, num_new, device="meta", dtype=torch.int64),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
