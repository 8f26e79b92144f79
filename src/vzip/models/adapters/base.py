"""What a family of vision-language models must tell us: where its parts are and how crops become one sequence.

One file per family holds every Hugging Face attribute path relied on, so a change of transformers is a change of one
file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from vzip.compressors.base import Compressor, VisionOutput
from vzip.errors import PromptError

from ..tap import run_tower
from ..towers import Tower, TowerGeometry, find_tower


class Adapter(ABC):
    """One Hugging Face model seen through the five steps: encode, score, compress, project, splice.

    Attributes:
        model_class: the Hugging Face class served.
        model: that object, unmodified.
        tower: its vision tower taken apart.
        select_layer: the tower's layer the model was trained on.
        stock_offset: first row of the tower's output the unmodified model uses (1: it drops row 0).
        image_token_id: id of the placeholder in ``input_ids``.
    """

    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.geometry = self.check_config(model.config)
        self.tower: Tower = find_tower(self.vision_tower)
        self.select_layer: int = self.read_select_layer(model.config)
        self.stock_offset: int = self.read_stock_offset(model.config)
        self.image_token_id: int = self.read_image_token_id(model.config)

    @classmethod
    @abstractmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        """The tower's shape, from the configuration alone; raises UnsupportedModelError for what we cannot serve."""

    @staticmethod
    @abstractmethod
    def read_select_layer(config: Any) -> int:
        """The layer whose output the model uses."""

    @staticmethod
    @abstractmethod
    def read_stock_offset(config: Any) -> int:
        """First row of the tower's output the unmodified model uses."""

    @staticmethod
    @abstractmethod
    def read_image_token_id(config: Any) -> int:
        """Id of the placeholder."""

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The vision tower as Hugging Face's module."""

    @property
    @abstractmethod
    def projector(self) -> nn.Module:
        """The projector: the only trained module in the paper's fine-tuning."""

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The language model, without its head."""

    @property
    def embed_tokens(self) -> nn.Module:
        """The text embedding."""
        return self.model.get_input_embeddings()

    @abstractmethod
    def expanded_lengths(self, num_images: int, image_sizes: Tensor | None) -> list[int]:
        """Placeholders an image gets from the Hugging Face processor, for each image in order."""

    @abstractmethod
    def crops(self, pixel_values: Tensor, image_sizes: Tensor | None) -> tuple[Tensor, list[int]]:
        """All crops of all images as one batch ``[crops, 3, h, w]``, and the number of crops of each image."""

    @abstractmethod
    def pack(self, crops: Sequence[Tensor], image_sizes: Tensor | None) -> list[Tensor]:
        """Joins the projected crops of each image into one sequence.

        Args:
            crops: for each image ``[num_crops, K, d_text]``.
            image_sizes: original (height, width) of each image, where the family needs it.

        Returns:
            for each image ``[num_visual_tokens, d_text]``.
        """

    def run_tower(self, pixel_values: Tensor, requires: frozenset[str]) -> VisionOutput:
        """Runs the vision tower on crops ``[N, 3, h, w]`` up to the select layer."""
        return run_tower(self.tower, pixel_values, self.select_layer, requires, self.stock_offset)

    def encode(self, pixel_values: Tensor, image_sizes: Tensor | None, compressor: Compressor) -> list[Tensor]:
        """Pictures -> visual tokens: tower, compressor, projector, packing.

        Args:
            pixel_values: as the model's Hugging Face processor returns them.
            image_sizes: likewise.
            compressor: the method.

        Returns:
            for each image ``[num_visual_tokens, d_text]``.
        """
        crops, num_crops = self.crops(pixel_values, image_sizes)
        vision = self.run_tower(crops, compressor.requires)
        projected = self.projector(compressor(vision).tokens)
        return self.pack(projected.split(num_crops), image_sizes)


def check_pixel_values(pixel_values: Tensor, num_dims: int, layout: str) -> None:
    """Raises PromptError unless ``pixel_values`` has ``num_dims`` dimensions; ``layout`` says what they are."""
    if pixel_values.ndim != num_dims:
        raise PromptError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: this model takes {layout}, as its Hugging Face"
            " processor returns them."
        )
