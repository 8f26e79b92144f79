"""One pass of one method, stage by stage, from images to decoded tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vzip.bench.device_memory import storage_bytes
from vzip.bench.eager_maps import EagerMaps, select_layer_index
from vzip.bench.hooks import recorded_outputs
from vzip.bench.settings import COMPILED, PRUNERS
from vzip.bench.timing import StageTimes, Stopwatch, Untimed
from vzip.bench.visuals import Images
from vzip.bench.workload import Workload
from vzip.compressors import Compressor, Identity, VisionOutput
from vzip.models.compiled import CompiledEncoder, CompiledLanguageModel, check_parts
from vzip.models.families.base import TowerRun, VisualInputs
from vzip.models.families.places import VisualTokens
from vzip.models.splice import PreparedInputs, plan_splice, positions_before, splice_tokens
from vzip.models.towers.planned import run_for
from vzip.models.towers.structure import Tower
from vzip.models.towers.units import as_units
from vzip.ops.attention import cls_attention, mean_keys, received_attention
from vzip.pruners import Pruner
from vzip.pruners.context import PrunedRun, pruning

STAGES = {
    "preprocess": "images to pixel values on the device",
    "encode": "compiled tower: what follows, to the projector's output, as one graph",
    "tower": "vision tower, with what scoring needs",
    "scoring": "the part of `tower` that makes scores and keys from one layer's projections, timed apart",
    "high_res_tower": "Mini-Gemini: the other vision tower",
    "mining": "Mini-Gemini: what each patch finds in its window of that tower's features",
    "text": "text-aware methods: reading the question",
    "selection": "selection and merge",
    "projector": "projector",
    "splice": "planning and building the language model's inputs",
    "prefill": "language model on the whole prompt, scores of the last position only",
    "decode_per_token": "one further token, with the cache",
    "time_to_first_token": "pixel values on the device to the first token's id, one uninterrupted run (not the sum)",
}
"""Stage -> what it covers, in the order of the pipeline."""


class Method(ABC):
    """A way of making visual tokens; what follows is the same for all."""

    name: str

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    @abstractmethod
    def run_tower(self, pixel_values: Tensor) -> VisionOutput:
        """Encodes ``[N, 3, h, w]``, as the tower takes them."""

    @property
    def compressor(self) -> Compressor:
        """What makes the tokens that go to the projector."""
        return self.workload.compressor

    @property
    def pruner(self) -> Pruner | None:
        """What drops tokens inside the language model, if anything does."""
        return None


class Vanilla(Method):
    """The unmodified model: every layer of the tower runs, as Hugging Face runs it, and every patch is used."""

    name = "vanilla"

    def run_tower(self, pixel_values: Tensor) -> VisionOutput:
        visuals = self.workload.visuals
        tower, geometry = visuals.tower, visuals.tower.geometry
        layer = tower.layers[select_layer_index(tower, self.workload.select_layer)]
        # Asking for output_hidden_states would leave hooks on the model; one temporary hook costs and leaves nothing.
        with recorded_outputs({"hidden": layer}) as outputs:
            visuals.tower_module(pixel_values)
        vision = VisionOutput(outputs["hidden"], geometry.has_cls, geometry.grid, stock_offset=visuals.stock_offset)
        return as_units(vision, geometry.unit_side)

    @property
    def compressor(self) -> Compressor:
        return Identity()


class Vzip(Method):
    """This project's way: fused attention, one softmax row, a stop after the select layer."""

    name = "vzip"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self._projections: dict[str, Tensor] = {}
        self.reads_as_published = workload.settings.reads_as_published

    def run_tower(self, pixel_values: Tensor) -> VisionOutput:
        w = self.workload
        return run_for(w.compressor, w.visuals.tower, pixel_values, w.select_layer, w.visuals.stock_offset)

    def run_scoring(self, pixel_values: Tensor, watch: Stopwatch) -> None:
        """Times scoring by itself, on projections recorded once."""
        tower = self.workload.visuals.tower
        index = select_layer_index(tower, self.workload.select_layer)
        query_projection, key_projection, scale = tower.attention_of(index)
        if not self._projections:
            with recorded_outputs({"queries": query_projection, "keys": key_projection}) as outputs:
                self.run_tower(pixel_values)
            self._projections = outputs
        queries, keys = self._projections["queries"], self._projections["keys"]
        with watch.stage("scoring"):
            score = cls_attention if tower.geometry.has_cls else received_attention
            score(queries, keys, tower.num_heads, scale)
            mean_keys(keys, tower.num_heads)


