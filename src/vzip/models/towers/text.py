"""CLIP's text model beside a vision tower that is CLIP's image model: questions and patches in one space."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoTokenizer, CLIPModel

from vzip.compressors.base import Compressor
from vzip.errors import CheckpointError, ConfigError
from vzip.paths import expanded, is_folder

from ..hub import READ_ERRORS, Checkpoint, is_hub_id

# The commit that is taken of a checkpoint, so that a run means the same weights always.
PINNED = {"openai/clip-vit-large-patch14-336": "ce19dc912ca5cd21c8a653c79e251e808ccabcd1"}
_KEY = "compressor.text_encoder"
_INSTEAD = f"{_KEY}=null reads the question by the language model's input embeddings instead."
# By which a tower is known: the same sizes, the same model.
_SIZES = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")


def check_text_encoder(compressor: Compressor, config: Any) -> None:
    """Whether the text model that a text-aware method names belongs to a model's vision tower; no weight is read.

    Args:
        compressor: any method.
        config: Hugging Face's, of the vision-language model.

    Raises:
        ConfigError: it is not of this tower, or is no CLIP model.
        CheckpointError: it cannot be found or read.
    """
    name = compressor.text_encoder
    if not compressor.reads_text or name is None:
        return
    tower = config.vision_config
    if tower.model_type != "clip_vision_model":
        raise ConfigError(
            f"{_KEY}={name}: CLIP's text model speaks of CLIP's patches, and this vision tower is of type"
            f" {tower.model_type}. {_INSTEAD}"
        )
    own = _config(name).vision_config
    sizes = [(key, getattr(own, key), getattr(tower, key)) for key in _SIZES]
    if differ := [f"{key} {theirs}, not {ours}" for key, theirs, ours in sizes if theirs != ours]:
        raise ConfigError(
            f"{_KEY}={name}: its image model is not this vision tower ({'; '.join(differ)}), so its text model knows"
            f" nothing of these patches. Name the CLIP checkpoint that the tower comes from; {_INSTEAD}"
        )


def checkpoint_of(name: str) -> Checkpoint:
    """The checkpoint of a directory or hub id, of a known one at its pinned commit; ConfigError for neither."""
    if is_folder(expanded(name)):
        return Checkpoint(expanded(name), key=_KEY)
    if not is_hub_id(name):
        raise ConfigError(
            f"{_KEY}={name}: neither a directory here nor a hub id (owner/name, as {next(iter(PINNED))}). {_INSTEAD}"
        )
    return Checkpoint(name, PINNED.get(name), key=_KEY)


@cache  # asked for by every check of a method
def _config(name: str) -> Any:
    try:
        directory = checkpoint_of(name).directory
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_INSTEAD}") from error
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except READ_ERRORS as error:
        raise CheckpointError(f"{_KEY}={name}: its config.json cannot be read ({error}). {_INSTEAD}") from error
    if config.model_type != "clip":
        raise ConfigError(
            f"{_KEY}={name}: is of type {config.model_type}: must be a whole CLIP model (type clip), as"
            f" {next(iter(PINNED))}. {_INSTEAD}"
        )
    return config


@dataclass(frozen=True)
class TextEncoder:
    """CLIP's text model and the projections into the space it shares with the image model, in float32.

    Attributes:
        name: of the checkpoint.
        text_model, text_projection: Hugging Face's, of the text.
        image_norm, image_projection: what follows the image model's last layer.
        tokenizer: of the checkpoint.
    """

    name: str
    text_model: Any
    text_projection: Any
    image_norm: nn.Module
    image_projection: Any
    tokenizer: Any

    @classmethod
    def load(cls, name: str, device: torch.device) -> TextEncoder:
        """Loads it to a device; raises CheckpointError for what cannot be found, read, or is incomplete."""
        checkpoint = checkpoint_of(name)
        directory = checkpoint.fetch_weights()
        try:
            model, report = CLIPModel.from_pretrained(
                directory, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except READ_ERRORS as error:
            raise CheckpointError(f"{_KEY}={name}: cannot be loaded ({error}). {_INSTEAD}") from error
        if absent := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{_KEY}={name}: {len(absent)} parameters are not in the checkpoint ({', '.join(absent[:4])}"
                f"{', ...' if len(absent) > 4 else ''}); they would stay random. Download it again. {_INSTEAD}"
            )
        model.eval().requires_grad_(False)
        # The rest of the image model is let go: what runs is the vision tower.
        norm, projection = model.vision_model.post_layernorm.to(device), model.visual_projection.to(device)
        text_model, text_projection = model.text_model.to(device), model.text_projection.to(device)
        return cls(name, text_model, text_projection, norm, projection, tokenizer)

    @torch.no_grad()
    def read(self, text: str) -> Tensor:
        """``[M, width]``: the text's embedding, of a longer text one a part of as many tokens as the model reads.

        The end is filled up with id 0, as published; the model looks back only, so nothing before sees it.
        """
        ids = torch.tensor(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])
        length = self.text_model.config.max_position_embeddings
        parts = functional.pad(ids, (0, -len(ids) % length)).view(-1, length).to(self.text_projection.weight.device)
        embedding: Tensor = self.text_projection(self.text_model(input_ids=parts).pooler_output)
        return embedding

    @torch.no_grad()
    def align(self, rows: Tensor) -> Tensor:
        """The image model's hidden states ``[N, U, D]`` in the shared space: ``[N, U, width]``."""
        aligned: Tensor = self.image_projection(self.image_norm(rows.to(self.image_projection.weight)))
        return aligned.to(rows.device)
