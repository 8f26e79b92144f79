"""The wrapper: a Hugging Face model and a compressor, with the model's own calls on the outside.

It owns the five multimodal steps (encode, score, compress, project, splice) and hands the language model
``inputs_embeds``. The Hugging Face model is used, never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from vzip.compressors.base import Compressor
from vzip.data.images import PREPROCESSES, Preprocess
from vzip.errors import ConfigError, PromptError, nearest

from .adapters import Adapter, PackingOptions, adapter_for_model
from .chat import ChatSession
from .splice import PaddingSide, PreparedInputs, plan_splice, splice


class CompressedVlm(nn.Module):
    """A vision-language model whose visual tokens pass through a compressor.

    Several wrappers with different compressors may share one model.

    Attributes:
        model: the very Hugging Face model given, unmodified.
        compressor: the method; may be replaced at any time.
        processor: the Hugging Face processor (tokenizer, image processor, chat template), or None.
        preprocess: ``"llava"`` (pad to a square, as the paper's scripts) or ``"hf"`` (the checkpoint's own processor).
        adapter: what we know of the model's family.
        last_num_visual_tokens: visual tokens of each image that entered the language model in the last ``prepare``,
            ``forward`` or ``generate``; measured on the tensors, not read from the budget.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        compressor: Compressor,
        processor: ProcessorMixin | None = None,
        preprocess: Preprocess = "llava",
        drop_padding: bool = False,
        row_newline: bool = False,
    ) -> None:
        """Wraps a loaded model.

        Args:
            hf_model, compressor, processor, preprocess: see the class.
            drop_padding, row_newline: see ``vzip.models.adapters.base.PackingOptions`` (LLaVA-NeXT only).

        Raises:
            UnsupportedModelError: no adapter for the model's class, vision tower or settings.
            ConfigError: an unknown ``preprocess``, a budget that does not fit the vision tower, or an option of the
                packing that the family or the compressor cannot honour.
        """
        super().__init__()
        if preprocess not in PREPROCESSES:
            raise ConfigError(
                f"model.preprocess={preprocess!r}: must be one of {', '.join(PREPROCESSES)}"
                f"{nearest(str(preprocess), PREPROCESSES)}."
            )
        self.adapter: Adapter = adapter_for_model(hf_model, PackingOptions(drop_padding, row_newline))
        self.model = hf_model
        self.training = hf_model.training
        self.processor = processor
        self.preprocess: Preprocess = preprocess
        self.last_num_visual_tokens: list[int] = []
        self.compressor = compressor

    @property
    def compressor(self) -> Compressor:
        """The method in use. Setting it checks that it fits the vision tower (ConfigError otherwise)."""
        return self._compressor

    @compressor.setter
    def compressor(self, compressor: Compressor) -> None:
        if not isinstance(compressor, Compressor):
            raise ConfigError(
                f"compressor={compressor!r}: must be an instance of vzip.Compressor, such as vzip.VisionZip(budget) or"
                " vzip.Identity()."
            )
        self.adapter.check_compressor(compressor)
        self._compressor = compressor

    @property
    def device(self) -> torch.device:
        """Where the text embedding is, and so where inputs go."""
        return next(self.adapter.embed_tokens.parameters()).device

    def encode_images(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, tile_grids: Tensor | None = None
    ) -> list[Tensor]:
        """Pictures -> visual tokens, as they enter the language model.

        Args:
            pixel_values: as the model's Hugging Face processor returns them (LLaVA: ``[images, 3, h, w]``).
            image_sizes: original (height, width) of each picture, where the family needs it.
            tile_grids: (rows, cols) of each picture's tiles, as ``preprocess_images`` returns them for LLaVA-NeXT;
                None: the grid that the Hugging Face processor makes for ``image_sizes``.

        Returns:
            for each image ``[num_visual_tokens, d_text]``.

        Raises:
            PromptError: ``pixel_values`` of a wrong shape; sizes that are missing or do not fit them.
        """
        return self.adapter.encode(pixel_values, image_sizes, self._compressor, tile_grids)

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: PaddingSide | None = None,
        tile_grids: Tensor | None = None,
    ) -> PreparedInputs:
        """Builds what the language model gets.

        Args:
            input_ids: ``[B, T]`` with one placeholder an image, or the processor's expanded runs.
            attention_mask: ``[B, T]``; None means no padding. Excluded positions are dropped and padding is made anew.
            pixel_values: all images of the batch in the order of their placeholders; None for a prompt without image.
            image_sizes: as the processor returns them, where the family needs them.
            labels: ``[B, T]``, as for the Hugging Face model.
            padding_side: side of the result's padding; None keeps the input's (left where the input has no padding).
            tile_grids: as in ``encode_images``.

        Returns:
            ``inputs_embeds``, ``attention_mask``, ``position_ids``, ``labels``, ``num_visual_tokens``.

        Raises:
            PromptError: placeholders and images do not match, or a tensor has a wrong shape.
        """
        num_images = 0 if pixel_values is None else pixel_values.shape[0]
        token_id = self.adapter.image_token_id
        lengths = self.adapter.expanded_lengths(num_images, image_sizes)
        plan = plan_splice(input_ids, attention_mask, token_id, lengths, padding_side)  # before any picture is encoded
        images = []
        if pixel_values is not None and num_images > 0:
            images = self.encode_images(pixel_values, image_sizes, tile_grids)
        input_ids = input_ids.to(self.device)
        prepared = splice(plan, input_ids, self.adapter.embed_tokens, images, token_id, labels)
        self.last_num_visual_tokens = prepared.num_visual_tokens
        return prepared

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        tile_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the Hugging Face model's forward, returning its output object; logits are of the compressed sequence.

        Args:
            input_ids, attention_mask, pixel_values, image_sizes, labels, tile_grids: as in ``prepare``.
            **kwargs: handed on to the Hugging Face model (``use_cache``, ``logits_to_keep``, ...).

        Raises:
            PromptError: as ``prepare``; or an argument that belongs to the uncompressed sequence.
        """
        _refuse(kwargs, ("inputs_embeds", "position_ids", "past_key_values"), "forward")
        prepared = self.prepare(input_ids, attention_mask, pixel_values, image_sizes, labels, tile_grids=tile_grids)
        return self.model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            labels=prepared.labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        tile_grids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates; returns the new tokens only, ``[B, num_new_tokens]`` (or Hugging Face's output object).

        Prompts are padded on the left inside, whatever the input's side, since the last position is continued.

        Args:
            input_ids, attention_mask, pixel_values, image_sizes, tile_grids: as in ``prepare``.
            **kwargs: Hugging Face's generation settings (``max_new_tokens``, ``do_sample``, ``num_beams``, ...).

        Raises:
            PromptError: as ``prepare``; or an argument that belongs to the uncompressed sequence.
            ConfigError: ``use_cache=False``, which Hugging Face cannot do from embeddings.
        """
        _refuse(kwargs, ("inputs_embeds", "position_ids", "past_key_values", "labels"), "generate")
        if kwargs.get("use_cache") is False:
            # Hugging Face would switch the cache on without a word: from embeddings it cannot start over each step.
            raise ConfigError(
                "generate(use_cache=False): generation from compressed pictures always uses the cache. Leave use_cache"
                " out, or set it to True."
            )
        prepared = self.prepare(
            input_ids, attention_mask, pixel_values, image_sizes, padding_side="left", tile_grids=tile_grids
        )
        return self.model.generate(
            inputs_embeds=prepared.inputs_embeds, attention_mask=prepared.attention_mask, **kwargs
        )

    def chat(self, system_prompt: str | None = None) -> ChatSession:
        """Begins a dialogue that encodes each picture once and computes only what is new in each turn.

        Args:
            system_prompt: text that the chat template puts before the first turn.

        Raises:
            ConfigError: the wrapper has no processor, or the processor has no chat template.
        """
        return ChatSession(self, system_prompt)

    def preprocess_images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Pictures -> ``pixel_values``, by the rule in ``preprocess``, and what else the family needs with them.

        LLaVA-NeXT: also ``image_sizes``, and with ``"llava"`` ``tile_grids``, since where several grids serve a picture
        equally well LLaVA's choice and Hugging Face's differ.

        Raises:
            ConfigError: the wrapper has no processor.
            ImageError: a picture that cannot be used.
        """
        image_processor = self._need_processor("preprocess_images").image_processor
        return self.adapter.prepare_pictures(images, image_processor, self.preprocess)

    def build_inputs(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """Prompts and pictures -> keyword arguments for ``prepare``, ``forward`` and ``generate``.

        Args:
            texts: prompts, with one ``<image>`` for each of their pictures.
            images: for each prompt its pictures, in the order of the placeholders.

        Returns:
            ``input_ids`` and ``attention_mask`` ``[B, T]``, padded on the left, on the model's device; ``pixel_values``
            (and ``image_sizes``, ``tile_grids``) if there are pictures.

        Raises:
            ConfigError: the wrapper has no processor.
            PromptError: a prompt whose placeholders do not match its pictures.
            ImageError: a picture that cannot be used.
        """
        tokenizer = self._need_processor("build_inputs").tokenizer
        if len(texts) != len(images):
            raise PromptError(f"{len(texts)} prompts but {len(images)} lists of pictures: one list a prompt is needed.")
        token_id = self.adapter.image_token_id
        rows: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
        for number, (row, pictures) in enumerate(zip(rows, images, strict=True)):
            if row.count(token_id) != len(pictures):
                raise PromptError(
                    f"Prompt {number} holds {row.count(token_id)} <image> placeholders but {len(pictures)} pictures"
                    " were given for it: write <image> once for each picture."
                )
        longest = max((len(row) for row in rows), default=0)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        if tokenizer.pad_token_id is not None:
            ids.fill_(tokenizer.pad_token_id)
        for number, row in enumerate(rows):
            ids[number, longest - len(row) :] = torch.tensor(row, dtype=torch.int64)
            mask[number, longest - len(row) :] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if flat := [picture for pictures in images for picture in pictures]:
            inputs |= self.preprocess_images(flat)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _need_processor(self, what: str) -> Any:
        if self.processor is None:
            raise ConfigError(
                f"{what} needs the checkpoint's processor, and this wrapper has none: pass processor= to CompressedVlm,"
                " or use load_vlm on a directory that holds the processor's and tokenizer's files."
            )
        return self.processor


def _refuse(kwargs: dict[str, Any], names: tuple[str, ...], call: str) -> None:
    """Raises PromptError for arguments that would speak of the sequence before compression."""
    given = [name for name in names if kwargs.get(name) is not None]
    if given:
        raise PromptError(
            f"{call}({', '.join(given)}=...): compression changes the sequence, so these are made by `prepare`. To"
            " go on from a cache or from embeddings call `vlm.model` itself."
        )
