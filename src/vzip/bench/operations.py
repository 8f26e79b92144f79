"""Operations of every method's stages, counted on the meta device and held against closed formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from vzip.bench import flops
from vzip.bench.shapes import BenchModel, build_meta
from vzip.bench.stages import METHOD_CLASSES, Vanilla
from vzip.bench.workload import Workload
from vzip.models.adapters import adapter_for_model
from vzip.models.towers import find_tower


@dataclass(frozen=True)
class StageFlops:
    """Operations of one stage.

    Attributes:
        counted: by torch's counter.
        formula: by the closed formula, or None where there is none.
    """

    counted: int
    formula: int | None


def count_method(
    workload: Workload, model: BenchModel, method_name: str, num_visual_tokens: int
) -> dict[str, StageFlops]:
    """Counts one pass of a method on a copy of the model without contents.

    Args:
        workload: of the measurement.
        model: what it was built from.
        method_name: ``vanilla``, ``vzip`` or ``eager_maps``.
        num_visual_tokens: of each prompt, as the pass measured.

    Returns:
        stage -> operations, over the whole batch; ``decode_per_token`` is the first token after prefill.
    """
    meta = _on_meta(workload, model)
    method = METHOD_CLASSES[method_name](meta)
    num_crops = meta.settings.batch_size * meta.num_crops
    side = meta.tower.geometry.image_size
    pixel_values = torch.empty(num_crops, 3, side, side, device="meta", dtype=meta.dtype)
    with torch.no_grad():
        vision = method.run_tower(pixel_values)
        tokens = method.select(vision)
    geometry = meta.tower.geometry
    early_stop = method_name == "vzip"
    num_layers = geometry.num_layers_to_run(meta.select_layer) if early_stop else geometry.num_layers
    tower = flops.tower_formula(
        model.vision_config, num_layers=num_layers, num_crops=num_crops, has_cls=geometry.has_cls
    )
    if early_stop:
        tower += flops.scoring_formula(model.vision_config, num_crops=num_crops, has_cls=geometry.has_cls)
    has_head = (
        model.vision_config.model_type == "siglip_vision_model" and not early_stop
    )  # pooling after the last layer
    result = {"tower": StageFlops(flops.count(lambda: method.run_tower(pixel_values)), None if has_head else tower)}
    if not isinstance(method, Vanilla):
        result["selection"] = StageFlops(flops.count(lambda: method.select(vision)), None)
    if meta.adapter is None:
        return result
    adapter, text = meta.adapter, model.config.text_config
    result["projector"] = StageFlops(
        flops.count(lambda: adapter.projector(tokens)),
        flops.projector_formula(
            num_tokens=tokens.shape[0] * tokens.shape[1],
            vision_dim=model.vision_config.hidden_size,
            text_dim=text.hidden_size,
        ),
    )
    num_tokens = meta.settings.prompt_tokens + num_visual_tokens
    batch_size = meta.settings.batch_size
    result["prefill"] = StageFlops(
        flops.count(lambda: _read(meta, num_tokens, None)),
        flops.decoder_formula(text, num_new=num_tokens, num_past=0, num_logits=1, batch_size=batch_size),
    )
    with torch.no_grad():
        cache = _read(meta, num_tokens, None).past_key_values
    result["decode_per_token"] = StageFlops(
        flops.count(lambda: _read(meta, 1, cache)),
        flops.decoder_formula(text, num_new=1, num_past=num_tokens, num_logits=1, batch_size=batch_size),
    )
    return result


def _on_meta(workload: Workload, model: BenchModel) -> Workload:
    built = build_meta(model, workload.dtype)
    adapter = None if workload.adapter is None else adapter_for_model(built)
    tower_module = built if adapter is None else adapter.vision_tower
    return replace(
        workload,
        device=torch.device("meta"),
        model=built,
        adapter=adapter,
        tower_module=tower_module,
        tower=find_tower(tower_module),
    )


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
