"""LLaVA's own layout (``liuhaotian/llava-v1.5-7b`` and what LLaVA's training writes), read into Hugging Face's classes.

The llava package is not needed. A directory holds the whole model, with or without its vision tower; or LoRA layers and
``non_lora_trainables.bin``; or ``mm_projector.bin`` alone. What it lacks is looked for around it, then on the hub.
Source: haotian-liu/LLaVA c121f04, ``builder.py``, ``llava_arch.py``, ``mm_utils.py``, ``conversation.py``.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig, MistralConfig, PreTrainedModel
from transformers.models.clip import CLIPImageProcessor  # AutoImageProcessor of 5.17 insists on torchvision

from vzip.errors import CheckpointError, UnsupportedModelError
from vzip.json_files import read_json
from vzip.keys import POSITIVE

from ...hub import is_hub_id
from .checkpoint import CROPPED, OriginalCheckpoint, find_folder
from .names import TOWER, rename_clip, rename_llava
from .tensors import CHECKPOINT_FILES, renamed_tensors, weight_files
from .tokenizer import llama_tokenizer, vicuna_template

PROJECTOR_NAME = "mm_projector.bin"
LORA_CONFIG, NON_LORA_NAME = "adapter_config.json", "non_lora_trainables.bin"
SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
_TEXT_CONFIGS: Mapping[str, Any] = {"llava": LlamaConfig, "llava_llama": LlamaConfig, "llava_mistral": MistralConfig}
# What must be so, and what a missing key stands for in LLaVA's code.
_REQUIRED = {
    "mm_projector_type": ("mlp2x_gelu", "linear"),
    "mm_resampler_type": (None, None),
    "mm_use_im_start_end": (False, False),
    "mm_use_im_patch_token": (False, True),
    "s2": (False, False),
}
_CLASSES = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
# Settings of PEFT that change what B x A stands for.
_LORA_OFF = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
_SHOWN = (
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
_MISTRAL_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] "
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<SYS>>\n{{ messages[0]['content'][0]['text'] }}\n"
    "<</SYS>>\n\n{% endif %}" + _SHOWN + " [/INST]"
    "{% elif message['role'] == 'assistant' %} " + _SHOWN + " </s>{% endif %}{% endfor %}"
)
_CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nAnswer the questions.<|im_end|>{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + _SHOWN + "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class OriginalLlava(OriginalCheckpoint):
    """A checkpoint of LLaVA-1.5, or of LLaVA-1.6 (NeXT) where it cuts images into tiles."""

    family = "LLaVA"

    @property
    def has_tiles(self) -> bool:
        """Whether it is a LLaVA-NeXT."""
        return str(self.fields.get("image_aspect_ratio")).startswith("anyres")

    @property
    def is_lora(self) -> bool:
        """Whether it holds LoRA layers beside its projector, and no language model."""
        return (self.source / LORA_CONFIG).is_file()

    @property
    def is_projector(self) -> bool:
        """Whether it holds a projector alone."""
        whole = any((self.source / name).is_file() for name in CHECKPOINT_FILES)
        return not self.is_lora and not whole and (self.source / PROJECTOR_NAME).is_file()

    @cached_property
    def lora(self) -> Mapping[str, Any]:
        """The settings of its LoRA layers.

        Raises:
            CheckpointError: they cannot be read.
            UnsupportedModelError: others than LLaVA's training writes.
        """
        path = self.source / LORA_CONFIG
        try:
            settings: dict[str, Any] = dict(read_json(path))
            if not POSITIVE.allows(settings["r"]) or not POSITIVE.allows(settings["lora_alpha"]):
                raise ValueError(f"r={settings['r']!r}, lora_alpha={settings['lora_alpha']!r}")
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(
                f"{path}: not readable ({error}); r and lora_alpha are needed, numbers above 0."
            ) from error
        given = [f"{key}={settings[key]}" for key in _LORA_OFF if settings.get(key)]
        if given or settings.get("peft_type", "LORA") != "LORA":
            raise UnsupportedModelError(
                f"{path}: {', '.join(given) or settings['peft_type']}: LLaVA's own training writes plain LoRA layers,"
                " which alone are merged here."
            )
        return settings

    def base(self, weights: bool = False) -> Path:
        """The directory of the language model: this one, or the one that LoRA layers or a projector name."""
        if self.is_lora:
            name, key = self.lora.get("base_model_name_or_path"), f"base_model_name_or_path of {LORA_CONFIG}"
        elif self.is_projector:
            name, key = self.fields.get("_name_or_path"), "_name_or_path of config.json"
        else:
            return self.source
        if not name:
            raise CheckpointError(f"{self.source}: {key} must name the language model, which is not in it.")
        hub_id = str(name) if is_hub_id(str(name)) else None
        return find_folder(self.source, str(name), f"the language model {name} ({key})", hub_id, weights)

    def config(self) -> LlavaConfig | LlavaNextConfig:
        self._check_fields()
        kind, first = _TEXT_CONFIGS[self.fields["model_type"]], self.fields["vocab_size"]
        # Rows for the placeholder and the padding, up to a multiple of 64, as in the checkpoints of llava-hf.
        text = self.text_config(kind, vocab_size=-(-(first + 2) // 64) * 64, pad_token_id=first + 1)
        settings = {
            "vision_config": CLIPVisionConfig.from_pretrained(self._tower_folder()),
            "text_config": text,
            "image_token_index": first,
            "vision_feature_layer": self.fields["mm_vision_select_layer"],
            "vision_feature_select_strategy": _STRATEGIES[self.fields.get("mm_vision_select_feature", "patch")],
            "tie_word_embeddings": False,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
            "dtype": self.fields.get("torch_dtype"),
        }
        if self.has_tiles:
            settings["image_grid_pinpoints"] = self._pinpoints()
            return LlavaNextConfig(**settings, architectures=["LlavaNextForConditionalGeneration"])
        if self.fields.get("image_aspect_ratio") != "pad":  # LLaVA's code pads for this word alone
            settings["image_aspect_ratio"] = CROPPED
        return LlavaConfig(**settings, architectures=["LlavaForConditionalGeneration"])

    def own_files(self) -> list[Path]:
        files = weight_files(self.base(weights=True), CHECKPOINT_FILES)
        if self.is_projector:
            files.append(self.source / PROJECTOR_NAME)
        if self.is_lora:
            files += [self.source / LORA_CONFIG, *self._lora_files(), *weight_files(self.source, [NON_LORA_NAME])]
        return files

    def files(self) -> list[Path]:
        if self.fields.get("unfreeze_mm_vision_tower"):
            return super().files()
        return [*self.own_files(), *self.tower_files("mm_vision_tower")]

    def tensors(self, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = renamed_tensors(weight_files(self.base(weights=True), CHECKPOINT_FILES), rename_llava, self.family)
        if not self.fields.get("unfreeze_mm_vision_tower"):  # then LLaVA ignores a tower that was saved with the rest
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(TOWER)}
        if self.is_projector:
            tensors |= renamed_tensors([self.source / PROJECTOR_NAME], rename_llava, self.family)
        if self.is_lora:
            tensors |= renamed_tensors(weight_files(self.source, [NON_LORA_NAME]), _rename_peft, self.family)
            self._merge_lora(tensors, dtype)
        if not any(name.startswith(TOWER) for name in tensors):
            tensors |= renamed_tensors(self.tower_files("mm_vision_tower"), rename_clip, self.family)
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in tensors and len(tensors[name]) == self.fields["vocab_size"]:
                tensors[name] = with_rows(tensors[name], config.text_config.vocab_size)
        return tensors

    def tokenizer_folder(self) -> Path:
        return self.source if (self.source / "tokenizer.model").is_file() else self.base()

    def processor(self) -> Any:
        """LLaVA's image processor and conversation, the language model's tokenizer with a placeholder."""
        from transformers import LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor  # they warn of torchvision

        folder = self._tower_folder()
        clip, vision = CLIPImageProcessor.from_pretrained(folder), CLIPVisionConfig.from_pretrained(folder)
        tokenizer = llama_tokenizer(self.tokenizer_folder(), self.fields["vocab_size"], [IMAGE_TOKEN], PAD_TOKEN)
        settings = {
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": _STRATEGIES[self.fields.get("mm_vision_select_feature", "patch")],
            "num_additional_image_tokens": 1,
            "chat_template": self._template(tokenizer),
        }
        if not self.has_tiles:
            return LlavaProcessor(clip, tokenizer, **settings)
        tiles = LlavaNextImageProcessor(
            size=clip.size,
            crop_size=clip.crop_size,
            image_mean=clip.image_mean,
            image_std=clip.image_std,
            image_grid_pinpoints=self._pinpoints(),
        )
        return LlavaNextProcessor(tiles, tokenizer, **settings)

    def _check_fields(self) -> None:
        if (kind := self.fields["model_type"]) not in _TEXT_CONFIGS:
            raise UnsupportedModelError(
                f"{self.source}: model_type={kind!r} in config.json; of LLaVA's own layout"
                f" {', '.join(_TEXT_CONFIGS)} are read."
            )
        needed = ("mm_vision_tower", "mm_vision_select_layer", "vocab_size", "hidden_size", "num_hidden_layers")
        self.check_fields(needed, _REQUIRED, "LLaVA-1.5, LLaVA-1.6 and what is trained as they are")
        feature = self.fields.get("mm_vision_select_feature", "patch")
        if feature not in _STRATEGIES:
            raise UnsupportedModelError(
                f"{self.source}: mm_vision_select_feature={feature!r} in config.json; patch and cls_patch are known."
            )
        merge, aspect = self.fields.get("mm_patch_merge_type", "flat"), self.fields.get("image_aspect_ratio")
        if (merge == "spatial_unpad") != self.has_tiles or merge not in ("flat", "spatial_unpad"):
            raise UnsupportedModelError(
                f"{self.source}: mm_patch_merge_type={merge!r} with image_aspect_ratio={aspect!r} in config.json;"
                " Hugging Face's classes have flat without tiles (pad, square) and spatial_unpad with tiles (anyres)."
            )

    def _pinpoints(self) -> list[list[int]]:
        """The resolutions as (height, width); LLaVA writes (width, height)."""
        given = self.fields.get("image_grid_pinpoints")
        if isinstance(given, str):  # as LLaVA's training takes it from the command line: "[(336, 672), ...]"
            with contextlib.suppress(ValueError, SyntaxError):
                given = ast.literal_eval(given)
        if not isinstance(given, list) or not given or not all(map(_is_size, given)):
            raise UnsupportedModelError(
                f"{self.source}: image_grid_pinpoints={given!r:.80} in config.json; a list of (width, height) is read."
            )
        return [[height, width] for width, height in given]

    def _template(self, tokenizer: Any) -> str:
        if self.fields["model_type"] == "llava_mistral":
            return _MISTRAL_TEMPLATE
        return _CHATML_TEMPLATE if "<|im_start|>" in tokenizer.get_vocab() else vicuna_template(SYSTEM_PROMPT)

    def _tower_folder(self) -> Path:
        """The tower's small files: its configuration and how images enter it."""
        folder = self.folder_of("mm_vision_tower")
        absent = [name for name in ("config.json", "preprocessor_config.json") if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{folder}: holds no {' and no '.join(absent)}, and is the vision tower of {self.source}. Copy the"
                " whole repository."
            )
        return folder

    def _lora_files(self) -> list[Path]:
        return weight_files(self.source, ["adapter_model.safetensors", "adapter_model.bin"])

    def _merge_lora(self, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        """Adds B x A x alpha / r to the weights that the layers stand beside, in float32."""
        layers = renamed_tensors(self._lora_files(), _lora_name, self.family)
        for name in sorted({_without_side(name) for name in layers}):
            down, up = (layers.get(f"{name}.lora_{side}.weight") for side in "AB")
            if f"{name}.weight" not in tensors or down is None or up is None:
                fault = "is not whole" if down is None or up is None else "has no weight to be added to"
                raise CheckpointError(
                    f"{self.source}: the LoRA layer of {name} {fault}. It must have been trained from {self.base()}."
                )
            weight = tensors[f"{name}.weight"]
            if up.shape[0] != weight.shape[0] or down.shape[1] != weight.shape[1] or up.shape[1] != down.shape[0]:
                raise CheckpointError(
                    f"{self.source}: the LoRA layer of {name} is {tuple(up.shape)} x {tuple(down.shape)} for a weight"
                    f" of {tuple(weight.shape)}. It must have been trained from {self.base()}."
                )
            scale = self.lora["lora_alpha"] / self.lora["r"]
            tensors[f"{name}.weight"] = (weight.float() + up.float() @ down.float() * scale).to(dtype)


def find_llava(directory: Path) -> OriginalLlava | None:
    """The checkpoint if it is in LLaVA's own layout, None for any other; raises ValueError for unreadable JSON."""
    fields = read_json(directory / "config.json")
    is_llava = str(fields.get("model_type")).startswith("llava") and "vision_config" not in fields
    others = ("mm_vision_tower_aux", "mm_video_tower", "mm_image_tower")
    if not is_llava or fields.get("mm_vision_tower") is None or any(fields.get(key) for key in others):
        return None
    return OriginalLlava(directory, fields)


def projector_alone(
    model: PreTrainedModel, projector: nn.Module, source: Path
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """What LLaVA's training writes of a projector: its tensors by LLaVA's names, and ``config.json``.

    Args:
        model: a LLaVA or LLaVA-NeXT.
        projector: of it.
        source: where the model was loaded from.

    Returns:
        the tensors, and the configuration, which names the language model's directory; None where ``source`` is not in
        LLaVA's own layout.

    Raises:
        UnsupportedModelError: LLaVA's code has no such model.
        CheckpointError: ``source`` is LoRA layers and has no language model of its own.
    """
    if type(model).__name__ not in _CLASSES:
        raise UnsupportedModelError(
            f"{type(model).__name__}: LLaVA's own code has no class for it; {PROJECTOR_NAME} can be written of"
            f" {' and '.join(_CLASSES)}."
        )
    names = {"linear_1": "0", "linear_2": "2"}
    tensors = {}
    for name, tensor in projector.state_dict().items():
        part, _, kind = name.partition(".")
        tensors[f"model.mm_projector.{names[part]}.{kind}"] = tensor.detach().cpu().contiguous()
    original = find_llava(source) if (source / "config.json").is_file() else None
    if original is None:
        return tensors, None
    if original.is_lora:
        raise CheckpointError(
            f"{source}: its language model is LoRA layers on another, which {PROJECTOR_NAME} cannot go with. Leave"
            " --mm-projector out, which writes the whole model."
        )
    base = str(original.base().resolve())
    return tensors, {**original.fields, "_name_or_path": base, "tune_mm_mlp_adapter": True}


def with_rows(weight: Tensor, num_rows: int) -> Tensor:
    """A text embedding or head with rows for new words; each is the others' mean, which is never the likeliest word."""
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(num_rows - len(weight), -1)])


def _is_size(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(type(side) is int and side > 0 for side in pair)


def _rename_peft(name: str) -> str | None:
    """A name of ``non_lora_trainables.bin``."""
    rest = name.removeprefix("base_model.")
    return rename_llava(rest.removeprefix("model.") if rest.startswith("model.model.") else rest)


def _lora_name(name: str) -> str | None:
    return _rename_peft(name.replace(".default.", "."))


def _without_side(name: str) -> str:
    return re.sub(r"\.lora_[AB]\.weight$", "", name)