class EagerMapsMethod(Method):
    """The published way; see ``vzip.bench.eager_maps``."""

    name = "eager_maps"

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        visuals = workload.visuals
        self.eager = EagerMaps(visuals.tower_module, workload.select_layer, visuals.stock_offset)

    def run_tower(self, pixel_values: Tensor) -> VisionOutput:
        return self.eager.encode(pixel_values)


class Pruned(Vanilla):
    """Every visual token enters the unmodified model; a pruner, whose name it has, drops some inside."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.name = workload.settings.pruner
        self._pruner = workload.settings.built_pruner()

    @property
    def pruner(self) -> Pruner | None:
        return self._pruner


class Compiled(Vzip):
    """``Vzip`` with the parts that ``compile`` names under ``torch.compile``, as ``load_vlm(compile=)`` runs them.

    Attributes:
        encoder: from the model's inputs to visual tokens, or None.
        language: the language model, or None.
    """

    name = COMPILED

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.encoder: CompiledEncoder | None = None
        self.language: CompiledLanguageModel | None = None
        adapter, parts = workload.adapter, check_parts(workload.settings.compile)
        assert adapter is not None
        if "tower" in parts:
            self.encoder, self.reads_as_published = CompiledEncoder(adapter), False  # scoring is in the graph
        if {"prefill", "decode"} & set(parts):
            self.language = CompiledLanguageModel(workload.model, adapter.embed_tokens, parts)


METHOD_CLASSES: dict[str, type[Method]] = {m.name: m for m in (Vanilla, Vzip, EagerMapsMethod, Compiled)}
METHOD_CLASSES |= dict.fromkeys(PRUNERS, Pruned)


@dataclass(frozen=True)
class PassResult:
    """What one pass showed.

    Attributes:
        times_ms: stage -> milliseconds.
        num_visual_tokens: visual tokens of each prompt, counted on the tensors.
        num_prompt_tokens: length of the language model's input, or 0 for a bare tower.
        kv_cache_bytes: allocated by the cache after prefill, over the whole batch.
        cached_tokens: tokens of one prompt that each layer then holds; empty for a bare tower.
        token_ids: int64 ``[batch_size, 1 + num_new_tokens]``, or None for a bare tower.
    """

    times_ms: StageTimes
    num_visual_tokens: int
    num_prompt_tokens: int
    kv_cache_bytes: int
    cached_tokens: list[int]
    token_ids: Tensor | None


def preprocess(workload: Workload) -> dict[str, Tensor]:
    """Turns the images into the model's inputs on the device, pixels in the model's dtype."""
    prepared = workload.visuals.prepare(workload.images, workload.image_processor)
    return {
        name: tensor.to(workload.device, workload.dtype if tensor.is_floating_point() else None)
        for name, tensor in prepared.items()
    }


@torch.inference_mode()
def run_pass(method: Method, watch: Stopwatch | None = None) -> PassResult:
    """Runs one method once, with the clock stopped between stages; ``watch``: the clock, where one is looked at."""
    w = method.workload
    watch = watch or Stopwatch(w.device)
    with watch.stage("preprocess"):
        inputs = preprocess(w)
    tokens = _visual_tokens(method, inputs, watch)
    if isinstance(method, Vzip) and method.reads_as_published and w.visuals.has_tower:
        method.run_scoring(w.visuals.tower_inputs(inputs), watch)
    if w.adapter is None:
        return PassResult(watch.times_ms, len(tokens[0].rows) * w.visuals.num_crops, 0, 0, [], None)
    with ExitStack() as stack:
        return _language(method, tokens, inputs, watch, stack)


def _language(
    method: Method, tokens: list[VisualTokens], inputs: dict[str, Tensor], watch: Stopwatch, stack: ExitStack
) -> PassResult:
    """The stages of the language model; a pruner is at work until ``stack`` ends."""
    w = method.workload
    assert w.adapter is not None
    if isinstance(method, Compiled) and method.language is not None:
        return _compiled_language(method, method.language, tokens, inputs, watch)
    prepared, output, run = _first_token(method, tokens, w.adapter.read_inputs(**inputs), watch, stack)
    del tokens
    token_ids = output.logits[:, -1:].argmax(dim=-1)
    cache = output.past_key_values
    cached_tokens = [int(cache.get_seq_length(layer)) for layer in range(len(cache.layers))]
    kv_cache_bytes = storage_bytes([t for layer in cache.layers for t in (layer.keys, layer.values)])
    num_visual_tokens = sum(prepared.num_visual_tokens) // w.settings.batch_size
    decoded = [token_ids]
    mask, position = prepared.attention_mask, prepared.position_ids[..., -1:]
    with watch.stage("decode_per_token", divide_by=w.settings.num_new_tokens):
        for _ in range(w.settings.num_new_tokens):
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            position = position + 1
            output = w.model(
                inputs_embeds=w.adapter.embed_tokens(decoded[-1]),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            decoded.append(output.logits[:, -1:].argmax(dim=-1))
    if run is not None:
        run.check_forwards(1 + w.settings.num_new_tokens)
    result_ids = torch.cat(decoded, dim=1)
    num_prompt_tokens = prepared.inputs_embeds.shape[1]
    del prepared, output, cache
    stack.close()
    watch.times_ms["time_to_first_token"] = _time_to_first_token_ms(method, inputs)
    return PassResult(watch.times_ms, num_visual_tokens, num_prompt_tokens, kv_cache_bytes, cached_tokens, result_ids)


def _compiled_language(
    method: Compiled,
    language: CompiledLanguageModel,
    tokens: list[VisualTokens],
    inputs: dict[str, Tensor],
    watch: Stopwatch,
) -> PassResult:
    """The stages of a compiled language model."""
    w = method.workload
    assert w.adapter is not None
    num_new = w.settings.num_new_tokens
    prepared = _spliced(method, tokens, w.adapter.read_inputs(**inputs), watch)
    with watch.stage("prefill"):
        reading = language.begin(prepared, num_new)
    decoded = [reading.logits.argmax(dim=-1)]
    with watch.stage("decode_per_token", divide_by=num_new):
        for _ in range(num_new):
            language.go_on(reading, decoded[-1])
            decoded.append(reading.logits.argmax(dim=-1))
    layers = reading.cache.layers
    kv_cache_bytes = storage_bytes([t for layer in layers for t in (layer.keys, layer.values)])
    num_visual_tokens = sum(prepared.num_visual_tokens) // w.settings.batch_size
    num_prompt_tokens = prepared.inputs_embeds.shape[1]
    language.end(reading)
    watch.times_ms["time_to_first_token"] = _time_to_first_token_ms(method, inputs)
    cached = [num_prompt_tokens] * len(layers)
    ids = torch.stack(decoded, dim=1)
    return PassResult(watch.times_ms, num_visual_tokens, num_prompt_tokens, kv_cache_bytes, cached, ids)


def _time_to_first_token_ms(method: Method, inputs: dict[str, Tensor]) -> float:
    """Times the way from pixel values to the first token's id on the host without stopping in between."""
    watch = Stopwatch(method.workload.device)
    with watch.stage("all"), ExitStack() as stack:
        tokens = _visual_tokens(method, inputs, Untimed())
        assert method.workload.adapter is not None
        visual = method.workload.adapter.read_inputs(**inputs)
        if isinstance(method, Compiled) and method.language is not None:
            prepared = _spliced(method, tokens, visual, Untimed())
            reading = method.language.begin(prepared, method.workload.settings.num_new_tokens)
            reading.logits.argmax(dim=-1).tolist()
            method.language.end(reading)
        else:
            output = _first_token(method, tokens, visual, Untimed(), stack)[1]
            output.logits[:, -1].argmax(dim=-1).tolist()
    return watch.times_ms["all"]


