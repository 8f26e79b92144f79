"""The wrapper: a Hugging Face model and a compressor, with the model's own calls on the outside.

It owns the five multimodal steps (encode, score, compress, project, splice) and hands the language model
``inputs_embeds``. The Hugging Face model is used, never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vzip.compressors.base import Compressor, check_is_compressor
from vzip.errors import ConfigError, PromptError
from vzip.media.images import Preprocess
from vzip.media.video import check_num_frames
from vzip.pruners.base import Pruner
from vzip.pruners.context import PrunedRun, pruning, refuse_generation, refuse_training

from .chat.session import ChatSession
from .compiled import (
    CompiledEncoder,
    CompiledLanguageModel,
    check_compiler,
    check_compiles,
    check_generation,
    check_parts,
    check_spread,
)
from .families import INPUT_NAMES, FamilyOptions, VisualInputs, adapter_for_model
from .families.finite import check_embeddings, check_logits, refusing_not_finite
from .families.options import Positions
from .families.places import EncodedVisuals, VisualTokens
from .families.questions import check_questions
from .generation import (
    AnswerStreamer,
    check_length,
    check_settings,
    num_new_tokens,
    only_new,
    prompt_ids,
    refuse_unserved,
)
from .inputs import InputBuilder
from .splice import (
    IGNORED_LABEL,
    PaddingSide,
    PreparedInputs,
    SplicePlan,
    check_ends_in_text,
    plan_splice,
    positions_before,
    splice_tokens,
)
from .towers.text import check_text_encoder
from .trainable import TrainerModel

# A list of texts, or EncodedVisuals; or None. Not typed so: then no `**inputs` of tensors could stand beside them.
Questions = Any
Encoded = Any


class CompressedVlm(InputBuilder, TrainerModel):
    """A vision-language model whose visual tokens pass through a compressor.

    Several wrappers with different compressors may share one model. It can be the model of transformers' ``Trainer``
    (``vzip.TrainerCollator``). Where some parameters train and others are frozen, ``state_dict`` holds the former.

    Attributes:
        model: the very Hugging Face model given, unmodified.
        compressor: the method; may be replaced at any time.
        processor: the Hugging Face processor (tokenizer, image processor, chat template), or None.
        preprocess: ``"llava"`` (pad to a square, as the paper's scripts) or ``"hf"`` (the checkpoint's own processor);
            None: the first of these that the family has.
        adapter: what we know of the model's family.
        num_frames: frames taken of a video; None: by the time it lasts, see ``fps`` of ``FamilyOptions``.
        revision: the commit of the hub's repository that the model was loaded from, or None.
        lora: of LoRA layers that were loaded with it where they are (``name_or_path``) and the digest of their weights
            (``sha256``), or None.
        last_num_visual_tokens: visual tokens of each image, then of each video, that entered the language model in the
            last ``prepare``, ``forward`` or ``generate``; measured on the tensors, not read from the budget.
        pruner: drops visual tokens inside the language model, or None; may be replaced at any time. The cache that such
            a run returns can be continued within ``vzip.pruners.context.pruning`` alone.
        compiled_parts: what runs under ``torch.compile``, see ``compile`` of ``__init__``.
        last_pruned: what the pruner's last run did (``PrunedRun``: visual tokens and cache length of each layer), or
            None.
    """

    def __init__(
        self,
        hf_model: PreTrainedModel,
        compressor: Compressor,
        processor: ProcessorMixin | None = None,
        preprocess: Preprocess | None = None,
        drop_padding: bool = False,
        row_newline: bool = False,
        num_frames: int | None = None,
        drop_cls: bool = False,
        pruner: Pruner | None = None,
        positions: Positions | None = None,
        fps: float | None = None,
        min_frame_pixels: int | None = None,
        max_frame_pixels: int | None = None,
        compile: Sequence[str] | str | None = None,
    ) -> None:
        """Wraps a loaded model.

        Args:
            hf_model, compressor, processor, preprocess, pruner: see the class.
            drop_padding, row_newline: see ``vzip.models.families.options.FamilyOptions`` (LLaVA-NeXT only).
            num_frames: see the class; None: of Video-LLaVA 8, as it was trained, of Qwen's models by ``fps``.
            drop_cls: see ``FamilyOptions`` (Mini-Gemini only).
            positions: see ``FamilyOptions``: ``original``, ``repacked``, or None for the family's own.
            fps, min_frame_pixels, max_frame_pixels: see ``FamilyOptions`` (Qwen2.5-VL and Qwen3-VL only).
            compile: what ``torch.compile`` makes faster at the second call of a shape and slower at the first:
                ``tower`` (pixels to visual tokens, wherever the wrapper encodes), ``prefill`` (``generate`` on the
                prompt, padded to one of a few lengths) and ``decode`` (``generate`` on each further token, with a cache
                of fixed length); names, or one text as ``tower+decode``; None: nothing. Answers are those of the model
                that is not compiled but for the last digits of its numbers.

        Raises:
            UnsupportedModelError: no adapter for the model's class, vision tower or settings.
            ConfigError: an unknown ``preprocess``, a budget that does not fit the vision tower, or an option
                that the family or the compressor cannot honour; parts that cannot be compiled with the others.
            MissingPackageError: no compiler on this machine for what is to be compiled.
        """
        super().__init__()
        of_videos = (fps, min_frame_pixels, max_frame_pixels)
        options = FamilyOptions(drop_padding, row_newline, drop_cls, positions, *of_videos)
        self.adapter = adapter_for_model(hf_model, options)
        self.preprocess = self.adapter.check_preprocess(preprocess, hf_model.config)
        if num_frames is not None:
            check_num_frames(num_frames)
        self.adapter.check_options(self.adapter.options, num_frames)
        self.num_frames = self.adapter.default_num_frames if num_frames is None else num_frames
        self.model = hf_model
        self.training = hf_model.training
        self.processor = processor
        self.name_or_path: str = hf_model.name_or_path
        self.revision: str | None = None
        self.lora: dict[str, str] | None = None
        self.last_num_visual_tokens: list[int] = []
        self.compiled_parts = check_parts(compile)
        check_compiler(self.compiled_parts, hf_model.device)
        check_spread(self.compiled_parts, hf_model)
        self.compressor = compressor
        self.pruner = pruner
        self._encoder = CompiledEncoder(self.adapter) if "tower" in self.compiled_parts else None
        self._language: CompiledLanguageModel | None = None
        if {"prefill", "decode"} & set(self.compiled_parts):
            self._language = CompiledLanguageModel(hf_model, self.adapter.embed_tokens, self.compiled_parts)
        self.last_pruned: PrunedRun | None = None

    @property
    def positions(self) -> Positions:
        """Whether visual tokens keep the position ids of their places (``original``) or are counted anew."""
        return "original" if self.adapter.keeps_places else "repacked"

    @property
    def compressor(self) -> Compressor:
        """The method in use. Setting it checks that it fits the vision tower (ConfigError otherwise)."""
        return self._compressor

    @compressor.setter
    def compressor(self, compressor: Compressor) -> None:
        check_is_compressor(compressor)
        self.adapter.check_tower_use(compressor)
        self.adapter.check_scope(compressor)
        self.adapter.check_compressor(compressor)
        check_text_encoder(compressor, self.model.config)
        self._check_compiles(compressor, getattr(self, "_pruner", None))
        self._compressor = compressor

    @property
    def pruner(self) -> Pruner | None:
        """The pruner in use. Setting it checks that it fits the language model (ConfigError, UnsupportedModelError)."""
        return self._pruner

    @pruner.setter
    def pruner(self, pruner: Pruner | None) -> None:
        if pruner is not None:
            if not isinstance(pruner, Pruner):
                raise ConfigError(f"pruner={pruner!r}: must be an instance of vzip.Pruner, as vzip.FastV(), or None.")
            self.adapter.check_pruner(self.adapter.model.config, pruner)
        self._check_compiles(self._compressor, pruner)
        self._pruner = pruner

    def _check_compiles(self, compressor: Compressor, pruner: Pruner | None) -> None:
        kind = getattr(self.model, "quantization_method", None)
        check_compiles(
            self.compiled_parts,
            type(self.adapter),
            self.model.config,
            compressor,
            pruner=pruner,
            attn_implementation=getattr(self.model.config.get_text_config(), "_attn_implementation", None),
            quantization=None if kind is None else str(kind),
        )

    @contextmanager
    def _pruning(self, prepared: PreparedInputs) -> Iterator[PrunedRun | None]:
        """The pruner at work on prepared inputs, where there is one and something to drop."""
        self.last_pruned = None
        if self._pruner is None or not bool((prepared.visual_index >= 0).any()):
            yield None
            return
        with pruning(self._pruner, self.adapter.decoder, prepared.visual_index) as run:
            yield run
        self.last_pruned = run

    @property
    def _has_hooks(self) -> bool:
        """Whether the language model runs with hooks, a pruner's or the family's."""
        return self._pruner is not None or self.adapter.has_planes

    def _deeper(self, prepared: PreparedInputs) -> AbstractContextManager[None]:
        """What enters the language model at deeper layers, of a family that has it; a pruner must find it there."""
        return self.adapter.language_context(prepared.visual_index, prepared.planes)

    def encode_images(
        self,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        questions: Questions = None,
        **processor_outputs: Tensor | None,
    ) -> list[Tensor]:
        """Images -> visual tokens, as they enter the language model.

        Args:
            pixel_values: as the model's Hugging Face processor returns them (LLaVA: ``[images, 3, h, w]``).
            image_sizes: original (height, width) of each image, where the family needs it.
            questions: for a text-aware method the raw question about each image; no other looks at them.
            **processor_outputs: what else the processor, or ``preprocess_images``, returned with them. LLaVA-NeXT's
                ``tile_grids`` (rows, cols) are taken from the Hugging Face processor's rule where they are left out.

        Returns:
            for each image ``[num_visual_tokens, d_text]``.

        Raises:
            PromptError: a tensor of a wrong shape; one that is missing or that the family does not have; a text-aware
                method without a question for each image.
        """
        outputs = {"pixel_values": pixel_values, "image_sizes": image_sizes, **processor_outputs}
        return [own.rows for _, own in self.encode(questions, **outputs).images]

    def encode_videos(
        self, pixel_values_videos: Tensor, questions: Questions = None, **processor_outputs: Tensor | None
    ) -> list[Tensor]:
        """Videos -> visual tokens, frame by frame, as they enter the language model.

        Args:
            pixel_values_videos: ``[videos, frames, 3, h, w]``, any number of frames; of Qwen's models all patches.
            questions: as for ``encode_images``, about each video.
            **processor_outputs: what else the processor returned with them (``video_grid_thw``).

        Returns:
            for each video ``[num_visual_tokens, d_text]``: the frames' tokens one after the other.

        Raises:
            UnsupportedModelError: the model has no video tower.
            PromptError: another shape; a text-aware method without a question for each video.
        """
        outputs = {"pixel_values_videos": pixel_values_videos, **processor_outputs}
        return [own.rows for _, own in self.encode(questions, **outputs).videos]

    def encode(self, questions: Questions = None, **processor_outputs: Tensor | None) -> EncodedVisuals:
        """Images and videos -> what ``prepare``, ``forward`` and ``generate`` take as ``encoded``, for many prompts.

        Args:
            questions: for a text-aware method the raw question about each image, then about each video.
            **processor_outputs: as for ``prepare``.

        Raises:
            PromptError, UnsupportedModelError, NotFiniteError: as ``prepare``.
        """
        visual = self.asked(self.adapter.read_inputs(**processor_outputs), questions)
        tokens = self._encode(visual)
        check_embeddings(self.model, [own.rows for own in tokens], processor_outputs)
        num_images = len(visual.images)
        return EncodedVisuals(
            list(zip(visual.images, tokens[:num_images], strict=True)),
            list(zip(visual.videos, tokens[num_images:], strict=True)),
        )

    def _read(self, encoded: EncodedVisuals | None, processor_outputs: Mapping[str, Any]) -> VisualInputs:
        """The shapes of what is shown, be it encoded already or not."""
        if encoded is None:
            return self.adapter.read_inputs(**processor_outputs)
        if given := [name for name, value in processor_outputs.items() if value is not None]:
            raise PromptError(f"{', '.join(given)} beside encoded: give images and videos in one of these ways.")
        wrong = [
            (len(own.rows), self._compressor.num_visual_tokens(shape))
            for shape, own in (*encoded.images, *encoded.videos)
            if len(own.rows) != self._compressor.num_visual_tokens(shape)
        ]
        if wrong:
            raise PromptError(
                f"encoded holds an image or video of {wrong[0][0]} visual tokens, and {self._compressor!r} makes"
                f" {wrong[0][1]} of it: it was encoded by another compressor. Encode it again."
            )
        return VisualInputs([shape for shape, _ in encoded.images], [shape for shape, _ in encoded.videos], {})

    def _encode(self, visual: VisualInputs) -> list[VisualTokens]:
        """``Adapter.encode`` by this method, compiled where that was asked for."""
        if self._encoder is None or not visual.shapes:
            return self.adapter.encode(visual, self._compressor)
        return self._encoder(visual, self._compressor)

    def asked(self, visual: VisualInputs, questions: Sequence[str] | None) -> VisualInputs:
        """``Adapter.asked`` with this compressor and processor: one question an image, then one a video."""
        return self.adapter.asked(visual, self._compressor, questions, self.processor)

    def _asked_in_prompts(
        self, visual: VisualInputs, plan: SplicePlan, questions: Sequence[str] | None
    ) -> VisualInputs:
        """The same with one question a prompt, for all its images and videos."""
        if not visual.shapes or check_questions(self._compressor, questions, len(plan.rows), "prompt") is None:
            return visual
        assert questions is not None
        prompt_of = {p.visual: row for row, pieces in enumerate(plan.rows) for p in pieces if p.visual is not None}
        return self.asked(visual, [questions[prompt_of[number]] for number in range(len(visual.shapes))])

    def expected_num_visual_tokens(self, encoded: Encoded = None, **inputs: Any) -> list[int]:
        """Visual tokens that the compressor will make of each image, then of each video; nothing is encoded.

        Args:
            encoded: as for ``prepare``.
            **inputs: as for ``generate``; what no family's processor returns with images and videos is left alone.

        Raises:
            PromptError, UnsupportedModelError: as ``prepare``.
        """
        outputs = self.adapter.counted(_split(inputs)[0], inputs.get("input_ids"), inputs.get("attention_mask"))
        return [self._compressor.num_visual_tokens(shape) for shape in self._read(encoded, outputs).shapes]

    def visual_bytes(self, **processor_outputs: Tensor | None) -> list[int]:
        """Memory that ``encode`` will need for the visual tokens of each image, then of each video, planes left out."""
        width = self.model.config.get_text_config().hidden_size
        counts = self.expected_num_visual_tokens(**processor_outputs)
        return [count * width * self.model.dtype.itemsize for count in counts]

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: PaddingSide | None = None,
        questions: Questions = None,
        encoded: Encoded = None,
        **processor_outputs: Tensor | None,
    ) -> PreparedInputs:
        """Builds what the language model gets.

        Args:
            input_ids: ``[B, T]`` with one placeholder an image or video, or the processor's expanded runs.
            attention_mask: ``[B, T]``; None means no padding. Excluded positions are dropped and padding is made anew.
            labels: ``[B, T]``, as for the Hugging Face model.
            padding_side: side of the result's padding; None keeps the input's (left where the input has no padding).
            questions: for a text-aware method the raw question of each prompt, without template and placeholders: what
                is kept of all its images and videos depends on it. No other method looks at them, nor a batch of text.
            encoded: the images and videos in place of the processor's outputs, from ``encode``, in the order of their
                placeholders; one that several prompts show stands there several times.
            **processor_outputs: all images and videos of the batch, in the order of their placeholders, as the model's
                processor returns them; none for a batch of text.

        Returns:
            ``inputs_embeds``, ``attention_mask``, ``position_ids``, ``labels``, ``num_visual_tokens``.

        Raises:
            PromptError: placeholders and images or videos do not match; a tensor of a wrong shape, one that is missing
                or that the family does not have; ids or labels outside the vocabulary; a prompt longer than the model
                reads; a text-aware method without a question for each prompt; ``encoded`` of another budget.
            UnsupportedModelError: videos for a model without a video tower.
            NotFiniteError: pixels, weights or what is made of them hold NaN or infinity.
        """
        adapter = self.adapter
        visual = self._read(encoded, adapter.counted(processor_outputs, input_ids, attention_mask))
        lengths, video_lengths = visual.num_placeholders
        token_id, video_token_id = adapter.image_token_id, adapter.video_token_id
        vocab_size = getattr(adapter.embed_tokens, "num_embeddings", None)
        # Planned before anything is encoded.
        plan = plan_splice(
            input_ids,
            attention_mask,
            token_id,
            lengths,
            padding_side,
            video_token_id,
            video_lengths,
            vocab_size,
            adapter.video_runs(visual),
        )
        if labels is not None:
            plan.check_labels(labels, input_ids, vocab_size)
        check_length(
            plan.num_tokens([self._compressor.num_visual_tokens(shape) for shape in visual.shapes]), self.model.config
        )
        before = positions_before(adapter, plan, input_ids, visual.shapes)
        check_length([int(ids.max()) + 1 for ids in before if ids.numel()], self.model.config, dropped_count=True)
        if encoded is None:
            tokens = self._encode(self._asked_in_prompts(visual, plan, questions))
        else:
            tokens = [own for _, own in (*encoded.images, *encoded.videos)]
        prepared = splice_tokens(adapter, plan, input_ids.to(self.device), visual, tokens, before, labels)
        check_embeddings(self.model, [prepared.inputs_embeds], processor_outputs)
        self.last_num_visual_tokens = prepared.num_visual_tokens
        return prepared

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        questions: Questions = None,
        **kwargs: Any,
    ) -> Any:
        """As the Hugging Face model's forward, returning its output object; logits are of the compressed sequence.

        Args:
            input_ids, attention_mask, labels, questions: as in ``prepare``.
            **kwargs: the processor's outputs or ``encoded``, as in ``prepare``; the others are handed on to the Hugging
                Face model (``use_cache``, ``logits_to_keep``, ...).

        Raises:
            PromptError: as ``prepare``; an argument that belongs to the uncompressed sequence, or to a step that is
                done here (``vision_feature_layer``); labels or a model in training mode while there is a pruner.
        """
        if self._has_hooks and torch.compiler.is_compiling():  # hooks are no part of a graph
            plain = torch.compiler.disable(self.forward)
            return plain(input_ids, attention_mask, labels, questions=questions, **kwargs)
        _refuse(kwargs, ("inputs_embeds", "position_ids", "past_key_values"), "forward")
        if self._pruner is not None:
            refuse_training(self.model.training, labels)
        outputs, settings = _split(kwargs)
        settings = check_settings(settings, self.model.config, "forward")
        prepared = self.prepare(input_ids, attention_mask, labels, questions=questions, **outputs)
        embeds = prepared.inputs_embeds
        if labels is not None and not prepared.num_visual_tokens and (zero := self._nothing_trained()) is not None:
            embeds = embeds + zero
        with self._deeper(prepared), self._pruning(prepared) as run:
            output = self.model(
                inputs_embeds=embeds,
                attention_mask=prepared.attention_mask,
                position_ids=prepared.position_ids,
                labels=prepared.labels,
                **settings,
            )
            if run is not None:
                run.check_forwards(1)
        if prepared.labels is not None and not (prepared.labels[:, 1:] != IGNORED_LABEL).any():
            # A mean over nothing, which would make every weight NaN: where each answer was cut off (max_length).
            output.loss = 0 * output.logits[:, -1].float().mean()
        if not self.model.training and run is None and output.logits.shape[:2] == prepared.attention_mask.shape:
            rows = torch.arange(len(output.logits), device=output.logits.device)
            last = prepared.attention_mask.cumsum(dim=1).argmax(dim=1).to(rows.device)
            check_logits(self.model, output.logits[rows, last])
        return output

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        questions: Questions = None,
        **kwargs: Any,
    ) -> Any:
        """Generates; returns the new tokens only, ``[B, num_new_tokens]`` (or Hugging Face's output object).

        Prompts are padded on the left inside, whatever the input's side, since the last position is continued. Options
        that look at the prompt's ids see what they see without compression, with as many placeholders as there are
        visual tokens.

        Args:
            input_ids, attention_mask, questions: as in ``prepare``.
            **kwargs: the processor's outputs or ``encoded``, as in ``prepare``, and Hugging Face's generation settings
                (``max_new_tokens``, ``do_sample``, ``num_beams``, ...).

        Raises:
            PromptError: as ``forward``; a prompt that with its answer is longer than the model reads.
            ConfigError: ``use_cache=False``, which Hugging Face cannot do from embeddings; an assistant, guidance and
                other options that need the prompt's ids and cannot have its images; while there is a pruner, beams
                or another cache than a dynamic or static one.
        """
        if self._has_hooks and torch.compiler.is_compiling():
            plain = torch.compiler.disable(self.generate)
            return plain(input_ids, attention_mask, questions=questions, **kwargs)
        _refuse(kwargs, ("inputs_embeds", "position_ids", "past_key_values", "labels"), "generate")
        if kwargs.get("use_cache") is False:
            # Hugging Face would switch the cache on without a word: from embeddings it cannot start over each step.
            raise ConfigError(
                "generate(use_cache=False): generation from compressed images always uses the cache. Leave use_cache"
                " out, or set it to True."
            )
        outputs, settings = _split(kwargs)
        of_model = self.model.generation_config
        settings = check_settings(settings, self.model.config, "generate")
        if self._pruner is not None:
            refuse_generation(settings, of_model)
        refuse_unserved(settings, of_model)
        if self._language is not None:
            check_generation(self.compiled_parts, settings, of_model)
        if settings.get("streamer") is not None:
            settings["streamer"] = AnswerStreamer(settings["streamer"])
        prepared = self.prepare(input_ids, attention_mask, padding_side="left", questions=questions, **outputs)
        positions = {}
        if self.adapter.keeps_places or self.adapter.position_axes > 1:
            positions["position_ids"] = prepared.position_ids
        if self.adapter.keeps_places:
            check_ends_in_text(prepared.visual_index)
        length = prepared.inputs_embeds.shape[1]
        num_new = num_new_tokens(settings, of_model, length)
        check_length(prepared.attention_mask.sum(dim=1).tolist(), self.model.config, num_new)
        if self.adapter.keeps_places and length:
            last = prepared.position_ids[..., -1] + 1  # padded on the left, so each prompt's own
            check_length(last.reshape(-1, last.shape[-1]).amax(dim=0).tolist(), self.model.config, num_new, True)
        if self._language is not None:
            settings["custom_generate"] = self._language.generating(prepared, num_new, settings.get("streamer"))
        with self._deeper(prepared), self._pruning(prepared) as run:
            # The ids are for what looks at them (repetition_penalty ...); the embeddings are what is read.
            output = self.model.generate(
                self._ids(prepared),
                inputs_embeds=prepared.inputs_embeds,
                attention_mask=prepared.attention_mask,
                **positions,
                **refusing_not_finite(self.model, settings),
            )
            output = only_new(output, length)
            if run is not None:  # each new token is one forward's
                run.check_forwards(getattr(output, "sequences", output).shape[1])
        return output

    def _ids(self, prepared: PreparedInputs) -> Tensor:
        """The prompts as ids, for what looks at them while an answer is generated."""
        adapter = self.adapter
        num_videos = len(prepared.num_visual_tokens) - prepared.num_images
        written = [adapter.image_token_id] * prepared.num_images + [adapter.video_token_id or 0] * num_videos
        vocab_size = self.model.config.get_text_config().vocab_size
        of_visuals = torch.tensor(written, dtype=torch.int64)
        ids = prompt_ids(prepared.visual_index, prepared.text_ids.cpu(), of_visuals, vocab_size)
        return ids.to(prepared.inputs_embeds.device)

    def chat(self, system_prompt: str | None = None) -> ChatSession:
        """Begins a dialogue that encodes each image and video once and computes only what is new in each turn.

        With a text-aware method they are encoded anew for each question, and all from the first of them on is computed.

        Args:
            system_prompt: text that the chat template puts before the first turn.

        Raises:
            ConfigError: the wrapper has no processor, or the processor has no chat template; parts of the model are
                compiled, of which a dialogue makes no use.
        """
        if self.compiled_parts:
            raise ConfigError(
                f"model.compile={'+'.join(self.compiled_parts)}: a dialogue grows by turns of any length, for which no"
                " graph is made. Take model.compile out."
            )
        return ChatSession(self, system_prompt)


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is shown, as some family's processor returns it or encoded, and the rest, which is Hugging Face's."""
    names = {*INPUT_NAMES, "encoded"}
    outputs = {name: value for name, value in kwargs.items() if name in names}
    return outputs, {name: value for name, value in kwargs.items() if name not in names}


def _refuse(kwargs: dict[str, Any], names: tuple[str, ...], call: str) -> None:
    """Raises PromptError for arguments that would speak of the sequence before compression."""
    given = [name for name in names if kwargs.get(name) is not None]
    if given:
        raise PromptError(
            f"{call}({', '.join(given)}=...): compression changes the sequence, so these are made by `prepare`. To"
            " go on from a cache or from embeddings call `vlm.model` itself."
        )
