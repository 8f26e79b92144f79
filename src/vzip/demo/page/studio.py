"""The model behind the page: opens files, draws what a method keeps, answers with and without compression."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vzip.analysis.kept import draw_kept, seen_image
from vzip.analysis.patch_attention import PatchAttention, patch_attention
from vzip.compressors.base import Compressor
from vzip.compressors.budget import TokenBudget
from vzip.compressors.controls import Identity
from vzip.errors import CheckpointError, ConfigError, ImageError, UnsupportedModelError
from vzip.media.images import load_image
from vzip.media.video import is_image, load_video
from vzip.methods import find_method, method_names
from vzip.models.chat.layout import message
from vzip.models.chat.session import ChatSession
from vzip.models.families import Adapter
from vzip.models.towers.cache import NewestTowerCache
from vzip.models.vlm import CompressedVlm
from vzip.option_files import split_of
from vzip.pruners.base import Pruner

MIN_TOKENS = 16
CACHE_GIB = 1.0  # of the tower's outputs: some 500 images of CLIP ViT-L/14 at 336 px in float16


def slider_step(most: int, chosen: int) -> int:
    """The longest step, up to ``MIN_TOKENS``, that reaches both from ``MIN_TOKENS``: 1 of a tower with 729 patches."""
    both = math.gcd(most - MIN_TOKENS, chosen - MIN_TOKENS)
    return next(step for step in range(MIN_TOKENS, 0, -1) if both % step == 0)


class SupersededError(Exception):
    """Somebody no longer waits for this answer."""


@dataclass(frozen=True)
class Medium:
    """An image or video that a visitor has opened.

    Attributes:
        kind: ``image`` or ``video``.
        inputs: what the processor made of it, in the model's type and on its device.
        seen: the image as the vision tower sees it; of a video a frame from its middle.
        image: upright RGB; None for a video.
    """

    kind: Literal["image", "video"]
    inputs: Mapping[str, Tensor]
    seen: Image.Image
    image: Image.Image | None = None


@dataclass(frozen=True)
class Answer:
    """An answer, and what it cost.

    Attributes:
        text: so far.
        num_visual_tokens: that entered the language model.
        first_token_ms: from the tower's output to the first token: selection, projector, prefill. None: not there yet.
        kv_bytes: of the keys and values of the whole prompt, measured at the first token.
    """

    text: str = ""
    num_visual_tokens: int = 0
    first_token_ms: float | None = None
    kv_bytes: int = 0


@dataclass
class _Side:
    """What a dialogue needs of a wrapper (``vzip.models.chat.session.Vlm``), for one thing prepared already."""

    model: PreTrainedModel
    adapter: Adapter
    processor: ProcessorMixin | None
    device: torch.device
    compressor: Compressor
    pruner: Pruner | None
    inputs: dict[str, Tensor]

    def preprocess_images(self, images: Sequence[Any], num_images: Sequence[int] | None = None) -> dict[str, Tensor]:
        return self.inputs

    def preprocess_videos(self, videos: Sequence[Any]) -> dict[str, Tensor]:
        return self.inputs


class Studio:
    """One model for all visitors, who take turns.

    The vision tower's outputs are kept: another budget or method of the same image does not run it again, unless the
    method acts inside the tower or reads a signal of it that nobody has asked for yet.

    Args:
        vlm: the model; its compressor is not used, its pruner on the compressed side alone.
        system_prompt: of every dialogue.
        max_new_tokens: of an answer.
        cache_gib: memory for the tower's outputs.

    Attributes:
        shape: of an image of one crop, by which tokens are counted.
        methods: names of all methods that the model can take.
        max_tokens: visual tokens of a crop (of a large image, where they vary in size) without compression.
    """

    def __init__(
        self,
        vlm: CompressedVlm,
        system_prompt: str | None = None,
        max_new_tokens: int = 64,
        cache_gib: float = CACHE_GIB,
    ) -> None:
        self._vlm, self._system_prompt, self._max_new_tokens = vlm, system_prompt, max_new_tokens
        self._lock = threading.Lock()
        self.cache = vlm.adapter.tower_cache = NewestTowerCache(cache_gib)
        (shape,) = vlm.adapter.read_inputs(**vlm.adapter.blank_images(1)).images
        self.shape, self.max_tokens = shape, shape.num_patches
        self.methods = tuple(name for name in method_names() if self._can_take(name))

    @property
    def takes_videos(self) -> bool:
        """Whether the model does."""
        return self._vlm.adapter.has_video

    def _can_take(self, name: str) -> bool:
        try:
            self._wrapped(self.compressor(name, max(2, min(64, self.max_tokens // 2))))
        except (ConfigError, UnsupportedModelError, CheckpointError):
            return False
        return True

    def compressor(self, method: str, num_tokens: int) -> Compressor:
        """A method at a budget of each crop; ConfigError where it has no such budget."""
        split = split_of(num_tokens)
        budget = TokenBudget(split["num_dominant"], split["num_contextual"])
        compressor: Compressor = find_method(method).build(budget)
        return compressor

    def _wrapped(self, compressor: Compressor) -> CompressedVlm:
        """The same model with another compressor; ConfigError if it does not fit."""
        own = copy.copy(self._vlm)
        own.compressor = compressor
        return own

    def open_file(self, path: Path) -> Medium:
        """Reads an image or a video, which is not needed any more then.

        Raises:
            ImageError: an image that cannot be used, or a file that is neither.
            VideoError, UnsupportedModelError, MissingPackageError: as ``load_video`` and ``read_inputs``.
        """
        if is_image(path):
            return self.open_image(load_image(path))
        if not self.takes_videos:
            raise ImageError(f"{path}: no image that can be read, and this model takes images only. Choose another.")
        frame = load_video(path, 3)[1]
        with self._lock:
            return Medium("video", self._moved(self._vlm.preprocess_videos([path])), frame)

    def open_image(self, image: Image.Image) -> Medium:
        """The same for an image that is read already."""
        with self._lock:
            inputs = self._vlm.preprocess_images([image])
            processor: Any = self._vlm.processor
            visual = self._vlm.adapter.read_inputs(**inputs)
            (shape,) = visual.images
            crop = self._vlm.adapter.shown(visual)[self._vlm.adapter.overview_index(shape)]
            seen = seen_image(crop, processor.image_processor, shape.grid)
            return Medium("image", self._moved(inputs), seen, image)

    def _moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pixels in the type in which ``draw_kept`` has them: overlay and answers then find the same tower output."""
        device, dtype = self._vlm.device, self._vlm.model.dtype
        return {n: value.to(device, dtype if n.startswith("pixel") else None) for n, value in inputs.items()}

    def overlay(
        self,
        medium: Medium,
        compressor: Compressor,
        question: str | None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Image.Image | None:
        """What the method keeps and merges; None where it depends on a question and there is none.

        Raises:
            SupersededError: it is no longer wanted once it is its turn.
            as ``draw_kept``.
        """
        if compressor.reads_text and question is None:
            return None
        with self._lock:
            if not is_wanted():
                raise SupersededError
            return draw_kept(self._wrapped(compressor), medium.inputs, question)

    def attention(self, medium: Medium) -> PatchAttention:
        """How the patches of an image attend to each other.

        Raises:
            ImageError: a video.
            as ``patch_attention``.
        """
        if medium.image is None:
            raise ImageError("The attention of a patch is shown for images, and this is a video.")
        with self._lock:
            return patch_attention(self._vlm, medium.image)

    def answer(
        self,
        medium: Medium,
        history: Sequence[tuple[str, str]],
        question: str,
        compressor: Compressor | None,
        tell: Callable[[Answer], None] = lambda answer: None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Answer:
        """Answers, greedily.

        Args:
            medium: what is asked about.
            history: earlier questions and answers about it.
            question: the next.
            compressor: the method; None: vanilla, without a pruner too.
            tell: called with the answer so far, each time there is more of it.
            is_wanted: asked before each token.

        Raises:
            SupersededError: it is no longer wanted.
            PromptError, ConfigError: as ``ChatSession.ask``.
        """
        with self._lock:
            if not is_wanted():
                raise SupersededError
            chat, started = self._begun(medium, history, compressor)
            encoded = [*chat.visuals, *chat.pending][0]
            answer = Answer(num_visual_tokens=encoded.num_visual_tokens)

            def on_token() -> None:
                nonlocal answer
                if not is_wanted():
                    raise SupersededError
                if answer.first_token_ms is None:
                    milliseconds = 1000 * (time.perf_counter() - started)
                    answer = replace(answer, first_token_ms=milliseconds, kv_bytes=chat.cache_bytes)
                    tell(answer)

            def on_text(text: str) -> None:
                nonlocal answer
                answer = replace(answer, text=answer.text + text)
                tell(answer)

            text = chat.ask(question, max_new_tokens=self._max_new_tokens, on_text=on_text, on_token=on_token)
            return replace(answer, text=text)

    def _begun(
        self, medium: Medium, history: Sequence[tuple[str, str]], compressor: Compressor | None
    ) -> tuple[ChatSession, float]:
        """A dialogue as it stands before a question, and when it was begun, the tower's run left out."""
        vlm = self._wrapped(Identity() if compressor is None else compressor)
        pruner = None if compressor is None else vlm.pruner
        inputs = dict(medium.inputs)
        side = _Side(vlm.model, vlm.adapter, vlm.processor, vlm.device, vlm.compressor, pruner, inputs)
        while True:
            num_runs, started = self.cache.num_misses, time.perf_counter()
            chat = ChatSession(side, self._system_prompt)
            if medium.image is None:
                chat.add_video([])
            else:
                chat.add_image(medium.image)
            if self.cache.num_misses == num_runs or self.cache.max_gib == 0:
                break  # the tower's output was there: what is timed is the method
        for number, (question, answer) in enumerate(history):
            shown = chat.pending if number == 0 else []
            chat.messages += [message("user", question, shown), message("assistant", answer)]
        if history:
            chat.visuals, chat.pending = chat.pending, []
        return chat, started