def _visual_tokens(method: Method, inputs: dict[str, Tensor], watch: Stopwatch | Untimed) -> list[VisualTokens]:
    """From the model's inputs to visual tokens, for each placeholder; of a bare tower to what it keeps of each crop."""
    w = method.workload
    if w.adapter is not None:
        visual = w.adapter.read_inputs(**inputs)
        if method.compressor.reads_text:
            with watch.stage("text"):
                visual = w.asked(visual)
        if isinstance(method, Compiled) and method.encoder is not None:
            with watch.stage("encode"):
                return method.encoder(visual, method.compressor)
        run: TowerRun | None = None
        if w.visuals.has_tower:

            def run(_tower: Tower, pixels: Tensor, *_: Any) -> VisionOutput:
                return method.run_tower(pixels)

        return w.adapter.encode(visual, method.compressor, run, watch.stage)
    with watch.stage("tower"):
        vision = method.run_tower(w.visuals.tower_inputs(inputs))
    if method.compressor.is_vanilla:  # a view of the tower's output: nothing to time
        return [VisualTokens(rows) for rows in method.compressor(vision).tokens]
    with watch.stage("selection"):
        return [VisualTokens(rows) for rows in method.compressor(vision).tokens]


def _first_token(
    method: Method, tokens: list[VisualTokens], visual: VisualInputs, watch: Stopwatch | Untimed, stack: ExitStack
) -> tuple[PreparedInputs, Any, PrunedRun | None]:
    """From these tokens to the language model's inputs, its output on the whole prompt, and the pruner's run."""
    w = method.workload
    assert w.adapter is not None
    adapter, prepared = w.adapter, _spliced(method, tokens, visual, watch)
    run = None
    with ExitStack() as prefill:
        # A pruner is at work until the last token, and must find what enters at deeper layers.
        kept = prefill if method.pruner is None else stack
        kept.enter_context(adapter.language_context(prepared.visual_index, prepared.planes))
        if method.pruner is not None:
            run = stack.enter_context(pruning(method.pruner, w.adapter.decoder, prepared.visual_index))
        with watch.stage("prefill"):
            output = w.model(
                inputs_embeds=prepared.inputs_embeds,
                attention_mask=prepared.attention_mask,
                position_ids=prepared.position_ids,
                use_cache=True,
                logits_to_keep=1,
            )
    return prepared, output, run


def _spliced(
    method: Method, tokens: list[VisualTokens], visual: VisualInputs, watch: Stopwatch | Untimed
) -> PreparedInputs:
    """The language model's inputs."""
    w = method.workload
    assert w.adapter is not None and w.input_ids is not None and isinstance(w.visuals, Images)
    with watch.stage("splice"):
        adapter, ids, (of_images, of_videos) = w.adapter, w.input_ids, visual.num_placeholders
        token, video_token, runs = adapter.image_token_id, adapter.video_token_id, adapter.video_runs(visual)
        plan = plan_splice(ids, None, token, of_images, None, video_token, of_videos, video_runs=runs)
        return splice_tokens(adapter, plan, ids, visual, tokens, positions_before(adapter, plan, ids, visual.shapes))
