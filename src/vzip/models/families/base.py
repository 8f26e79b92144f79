"""What a family of vision-language models must tell us: where its parts are and how crops become one sequence.

One file per family holds every Hugging Face attribute path relied on, so a change of transformers is a change of one
file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from vzip.compressors.base import Compressor, VisionOutput
from vzip.compressors.controls import Identity
from vzip.errors import ConfigError, PromptError, UnsupportedModelError
from vzip.media.images import Preprocess, prepare_pictures
from vzip.media.video import VideoSource
from vzip.pruners.base import Decoder, Pruner

from ..towers.cache import TowerCache
from ..towers.structure import Tower, TowerGeometry, find_tower
from ..towers.tap import run_tower
from .decoder import LlamaDecoder
from .options import FamilyOptions, check_fit


class Adapter(ABC):
    """One Hugging Face model seen through the five steps: encode, score, compress, project, splice.

    Attributes:
        model_class: the Hugging Face class served.
        model: that object, unmodified.
        tower: its vision tower taken apart.
        select_layer: the tower's layer the model was trained on.
        stock_offset: first row of the tower's output the unmodified model uses (1: it drops row 0).
        image_token_id: id of the placeholder in ``input_ids``.
        options: of the family.
        has_tiles: whether the family cuts a picture into several crops.
        has_mining: whether patches are mined, and CLS, which is not, may be left out.
        has_video: whether it takes videos.
        video_token_id: id of a video's placeholder in ``input_ids``, or None.
        tower_cache: outputs of the vision tower kept between runs; None: the tower always runs.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    has_tiles: ClassVar[bool] = False
    has_mining: ClassVar[bool] = False
    has_video: ClassVar[bool] = False
    video_token_id: int | None = None

    def __init__(self, model: PreTrainedModel, options: FamilyOptions | None = None) -> None:
        """Finds the model's parts.

        Raises:
            UnsupportedModelError: a vision tower or setting that cannot be served.
            ConfigError: options that the family does not have.
        """
        self.model = model
        self.options = options or FamilyOptions()
        self.check_options(self.options)
        self.geometry = self.check_config(model.config)
        self.tower: Tower = find_tower(self.vision_tower)
        self.select_layer: int = self.read_select_layer(model.config)
        self.stock_offset: int = self.read_stock_offset(model.config)
        self.image_token_id: int = self.read_image_token_id(model.config)
        self.tower_cache: TowerCache | None = None

    @classmethod
    @abstractmethod
    def check_config(cls, config: Any) -> TowerGeometry:
        """The tower's shape, from the configuration alone; raises UnsupportedModelError for what we cannot serve."""

    @classmethod
    def check_options(cls, options: FamilyOptions, num_frames: int | None = None) -> None:
        """Raises ConfigError for an option that the family does not have."""
        if (options.drop_padding or options.row_newline) and not cls.has_tiles:
            raise ConfigError(
                f"model.drop_padding={options.drop_padding}, model.row_newline={options.row_newline}:"
                f" {cls.model_class.__name__} has no tiles, so both must be False; they are options of LLaVA-NeXT."
            )
        if options.drop_cls and not cls.has_mining:
            raise ConfigError(
                f"model.drop_cls=True: {cls.model_class.__name__} does not mine patches, so CLS is a token like others"
                " and drop_cls must be False; it is an option of Mini-Gemini (model=mini_gemini_7b)."
            )
        if num_frames is not None and not cls.has_video:
            raise ConfigError(
                f"model.num_frames={num_frames}: {cls.model_class.__name__} has no video tower and takes pictures only,"
                " so it must be null. Video-LLaVA takes videos (model=video_llava_7b)."
            )

    @classmethod
    def check_settings(
        cls, config: Any, compressor: Compressor, options: FamilyOptions, num_frames: int | None = None
    ) -> None:
        """All that can be checked from a configuration, before any weight is read.

        Raises:
            UnsupportedModelError: a vision tower or setting of the checkpoint that cannot be served.
            ConfigError: a compressor, budget or option that does not fit it.
        """
        geometry = cls.check_config(config)
        cls.check_options(options, num_frames)
        check_fit(compressor, geometry, options)

    @classmethod
    def check_pruner(cls, config: Any, pruner: Pruner) -> None:
        """Raises ConfigError or UnsupportedModelError for a pruner that the language model cannot have."""
        text_config = config.get_text_config()
        LlamaDecoder.check_config(text_config)
        pruner.check_fits(text_config)

    @classmethod
    def load_model(cls, directory: Path, config: Any, **settings: Any) -> Any:
        """What ``from_pretrained`` of the Hugging Face class returns for these settings; raises what it raises."""
        return cls.model_class.from_pretrained(directory, config=config, **settings)

    @classmethod
    def load_processor(cls, directory: Path) -> Any:
        """The checkpoint's Hugging Face processor; raises what Hugging Face raises."""
        return AutoProcessor.from_pretrained(directory)

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
    def decoder(self) -> Decoder:
        """The language model's layers, for pruners; see ``check_pruner`` for which are served."""
        return LlamaDecoder(self.language_model)

    @property
    def embed_tokens(self) -> nn.Module:
        """The text embedding."""
        return self.model.get_input_embeddings()

    @abstractmethod
    def expanded_lengths(
        self, num_images: int, image_sizes: Tensor | None, tile_grids: Tensor | None = None
    ) -> list[int]:
        """Visual tokens of the unmodified model, which is the placeholders its processor writes, for each image.

        Args:
            num_images: images in all.
            image_sizes: original (height, width) of each image, where the family needs it.
            tile_grids: (rows, cols) of each image's tiles; None: by the Hugging Face processor's rule.
        """

    @abstractmethod
    def crops(
        self, pixel_values: Tensor, image_sizes: Tensor | None, tile_grids: Tensor | None = None
    ) -> tuple[Tensor, list[int]]:
        """All crops of all images as one batch ``[crops, 3, h, w]``, and the number of crops of each image."""

    @abstractmethod
    def pack(
        self,
        crops: Sequence[Tensor],
        image_sizes: Tensor | None,
        kept: Sequence[Tensor] | None = None,
        tile_grids: Tensor | None = None,
    ) -> list[Tensor]:
        """Joins the projected crops of each image into one sequence.

        Args:
            crops: for each image ``[num_crops, K, d_text]``.
            image_sizes: original (height, width) of each image, where the family needs it.
            kept: for each image int64 ``[num_crops, num_kept]``, the tower's rows that the first ``num_kept`` tokens
                are; None: the crops hold all rows the unmodified model uses, and are packed exactly as it packs them.
            tile_grids: as in ``expanded_lengths``.

        Returns:
            for each image ``[num_visual_tokens, d_text]``.
        """

    def num_added_tokens(
        self, num_crops: Sequence[int], image_sizes: Tensor | None, tile_grids: Tensor | None = None
    ) -> list[int]:
        """Tokens that packing adds to the compressed ones (newlines), for each image."""
        return [0] * len(num_crops)

    def check_compressor(self, compressor: Compressor) -> None:
        """Raises ConfigError if the compressor does not fit the vision tower or the family's options."""
        check_fit(compressor, self.geometry, self.options)

    def video_lengths(self, pixel_values_videos: Tensor) -> list[int]:
        """Visual tokens of the unmodified model, which is the placeholders its processor writes, for each video.

        Args:
            pixel_values_videos: ``[videos, frames, 3, h, w]``.

        Raises:
            UnsupportedModelError: the family has no video tower.
            PromptError: another shape.
        """
        raise self._no_video()

    def encode_videos(self, pixel_values_videos: Tensor, compressor: Compressor) -> list[Tensor]:
        """Videos -> visual tokens, frame by frame; as ``encode``, and raises as ``video_lengths``.

        Returns:
            for each video ``[num_visual_tokens, d_text]``.
        """
        raise self._no_video()

    def prepare_videos(self, videos: Sequence[VideoSource], image_processor: Any, num_frames: int) -> dict[str, Tensor]:
        """Videos -> ``pixel_values_videos``; see ``vzip.media.video``. Raises as ``video_lengths``."""
        raise self._no_video()

    def _no_video(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} has no video tower, so it takes pictures only. Video-LLaVA takes videos"
            " (model=video_llava_7b)."
        )

    def prepare_pictures(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        """Pictures -> ``pixel_values`` and whatever else the family needs; see ``vzip.data``."""
        return prepare_pictures(images, image_processor, preprocess)

    def hide_padding(
        self, vision: VisionOutput, num_crops: Sequence[int], image_sizes: Tensor | None, tile_grids: Tensor | None
    ) -> VisionOutput:
        """The tower's output with the attention on mere padding taken away, where ``drop_padding`` asks for it."""
        return vision

    def run_tower(self, pixel_values: Tensor, requires: frozenset[str], score_layer: int | None = None) -> VisionOutput:
        """Runs the vision tower on crops ``[N, 3, h, w]`` up to the select layer; see ``towers.tap.run_tower``."""
        return self.run_through_cache(self.tower, pixel_values, requires, self.stock_offset, score_layer)

    def run_through_cache(
        self, tower: Tower, pixel_values: Tensor, requires: frozenset[str], stock_offset: int, score_layer: int | None
    ) -> VisionOutput:
        """Runs a tower of the model, or takes its output from ``tower_cache``, never where gradients are wanted."""

        def run(reads: frozenset[str]) -> VisionOutput:
            return run_tower(tower, pixel_values, self.select_layer, reads, stock_offset, score_layer)

        can_score = tower.geometry.num_layers_to_run(self.select_layer if score_layer is None else score_layer) > 0
        if self.tower_cache is None or torch.is_grad_enabled() or not can_score:
            return run(requires)
        place = (id(tower), self.select_layer, score_layer)
        return self.tower_cache.look_up(pixel_values, place, requires, run)

    def encode(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None,
        compressor: Compressor,
        tile_grids: Tensor | None = None,
    ) -> list[Tensor]:
        """Pictures -> visual tokens: tower, compressor, projector, packing.

        Args:
            pixel_values: as the model's Hugging Face processor returns them.
            image_sizes: likewise.
            compressor: the method.
            tile_grids: as in ``expanded_lengths``.

        Returns:
            for each image ``[num_visual_tokens, d_text]``.
        """
        crops, num_crops = self.crops(pixel_values, image_sizes, tile_grids)
        vision = self.run_tower(crops, compressor.requires, compressor.score_layer)
        compressed = compressor(self.hide_padding(vision, num_crops, image_sizes, tile_grids))
        projected = self.projector(compressed.tokens).split(num_crops)
        kept = None if isinstance(compressor, Identity) else compressed.source_index.split(num_crops)
        return self.pack(projected, image_sizes, kept, tile_grids)


def check_pixel_values(pixel_values: Tensor, num_dims: int, layout: str) -> None:
    """Raises PromptError unless ``pixel_values`` has ``num_dims`` dimensions; ``layout`` says what they are."""
    if pixel_values.ndim != num_dims:
        raise PromptError(
            f"pixel_values has shape {tuple(pixel_values.shape)}: this model takes {layout}, as its Hugging Face"
            " processor returns them."
        )
