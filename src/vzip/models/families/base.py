"""What a family of vision-language models must tell us: where its parts are and how crops become one sequence.

One file per family holds every Hugging Face attribute path relied on, so a change of transformers is a change of one
file.
"""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from vzip.compressors.base import CompressedTokens, Compressor
from vzip.compressors.vision import Signal, VisionOutput, VisionShape, of_tower
from vzip.errors import ConfigError, PromptError, UnsupportedModelError, nearest
from vzip.media.images import PREPROCESSES, Preprocess, prepare_images
from vzip.media.video import VideoSource
from vzip.pruners.base import Decoder, Pruner

from ..devices import execution_device, has_placement_hooks
from ..towers.cache import TowerCache
from ..towers.structure import Tower, TowerGeometry
from ..towers.text import TextEncoder, check_text_encoder
from .decoder import LlamaDecoder
from .options import FamilyOptions, check_fit
from .original.checkpoint import CROPPED, OriginalCheckpoint
from .places import VisualTokens
from .questions import beside, check_questions, missing_questions, need_tokenizer, read_text

logger = logging.getLogger(__name__)

# Runs a tower: the tower, pixels ``[N, 3, h, w]``, signals to record, the first row that the unmodified model uses.
TowerRun = Callable[[Tower, Tensor, frozenset[Signal], int], VisionOutput]
Stage = Callable[[str], AbstractContextManager[None]]


