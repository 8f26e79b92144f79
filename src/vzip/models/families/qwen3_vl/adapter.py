"""Qwen3-VL: Qwen2.5-VL without windows, and with DeepStack.

What earlier blocks of the vision tower saw is added to the visual tokens behind the language model's first layers, a
*plane* for each of these blocks. Planes follow the selection: of a token that is kept they are its own, of a contextual
token they are merged as its row is.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration

from vzip.errors import ConfigError
from vzip.ops.uncompiled import uncompiled
from vzip.pruners.base import Pruner

from ..qwen2_5_vl.adapter import Qwen2_5VlAdapter
from ..qwen2_5_vl.videos import Qwen3VideoRules


class Mergers(nn.ModuleList):
    """The mergers of a vision tower, as one module."""

    def forward(self, rows: Tensor) -> Tensor:
        """What they make of a merge unit's patches, ``[4, width]``, beside each other: ``[1, mergers * d_text]``."""
        return torch.cat([merger(rows) for merger in self], dim=-1)


class Qwen3VlAdapter(Qwen2_5VlAdapter):
    """Images, and videos of a run of placeholders, with its time before it, for each temporal step."""

    # ``step_times``, which ``prepare_videos`` adds to what the processor returns, are for who writes the prompt.
    input_names = (*(name for name in Qwen2_5VlAdapter.input_names if name != "second_per_grid_ts"), "step_times")
    published_name = "Qwen3-VL"
    model_class: ClassVar[type[PreTrainedModel]] = Qwen3VLForConditionalGeneration
    has_planes = True
    writes_steps = True
    video_rules = Qwen3VideoRules

    def video_texts(self, tensors: Mapping[str, Tensor]) -> list[str]:
        times = tensors["step_times"].tolist()
        ends = list(itertools.accumulate(steps for steps, _, _ in tensors["video_grid_thw"].tolist()))
        written = [f"<{seconds:.1f} seconds>{self.written_video}" for seconds in times]
        return ["".join(written[start:end]) for start, end in itertools.pairwise([0, *ends])]

    @classmethod
    def check_pruner(cls, config: Any, pruner: Pruner) -> None:
        super().check_pruner(config, pruner)
        num_planes = len(config.vision_config.deepstack_visual_indexes)
        if pruner.makes_rows and pruner.cuts[0] < num_planes:
            raise ConfigError(
                f"pruner={pruner}: makes new tokens at the input of layer {pruner.cuts[0]}, but {cls.published_name}"
                f" adds to each visual token what the vision tower saw, behind the layers 0 to {num_planes - 1}, and of"
                f" a new one it saw nothing. Cut at layer {num_planes} or later (pruner.layers=[{num_planes - 1},...]),"
                " or use a pruner that only drops."
            )

    @property
    def projector(self) -> nn.Module:
        """The merger, and those that make planes."""
        tower = self.vision_tower
        return Mergers([tower.get_submodule("merger"), *tower.get_submodule("deepstack_merger_list").children()])

    @contextmanager
    def language_context(self, visual_index: Tensor, planes: Tensor | None) -> Iterator[None]:
        """Hands the planes to the language model, whenever it reads a part of the prompt; see ``Adapter``.

        The model's own call takes no planes, so they are put among the arguments of the language model within it.
        """
        if planes is None:
            yield
            return
        is_visual, owner = visual_index >= 0, threading.get_ident()
        of_rows = planes.split(is_visual.sum(dim=1).tolist())

        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
            start = 0 if cache is None else int(cache.get_seq_length())
            own = is_visual[:, start : start + embeds.shape[1]]
            if threading.get_ident() != owner or not bool(own.any()):
                return None
            # With beams, each prompt several times over.
            repeats = len(embeds) // len(own)
            before, count = is_visual[:, :start].sum(dim=1).tolist(), own.sum(dim=1).tolist()
            parts = [rows[first : first + length] for rows, first, length in zip(of_rows, before, count, strict=True)]
            added = torch.cat([part for part in parts for _ in range(repeats)])
            mask = own.repeat_interleave(repeats, dim=0).to(embeds.device)
            width = embeds.shape[2]
            return args, {**kwargs, "visual_pos_masks": mask, "deepstack_visual_embeds": added.split(width, dim=-1)}

        handle = self.language_model.register_forward_pre_hook(add, with_kwargs=True)
        try:
            with uncompiled():  # compiled before, it would go on without the hook
                yield
        finally:
            handle.remove()
