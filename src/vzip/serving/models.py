"""The architectures as vLLM loads them; the only file that imports it.

Of vLLM's own classes only what ``signatures.json`` lists is overridden or called. Shapes as in ``vzip.compressors``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor
from transformers import BatchFeature

from .signatures import check_signatures

check_signatures(Path(vllm.__file__).parent, vllm.__version__)

from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models import SupportsMultiModal, llava, llava_next
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate

from vzip.compressors import TokenBudget

from .adapters import ServedAdapter, served_adapter
from .settings import KEY, ServingSettings, read_settings

BUDGET = "vzip_budget"  # of each image: [num_dominant, num_contextual], zeros of a method without a budget


def _gathered(heads: Tensor) -> Tensor:
    return tensor_model_parallel_all_gather(heads.contiguous(), dim=-1)


def _budget(counts: Tensor) -> TokenBudget | None:
    num_dominant, num_contextual = counts.tolist()
    return TokenBudget(num_dominant, num_contextual) if num_dominant + num_contextual else None


class _Info(llava.BaseLlavaProcessingInfo):
    """How many tokens an image becomes, and what vLLM's caches know a model by."""

    @cached_property
    def served(self) -> ServingSettings:
        return read_settings(self.get_hf_config())

    @cached_property
    def adapter(self) -> ServedAdapter:
        config = self.get_hf_config()
        return served_adapter(config)[1].of_config(config, self.served.options)

    @property
    def model_id(self) -> str:
        return f"{super().model_id}|{self.served.identity}"

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        image = self.adapter.blank(image_height, image_width, self.served.preprocess)
        return self.served.compressor.num_visual_tokens(self.adapter.shape(image))


class _Processor(llava.BaseLlavaMultiModalProcessor):
    """Images as ``CompressedVlm`` prepares them, each with its request's budget."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        served, adapter, images = self.info.served, self.info.adapter, hf_data["images"]
        budget = served.asked_for(hf_kwargs)
        counts = [0, 0] if budget is None else [budget.num_dominant, budget.num_contextual]
        rest = {name: value for name, value in hf_kwargs.items() if name != KEY}
        image_processor = self.info.get_hf_processor(**rest).image_processor
        made = [adapter.prepare_images([image], image_processor, served.preprocess) for image in images]
        dtype = self.info.ctx.model_config.dtype
        return BatchFeature(
            {
                **{name: [each[name][0] for each in made] for name in adapter.input_names if name in made[0]},
                "pixel_values": [each["pixel_values"][0].to(dtype) for each in made],
                BUDGET: torch.tensor([counts] * len(made)),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        on_host = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        own = {BUDGET: on_host, "tile_grids": on_host}
        return {**super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs), **own}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        placeholder = self.info.get_hf_config().image_token_index

        def placeholders(number: int) -> list[int]:
            given = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(given, ImageEmbeddingItems):
                return [placeholder] * given.get_feature_size(number)
            image = out_mm_kwargs["image"][number].get_data()
            compressor = self.info.served.with_budget(_budget(image[BUDGET]))
            return [placeholder] * compressor.num_visual_tokens(self.info.adapter.shape(image))

        return [PromptReplacement(modality="image", target=[placeholder], replacement=placeholders)]


class _Model(SupportsMultiModal):
    """The vision tower tapped, its tokens compressed, then projected; the language model is vLLM's."""

    # Whether tokens pass the projector before or after compression is the method's, so their number is not vLLM's.
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        served, select_layer = read_settings(config), config.vision_feature_layer
        # vLLM builds the tower up to this layer, and a method may read a later one.
        config.vision_feature_layer = served_adapter(config)[1].num_layers(config, served.compressor)
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.vision_feature_layer = select_layer
        self.served = served

    @cached_property
    def adapter(self) -> ServedAdapter:
        # At the first image: where none may come (--limit-mm-per-prompt), vLLM leaves the tower out.
        return served_adapter(self.config)[1](self, self.served.options, _gathered)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if kwargs.get("pixel_values") is None:  # visual tokens given, or nothing
            # Requests that meet here have different numbers of them, for which vLLM's own would end the engine.
            return [] if kwargs.get("image_embeds") is None else list(kwargs["image_embeds"])
        names = [name for name in (*self.adapter.input_names, BUDGET) if name in kwargs]
        images = [{name: kwargs[name][number] for name in names} for number in range(len(kwargs["pixel_values"]))]
        shapes = [self.adapter.shape(image) for image in images]
        crops = [self.adapter.crops(image, shape) for image, shape in zip(images, shapes, strict=True)]
        members: dict[TokenBudget | None, list[int]] = {}
        for number, image in enumerate(images):
            members.setdefault(_budget(image[BUDGET]), []).append(number)
        found: dict[int, Tensor] = {}
        for budget, own in members.items():
            compressor = self.served.with_budget(budget)
            tokens = self.adapter.tokens([crops[n] for n in own], [shapes[n] for n in own], compressor)
            found |= zip(own, tokens, strict=True)
        return [found[number] for number in range(len(images))]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        tuned = self.served.projector
        if tuned is None:
            return super().load_weights(weights)
        loaded = super().load_weights(tuned.of_base(weights))
        return loaded | super().load_weights(tuned.tensors().items())


# transformers 5.23 saves a tower without `vision_model.`, earlier ones with it, as vLLM has it.
_NAMES = WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


class _LlavaInfo(_Info, llava.LlavaProcessingInfo):
    pass


class _LlavaProcessor(_Processor, llava.LlavaMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(_LlavaProcessor, info=_LlavaInfo, dummy_inputs=llava.LlavaDummyInputsBuilder)
class VzipLlavaForConditionalGeneration(_Model, llava.LlavaForConditionalGeneration):
    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | _NAMES


class _LlavaNextInfo(_Info, llava_next.LlavaNextProcessingInfo):
    pass


class _LlavaNextProcessor(_Processor, llava_next.LlavaNextMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    _LlavaNextProcessor, info=_LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class VzipLlavaNextForConditionalGeneration(_Model, llava_next.LlavaNextForConditionalGeneration):
    hf_to_vllm_mapper = llava_next.LlavaNextForConditionalGeneration.hf_to_vllm_mapper | _NAMES