def no_stage(_name: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


@dataclass(frozen=True)
class VisualInputs:
    """The images and videos of a batch: their shapes, and tensors that only their family opens.

    Attributes:
        images: the shape of each image, in the order of their placeholders.
        videos: the shape of each video, likewise.
        tensors: as the processor returned them, by its names.
        texts: of each image, then of each video, its question's rows ``[M, width]``, see ``Adapter.asked``; empty
            where nothing is asked.
    """

    images: list[VisionShape]
    videos: list[VisionShape]
    tensors: Mapping[str, Tensor]
    texts: Sequence[Tensor] = ()

    @property
    def shapes(self) -> list[VisionShape]:
        """Images, then videos."""
        return [*self.images, *self.videos]

    @property
    def num_placeholders(self) -> tuple[list[int], list[int]]:
        """What the processor writes for each image, and for each video."""

        def written(shape: VisionShape) -> int:
            return shape.num_vanilla if shape.num_placeholders is None else shape.num_placeholders

        return [written(shape) for shape in self.images], [written(shape) for shape in self.videos]


_TAKE_VIDEOS = "Video-LLaVA (model=video_llava_7b), LLaVA-OneVision, Qwen2.5-VL and Qwen3-VL take videos."
# Numbers of images (or videos) whose crops have one grid, and the vision tower's output for these crops in turn.
Group = tuple[Sequence[int], VisionOutput]


class Adapter(ABC):
    """One Hugging Face model seen through the five steps: encode, score, compress, project, splice.

    Attributes:
        model_class: the Hugging Face class served.
        model: that object, unmodified.
        image_token_id: id of the placeholder in ``input_ids``.
        options: of the family.
        input_names: what the family's processor returns beside the text.
        written_image, written_video: how a prompt says where an image, or a video, goes.
        has_tiles: whether the family cuts an image into several crops.
        has_mining: whether patches are mined, and CLS, which is not, may be left out.
        has_video: whether it takes videos.
        why_no_video: why not, for messages.
        samples_by_time: whether it takes frames by the seconds of a video, and in any size.
        default_num_frames: frames taken of a video where no number is set; None: by the time it lasts.
        preprocesses: ways to prepare images that it has, see ``vzip.media.images``; the first is the usual one.
        templates: how a training may write its conversations, see ``vzip.data.conversations``; the first is its own.
        learns_videos: whether a training takes videos.
        decoder_class: how pruners see the language model's layers.
        keeps_places: whether visual tokens keep the position ids that the unmodified model gives to their places; of
            the class what the published code does, of an object what ``options.positions`` says.
        position_axes: rows of position ids that the language model takes.
        has_planes: whether something of each visual token enters the language model at deeper layers.
        writes_steps: whether a video is written in a run of placeholders for each temporal step.
        video_token_id: id of a video's placeholder in ``input_ids``, or None.
        tower_cache: outputs of the vision tower kept between runs; None: the tower always runs. What a question adds
            for a text-aware method is never kept.
        projects_tokens: whether visual tokens are selected before the projector, by a method that can.
        cannot_use: why its tower cannot be used as some methods need, by ``Compressor.tower_use``.
        cannot_capture: why ``encode`` cannot be one graph, whatever the method; None: it can.
        text_encoder: the CLIP text model that was last needed.
    """

    model_class: ClassVar[type[PreTrainedModel]]
    input_names: ClassVar[tuple[str, ...]] = ("pixel_values",)
    written_image: ClassVar[str] = "<image>"
    written_video: ClassVar[str] = "<video>"
    has_tiles: ClassVar[bool] = False
    has_mining: ClassVar[bool] = False
    has_video: ClassVar[bool] = False
    why_no_video: ClassVar[str] = "has no video tower and takes images only"
    samples_by_time: ClassVar[bool] = False
    default_num_frames: ClassVar[int | None] = None
    preprocesses: ClassVar[tuple[str, ...]] = PREPROCESSES
    templates: ClassVar[tuple[str, ...]] = ("vicuna_v1", "plain", "chat")
    learns_videos: ClassVar[bool] = False
    decoder_class: ClassVar[type[LlamaDecoder]] = LlamaDecoder
    keeps_places: bool = False
    has_planes: ClassVar[bool] = False
    writes_steps: ClassVar[bool] = False
    position_axes: ClassVar[int] = 1
    projects_tokens: ClassVar[bool] = True
    cannot_use: ClassVar[Mapping[str, str]] = {
        "pruned": "its vision tower is run as a whole and not layer by layer",
        "resized": "its images have any size; give smaller ones",
    }
    cannot_capture: ClassVar[str | None] = None
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
        self.check_config(model.config)
        attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
        self.check_positions(self.options, attention)
        if self.options.positions is not None:
            self.keeps_places = self.options.positions == "original"
        self.image_token_id: int = self.read_image_token_id(model.config)
        self.tower_cache: TowerCache | None = None
        self.text_encoder: TextEncoder | None = None

    @classmethod
    @abstractmethod
    def check_config(cls, config: Any) -> TowerGeometry | None:
        """The shape of every crop, from the configuration alone; None where crops differ in size.

        Raises:
            UnsupportedModelError: what we cannot serve.
        """

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
                f"model.num_frames={num_frames}: {cls.model_class.__name__} {cls.why_no_video}, so it must be"
                f" null. {_TAKE_VIDEOS}"
            )
        if options.of_videos and not cls.samples_by_time:
            given = ", ".join(f"model.{name}={value}" for name, value in options.of_videos.items())
            why = "takes a number of frames (model.num_frames), all of one size" if cls.has_video else cls.why_no_video
            raise ConfigError(
                f"{given}: {cls.model_class.__name__} {why}, so these must be null; they are options of Qwen2.5-VL and"
                " Qwen3-VL."
            )

    @classmethod
    def check_takes_videos(cls) -> None:
        """Raises UnsupportedModelError for a family without videos."""
        if not cls.has_video:
            raise UnsupportedModelError(f"{cls.model_class.__name__} {cls.why_no_video}. {_TAKE_VIDEOS}")

    @classmethod
    def check_positions(cls, options: FamilyOptions, attn_implementation: str | None) -> None:
        """Raises ConfigError where an attention kernel would misread the position ids."""
        if options.positions == "original" and attn_implementation == "flash_attention_2" and cls.position_axes == 1:
            raise ConfigError(
                "model.positions=original with model.attn_implementation=flash_attention_2: flash attention reads a gap"
                " in the position ids as the beginning of another sequence. Use attn_implementation=sdpa, or"
                " positions=repacked."
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
        cls.check_tower_use(compressor)
        cls.check_scope(compressor)
        if geometry is not None:
            check_fit(compressor, geometry, options)
        check_text_encoder(compressor, config)

    @classmethod
    def check_scope(cls, compressor: Compressor) -> None:
        """Raises ConfigError where frames of a video cannot share a budget."""
        if not compressor.joins_frames:
            return
        name = type(compressor).__name__
        why = None
        if not cls.has_video:
            why = f"{cls.model_class.__name__} {cls.why_no_video}"
        elif compressor.tower_use != "whole":
            why = f"compressor={name} acts while the vision tower runs, which sees each frame by itself"
        elif compressor.uses_grid:
            why = f"compressor={name} goes by the rows and columns of one frame's patches"
        if why is not None:
            raise ConfigError(
                f"budget.scope=video, one budget for all frames of a video: {why}. Set budget.scope=crop, or use"
                " another compressor, as visionzip, or a model that takes videos, as Qwen2.5-VL."
            )

    @classmethod
    def check_tower_use(cls, compressor: Compressor) -> None:
        """Raises ConfigError for a method that needs the vision tower to run in a way in which it cannot."""
        if (why := cls.cannot_use.get(compressor.tower_use)) is not None:
            acts = {"pruned": "drops patches inside the vision tower", "resized": "makes the image smaller"}
            raise ConfigError(
                f"compressor={type(compressor).__name__} {acts[compressor.tower_use]}, which"
                f" {cls.model_class.__name__} does not allow: {why}. Use another compressor, or a model of LLaVA-1.5,"
                " LLaVA-NeXT or Video-LLaVA in Hugging Face's class."
            )

    def check_capture(self, compressor: Compressor) -> None:
        """Raises ConfigError where ``encode`` with that method cannot be one graph for ``torch.compile``."""
        is_moved = has_placement_hooks(self.vision_tower) or has_placement_hooks(self.projector)
        self.check_graph(compressor, "its weights are fetched from elsewhere while it runs" if is_moved else None)

    @classmethod
    def check_graph(cls, compressor: Compressor, of_placement: str | None = None) -> None:
        """The same of a model that is not loaded; ``of_placement``: why not as it is placed."""
        why, name = cls.cannot_capture, cls.model_class.__name__
        of_method = compressor.cannot_capture
        if compressor.tower_use == "pruned":
            of_method = "how many patches it drops depends on the image"
        if of_method is not None:
            why, name = of_method, f"compressor={type(compressor).__name__}"
        elif of_placement is not None:
            why, name = of_placement, "device_map"
        if why is not None:
            raise ConfigError(
                f"compile=tower with {name}: {why}, so the vision tower cannot be one graph of fixed shapes. Leave"
                " tower out of compile."
            )

    @classmethod
    def check_preprocess(cls, preprocess: str | None, config: Any = None) -> Preprocess:
        """The way to prepare images that is meant; ConfigError for one that the family has not.

        Args:
            preprocess: None: as the model was trained, the family's usual way unless ``config`` says otherwise.
            config: the model's configuration, as far as it is known.
        """
        is_cropped = getattr(config, "image_aspect_ratio", None) == CROPPED and "hf" in cls.preprocesses
        chosen = preprocess or ("hf" if is_cropped else cls.preprocesses[0])
        if chosen not in cls.preprocesses:
            raise ConfigError(
                f"model.preprocess={preprocess!r}: of {cls.model_class.__name__} must be one of"
                f" {', '.join(cls.preprocesses)}{nearest(str(preprocess), cls.preprocesses)}."
            )
        if is_cropped and chosen != "hf":
            logger.warning(
                "model.preprocess=%s pads images, but the model was trained on their centres (image_aspect_ratio=%s in"
                " config.json): model.preprocess=null or hf cuts them out, as LLaVA's code does.",
                chosen,
                CROPPED,
            )
        return cast(Preprocess, chosen)

    @classmethod
    def check_template(cls, template: str | None) -> str:
        """The template of a training that is meant; None: the family's own. ConfigError for one that it cannot read."""
        chosen = cls.templates[0] if template is None else template
        if chosen not in Adapter.templates:  # which are all
            raise ConfigError(
                f"train.template={chosen}: must be one of {', '.join(cls.templates)}{nearest(chosen, cls.templates)},"
                f" or null, which means {cls.templates[0]}."
            )
        if chosen not in cls.templates:
            raise ConfigError(
                f"train.template={template}: conversations of {cls.model_class.__name__} are written by the"
                f" checkpoint's own chat template. Set train.template={cls.templates[0]}, or null, which means it."
            )
        return chosen

    @classmethod
    def check_pruner(cls, config: Any, pruner: Pruner) -> None:
        """Raises ConfigError or UnsupportedModelError for a pruner that the language model cannot have."""
        text_config = config.get_text_config()
        cls.decoder_class.check_config(text_config)
        pruner.check_fits(text_config)
        if pruner.budget is not None:
            pruner.schedule(cls.num_visual_of_any(config, pruner), text_config.num_hidden_layers)

    @classmethod
    def num_visual_of_any(cls, config: Any, pruner: Pruner) -> int:
        """Visual tokens of any image; ConfigError for a pruner whose budget is an average where sizes vary."""
        raise ConfigError(
            f"budget={pruner.budget}tok with compressor=none is a pruner's average over the layers, and images (or"
            f" videos) of {cls.model_class.__name__} vary in their visual tokens. Set budget=full and the pruner's own"
            " arguments, fractions where it takes any, as pruner.keep=0.2."
        )

    @classmethod
    def original(cls, directory: Path) -> OriginalCheckpoint | None:
        """A checkpoint of this family that is in its authors' layout; None for any other."""
        return None

    @classmethod
    def load_model(cls, directory: Path, config: Any, **settings: Any) -> Any:
        """What ``from_pretrained`` of the Hugging Face class returns for these settings; raises what it raises.

        Of an authors' layout: CheckpointError for tensors that differ from what ``config`` describes.
        """
        if (original := cls.original(directory)) is not None:
            return original.load(cls.model_class, config, **settings)
        return cls.model_class.from_pretrained(directory, config=config, trust_remote_code=False, **settings)

    @classmethod
    def load_processor(cls, directory: Path) -> Any:
        """The checkpoint's processor; raises what Hugging Face raises."""
        original = cls.original(directory)
        return cls.hf_processor(directory) if original is None else original.processor()

    @classmethod
    def hf_processor(cls, directory: Path) -> Any:
        """The processor of a checkpoint in Hugging Face's layout."""
        return AutoProcessor.from_pretrained(directory, trust_remote_code=False)

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
    def least_projected(self) -> tuple[int, ...]:
        """The shape of the smallest input that the projector takes."""
        return 1, 1, next(p for p in self.projector.parameters() if p.ndim == 2).shape[1]

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The language model, without its head."""

    @property
    def decoder(self) -> Decoder:
        """The language model's layers, for pruners; see ``check_pruner`` for which are served."""
        return self.decoder_class(self.language_model)

    @property
    def embed_tokens(self) -> nn.Module:
        """The text embedding."""
        return self.model.get_input_embeddings()

    def read_inputs(self, **processor_outputs: Tensor | None) -> VisualInputs:
        """Reads what the model's processor returned beside the text; nothing is run.

        Raises:
            PromptError: a tensor that this family does not have, that is missing, or of a wrong shape.
            UnsupportedModelError: videos, and the family has no video tower.
        """
        given = {name: value for name, value in processor_outputs.items() if value is not None}
        if "pixel_values_videos" in given:
            self.check_takes_videos()
        for name, value in given.items():
            if name in self.input_names and not isinstance(value, Tensor):
                raise PromptError(
                    f"{name} is a {type(value).__name__}: must be a tensor, as preprocess_images and the checkpoint's"
                    " processor make of images."
                )
            if name not in self.input_names:
                raise PromptError(
                    f"{name}: no input of {type(self.model).__name__}{nearest(name, self.input_names)}; its processor"
                    f" returns {', '.join(self.input_names)} beside the text."
                )
        return VisualInputs(self.image_shapes(given), self.video_shapes(given), given)

    def counted(
        self, processor_outputs: Mapping[str, Any], input_ids: Any, attention_mask: Tensor | None
    ) -> Mapping[str, Any]:
        """What the processor returned, with what only the prompts' placeholders tell of the images; for InternVL."""
        return processor_outputs

    @abstractmethod
    def image_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        """The shape of each image; raises as ``read_inputs``."""

    def video_shapes(self, tensors: Mapping[str, Tensor]) -> list[VisionShape]:
        """The shape of each video; raises as ``read_inputs``."""
        return []

    def video_runs(self, visual: VisualInputs) -> list[int]:
        """Of each video, in how many runs its placeholders are written; empty: each in one."""
        return [shape.num_crops for shape in visual.videos] if self.writes_steps else []

    @abstractmethod
    def image_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        """The vision tower's output for all images, as ``encode``'s arguments say; images of one grid together."""

    def video_outputs(
        self, visual: VisualInputs, signals: frozenset[Signal], run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[Group]:
        """The same for all videos."""
        raise self._no_video()

    def positions(self, segments: Sequence[Sequence[int] | VisionShape]) -> Tensor:
        """Position ids of the unmodified model for one prompt: int64 ``[position_axes, T]`` on the CPU.

        Args:
            segments: of the prompt, in order: ids of text, or the shape of an image or video.

        Raises:
            PromptError: an order of segments that the model cannot read.
        """
        return torch.arange(sum(s.num_vanilla if isinstance(s, VisionShape) else len(s) for s in segments))[None]

    def unit_places(self, shape: VisionShape, device: torch.device) -> Tensor:
        """Which of the unmodified model's visual tokens each unit is: int64 ``[num_crops, U]`` on the device.

        A unit that it leaves out, as CLS, has the first place.
        """
        num_stock = shape.num_vanilla // shape.num_crops
        own = torch.arange(shape.num_units - num_stock, -num_stock, -1, device=device).neg()
        return (torch.arange(shape.num_crops, device=device)[:, None] * num_stock + own).where(own >= 0, 0)

    def newline_places(self, shape: VisionShape) -> Tensor:
        """The same of the newlines that ``pack`` adds: int64 ``[num_added]``."""
        return torch.arange(0)

    def language_context(self, visual_index: Tensor, planes: Tensor | None) -> AbstractContextManager[None]:
        """What must hold while the language model reads a prompt: ``PreparedInputs.visual_index`` and ``planes``."""
        return nullcontext()

    def whole_index(self, shape: VisionShape) -> Tensor | None:
        """How the unmodified model packs an image (or a video): int64 ``[T]`` on the CPU, rows of its crops in turn.

        -1 stands for a newline. None: all rows in their order.
        """
        return None

    def pack_whole(self, shape: VisionShape, rows: Tensor, newline: Tensor, index: Tensor | None) -> Tensor:
        """Rows of an image's crops in turn, ``[num_crops * R, ...]``, as the unmodified model packs them.

        Args:
            shape: of the image (or video).
            rows: anything that the crops have by row.
            newline: ``[...]``, what a newline is among them.
            index: ``whole_index(shape)``.
        """
        # -1 is the last row, where the newline is.
        return rows if index is None else torch.cat([rows, newline[None]])[index.to(rows.device)]

    def newline(self, like: Tensor) -> Tensor:
        """The newline token ``[d_text]``, in the type and on the device of ``like``; of families that have one."""
        raise NotImplementedError

    def pack(self, shape: VisionShape, tokens: Tensor, kept: Tensor) -> Tensor:
        """Joins the compressed crops of an image (or a video) into one sequence.

        Args:
            shape: of the image, from ``read_inputs``.
            tokens: projected, ``[num_crops, K, d_text]``.
            kept: int64 ``[num_crops, num_kept]``, the units that the first ``num_kept`` tokens are.

        Returns:
            ``[num_visual_tokens, d_text]``.
        """
        return tokens.flatten(0, 1)

    @abstractmethod
    def check_compressor(self, compressor: Compressor) -> None:
        """Raises ConfigError if the compressor does not fit the vision tower or the family's options."""

    @abstractmethod
    def tokens_per_crop(self, compressor: Compressor) -> int | None:
        """Visual tokens of an image of one crop, what the family adds left out; None where crops differ in size."""

    def overview_index(self, shape: VisionShape) -> int:
        """Which crop of an image shows the whole of it."""
        return 0

    def num_tile_columns(self, shape: VisionShape) -> int | None:
        """How many tiles of an image lie side by side; None where its shape does not say."""
        return None

    @abstractmethod
    def shown(self, visual: VisualInputs) -> list[Tensor]:
        """The crops of the first image (or video), as the tower sees them, normalised: each ``[3, h, w]``.

        Of a temporal step of several frames the first one.
        """

    @abstractmethod
    def blank_images(self, num_images: int) -> dict[str, Tensor]:
        """Images without meaning, as the family's processor returns them, each as large as the family makes them.

        Where images vary in size: of about a thousand visual tokens.
        """

    def blank_videos(self, num_videos: int, num_frames: int) -> dict[str, Tensor]:
        """The same of videos."""
        raise self._no_video()

    def prepare_videos(
        self, videos: Sequence[VideoSource], processor: Any, num_frames: int | None
    ) -> dict[str, Tensor]:
        """Videos -> ``pixel_values_videos`` and whatever else the family needs; see ``vzip.media.video``.

        Args:
            videos: files, or frames as images.
            processor: the checkpoint's.
            num_frames: taken of each; None: as many as the family takes.

        Raises:
            as ``read_inputs``, and as ``load_video``.
        """
        raise self._no_video()

    def video_texts(self, tensors: Mapping[str, Tensor]) -> list[str] | None:
        """What prompts have in place of each video's placeholder, with a placeholder for each of its runs.

        Args:
            tensors: from ``prepare_videos``.

        Returns:
            None: the placeholder itself.
        """
        return None

    def _no_video(self) -> UnsupportedModelError:
        return UnsupportedModelError(f"{type(self.model).__name__} {self.why_no_video}. {_TAKE_VIDEOS}")

    def prepare_images(
        self, images: Sequence[Image.Image], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        """Images -> ``pixel_values`` and whatever else the family needs; see ``vzip.media.images``."""
        return prepare_images(images, image_processor, preprocess)

    def prepare_among(
        self, images: Sequence[Image.Image], num_images: Sequence[int], image_processor: Any, preprocess: Preprocess
    ) -> dict[str, Tensor]:
        """The same for a family that shows an image otherwise where its prompt has several.

        Args:
            num_images: for each image how many its prompt has.
        """
        return self.prepare_images(images, image_processor, preprocess)

    def asked(
        self, visual: VisualInputs, compressor: Compressor, questions: Sequence[str] | None, processor: Any
    ) -> VisualInputs:
        """Images and videos with what a text-aware method reads of their questions; as they are for any other method.

        Args:
            visual: from ``read_inputs``.
            compressor: the method.
            questions: of each image, then of each video.
            processor: the checkpoint's, for its tokenizer; not needed where the method names a text model of its own.

        Raises:
            PromptError: no question, or an empty one.
            ConfigError, CheckpointError: no tokenizer, or a text model that cannot be loaded.
        """
        if not visual.shapes or not compressor.reads_text:
            return visual
        known = check_questions(compressor, questions, len(visual.shapes), "image or video")
        assert known is not None
        if compressor.text_encoder is not None:
            encoder = self._encoder_of(compressor)
            rows = {question: encoder.read(compressor.text(question)) for question in set(known)}
        else:
            tokenizer, embed = need_tokenizer(processor, compressor), self.embed_tokens
            device = execution_device(embed)
            rows = {each: read_text(compressor.text(each), tokenizer, embed, device) for each in set(known)}
        return replace(visual, texts=tuple(rows[question] for question in known))

    def _encoder_of(self, compressor: Compressor) -> TextEncoder:
        name = compressor.text_encoder
        assert name is not None
        if self.text_encoder is None or self.text_encoder.name != name:
            self.text_encoder = TextEncoder.load(name, execution_device(self.projector))
        return self.text_encoder

    def beside(
        self, vision: VisionOutput, compressor: Compressor, texts: Sequence[Tensor], num_crops: Sequence[int]
    ) -> VisionOutput:
        """The tower's output with what a text-aware method reads of these images' questions; else as it is."""
        if not compressor.reads_text:
            return vision
        if not texts:
            raise missing_questions(compressor)
        encoder = None if compressor.text_encoder is None else self._encoder_of(compressor)
        return beside(vision, compressor, texts, num_crops, encoder)

    def viewed(self, visual: VisualInputs, compressor: Compressor) -> VisualInputs:
        """What the method shows in place of the images and videos; see ``Compressor.view``."""
        shown = {
            n: compressor.view(value) if n.startswith("pixel_values") else value for n, value in visual.tensors.items()
        }
        return replace(visual, tensors=shown)

    def run_for(self, compressor: Compressor) -> TowerRun | None:
        """What runs the tower as the method needs it; None: as always."""
        return None

    def encode(
        self, visual: VisualInputs, compressor: Compressor, run: TowerRun | None = None, stage: Stage = no_stage
    ) -> list[VisualTokens]:
        """Images and videos -> visual tokens: tower, compressor, projector, packing.

        Args:
            visual: from ``read_inputs``; for a text-aware method from ``asked``.
            compressor: the method.
            run: runs a tower, as ``run_tower`` does, which it is by default.
            stage: a context for each stage by name (``tower``, ``selection``, ``projector``, ``splice``, a family's
                own), for who measures them.

        Returns:
            for each image, then for each video.
        """
        if compressor.reads_text and visual.shapes and not visual.texts:
            raise missing_questions(compressor)
        visual, run = self.viewed(visual, compressor), run or self.run_for(compressor)
        reads, num_images = of_tower(compressor.reads()), len(visual.images)
        of_images, of_videos = visual.texts[:num_images], visual.texts[num_images:]
        tokens: list[VisualTokens] = []
        for shapes, outputs, texts in (
            (visual.images, self.image_outputs, of_images),
            (visual.videos, self.video_outputs, of_videos),
        ):
            found: dict[int, VisualTokens] = {}
            for members, vision in outputs(visual, reads, run, stage) if shapes else ():
                asked = [texts[number] for number in members] if texts else []
                vision = self.beside(vision, compressor, asked, [shapes[number].num_crops for number in members])
                own = self._tokens(vision, [shapes[number] for number in members], compressor, stage)
                found |= zip(members, own, strict=True)
            tokens += [found[number] for number in range(len(shapes))]
        return tokens

    def _tokens(
        self, vision: VisionOutput, shapes: Sequence[VisionShape], compressor: Compressor, stage: Stage
    ) -> list[VisualTokens]:
        num_crops = [shape.num_crops for shape in shapes]
        # A run of a video has the tokens of its step, also where positions are counted anew.
        has_places = self.keeps_places or (self.writes_steps and shapes[0].kind == "video")
        joins = compressor.joins(shapes[0])
        if compressor.scope == "image" or joins:
            rows = vision.hidden[:, vision.first_stock_row :]
            if vision.project is not None and compressor.scope == "image":
                with stage("projector"):
                    rows = vision.project(rows)
            ends = list(itertools.accumulate(num_crops))
            wholes = []
            with stage("splice"):
                for shape, end in zip(shapes, ends, strict=True):
                    own = slice(end - shape.num_crops, end)
                    whole = self._whole(vision, rows, own, shape, self.whole_index(shape))
                    if joins:
                        project = None if compressor.scope == "image" else vision.project
                        whole = replace(whole, whole=shape.joined, project=project)
                    wholes.append(whole)
            if compressor.is_vanilla:  # nothing is selected: what is packed is what the unmodified model gets
                return [
                    VisualTokens(
                        whole.hidden[0],
                        torch.arange(whole.num_rows) if has_places else None,
                        None if whole.planes is None else whole.planes[0],
                    )
                    for whole in wholes
                ]
            with stage("selection"):
                made = [compressor(whole) for whole in wholes]
            if vision.project is not None and compressor.space == "tower":
                with stage("projector"):
                    made = [replace(one, tokens=vision.project(one.tokens)) for one in made]
            planes = [None if one.planes is None else one.planes[0] for one in made]
            return [
                VisualTokens(one.tokens[0], one.places[0], deeper).in_order()
                if has_places
                else VisualTokens(one.tokens[0], planes=deeper)
                for one, deeper in zip(made, planes, strict=True)
            ]
        with stage("selection"):
            compressed = compressor(vision)
        return self.projected(compressed, shapes, vision.project if compressor.space == "tower" else None, stage)

    def compress_image(self, visual: VisualInputs, compressor: Compressor) -> CompressedTokens:
        """What the compressor makes of one image's crops before the projector, where it needs nothing behind it.

        Args:
            visual: of one image, from ``read_inputs``.
            compressor: of ``scope="crop"`` and ``space="tower"``; of a family that ``projects_tokens``.
        """
        visual, reads = self.viewed(visual, compressor), of_tower(compressor.reads())
        ((_, vision),) = self.image_outputs(visual, reads, self.run_for(compressor))
        return compressor(vision)

    def projected(
        self,
        compressed: CompressedTokens,
        shapes: Sequence[VisionShape],
        project: Callable[[Tensor], Tensor] | None,
        stage: Stage = no_stage,
    ) -> list[VisualTokens]:
        """Crops' tokens through the projector, and packed by images (or videos).

        Args:
            compressed: of the crops of all of them, one after the other.
            shapes: of each.
            project: the projector; None: they are projected.
            stage: as of ``encode``.
        """
        num_crops, tokens = [shape.num_crops for shape in shapes], compressed.tokens
        has_places = self.keeps_places or (self.writes_steps and shapes[0].kind == "video")
        if project is not None:
            with stage("projector"):
                tokens = project(tokens)
        of_images: list[Tensor | None] = [None] * len(shapes)
        if compressed.planes is not None:
            of_images = [each.flatten(0, 1) for each in compressed.planes.split(num_crops)]
        with stage("splice"):
            if has_places:
                places = compressed.places.split(num_crops)
                parts = zip(shapes, tokens.split(num_crops), places, of_images, strict=True)
                return [self._placed(*part) for part in parts]
            kept = compressed.source_index.split(num_crops)
            return [
                VisualTokens(self.pack(shape, rows, own), planes=deeper)
                for shape, rows, own, deeper in zip(shapes, tokens.split(num_crops), kept, of_images, strict=True)
            ]

    def _placed(self, shape: VisionShape, tokens: Tensor, units: Tensor, planes: Tensor | None = None) -> VisualTokens:
        """An image's tokens, ``[num_crops, K, d_text]``, and newlines by their places; ``units [num_crops, K]``."""
        places = self.unit_places(shape, units.device).gather(1, units).flatten()
        rows, of_newlines = tokens.flatten(0, 1), self.newline_places(shape)
        if len(of_newlines):
            rows = torch.cat([rows, self.newline(rows).expand(len(of_newlines), -1)])
            places = torch.cat([places, of_newlines.to(places.device)])
        return VisualTokens(rows, places, planes).in_order()

    def _whole(
        self, vision: VisionOutput, rows: Tensor, own: slice, shape: VisionShape, index: Tensor | None
    ) -> VisionOutput:
        """One image (or video) as the unmodified model packs it, every signal packed alike; ``rows`` are projected."""
        first = vision.first_stock_row

        def packed(values: Tensor, newline: Tensor | None) -> Tensor:
            flat = values[own].flatten(0, 1)
            end = flat.new_zeros(flat.shape[1:]) if newline is None else newline
            return self.pack_whole(shape, flat, end, index)[None]

        signals = [*vision.signals]
        signals += [Signal(name) for name in ("attention", "keys") if getattr(vision, name) is not None]
        recorded = {s: packed(vision.read(s)[:, first:], None) for s in signals if s.name != "text"}
        if Signal("text") in vision.signals:  # of the question, and so of every crop of the image
            recorded[Signal("text")] = vision.signals[Signal("text")][own.start : own.start + 1]
        hidden = packed(rows, None if index is None else self.newline(rows))
        valid = None if vision.valid is None else packed(vision.valid[:, first:], None)
        planes = None if vision.planes is None else packed(vision.planes[:, first:], None)
        if index is not None:
            shown = (index >= 0).to(hidden.device)[None]
            valid = shown if valid is None else valid & shown
        return VisionOutput(
            hidden,
            False,
            (1, hidden.shape[1]),
            stock_offset=0,
            signals=recorded,
            valid=valid,
            whole=shape,
            planes=planes,
        )


def check_pixel_values(pixel_values: Tensor, num_dims: int, layout: str, name: str = "pixel_values") -> None:
    """Raises PromptError unless ``pixel_values`` has ``num_dims`` dimensions; ``layout`` says what they are."""
    if pixel_values.ndim != num_dims or 0 in pixel_values.shape[1:]:
        raise PromptError(
            f"{name} has shape {tuple(pixel_values.shape)}: this model takes {layout}, as its Hugging Face"
            " processor returns them."
        )
