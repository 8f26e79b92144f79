"""Parts of a model under ``torch.compile``: from pixels to visual tokens, the language model on a prompt, and on one
more token.

A compiled graph is of fixed shapes. So prompts are padded on the left to one of a few lengths (``bucket``), a batch is
filled up to a power of two with copies of its last prompt, and the cache is one of fixed length. Generation itself is
transformers': its ``generate`` prepares processors and stopping criteria and is given our loop as ``custom_generate``,
since its own static cache is as long as each call needs (one graph a length), compiles decoding alone, on GPUs alone,
and keeps what it compiled as an attribute of the model.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn import functional
from transformers import PreTrainedModel, StaticCache

from vzip.compressors.base import Compressor
from vzip.errors import ConfigError, MissingPackageError, nearest
from vzip.keys import raise_all
from vzip.pruners.base import Pruner
from vzip.pruners.context import generation_values

from .devices import has_placement_hooks
from .families import Adapter, VisualInputs
from .families.places import VisualTokens
from .splice import PreparedInputs

Part = Literal["tower", "prefill", "decode"]
PARTS: tuple[Part, ...] = get_args(Part)
BACKEND = "inductor"  # of torch.compile
_OF_LANGUAGE: tuple[Part, ...] = ("prefill", "decode")
_MAX_GRAPHS = 256  # of one function; Dynamo's own limit of 8 is fewer than there are buckets and batch sizes
_SINGLE = ("num_beams", "num_beam_groups", "num_return_sequences")
_NOT_COMPILED = ("return_dict_in_generate", "cache_implementation", "penalty_alpha", "dola_layers", "constraints")


def bucket(length: int) -> int:
    """The length that a sequence is padded to: a multiple of 16, with four steps to each doubling.

    16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320 ...: beyond 64 tokens at most a quarter is padding.
    """
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return max(1, -(-length // step)) * step


def filled(num_prompts: int) -> int:
    """The batch that so many prompts are computed in: the next power of two."""
    return 1 << (num_prompts - 1).bit_length()


def check_parts(parts: Sequence[str] | str | None) -> tuple[Part, ...]:
    """What is to be compiled, in the order of the pipeline.

    Args:
        parts: names, or one text of names with a plus between; None: nothing.

    Raises:
        ConfigError: an unknown or repeated name.
    """
    names = tuple(part for part in parts.split("+") if part) if isinstance(parts, str) else tuple(parts or ())
    wrong = [name for name in names if name not in PARTS]
    if wrong or len(set(names)) < len(names):
        hint = nearest(str(wrong[0]), PARTS) if wrong else ""
        raise ConfigError(
            f"model.compile={'+'.join(map(str, names))}: must be any of {', '.join(PARTS)}, each once{hint}; null"
            " compiles nothing."
        )
    return tuple(part for part in PARTS if part in names)


def check_compiles(
    parts: Sequence[Part],
    family: type[Adapter],
    config: Any,
    compressor: Compressor,
    *,
    pruner: Pruner | None = None,
    attn_implementation: str | None = None,
    quantization: str | None = None,
) -> None:
    """Refuses what cannot be compiled; no weight need be there.

    Args:
        parts: from ``check_parts``.
        family: the model's.
        config: its configuration.
        compressor: the method.
        pruner, attn_implementation, quantization: as for ``load_vlm``.

    Raises:
        ConfigError: naming everything that stands against it.
    """
    asked = [part for part in parts if part in _OF_LANGUAGE]
    shown, problems = f"model.compile={'+'.join(parts)}", []
    if "tower" in parts:
        try:
            family.check_graph(compressor)
        except ConfigError as error:
            problems.append(f"model.{error}")
    if not asked:
        raise_all(problems)
        return
    without = f"Take {' and '.join(asked)} out of model.compile"
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    is_sliding = kinds or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True))
    if pruner is not None:
        problems.append(
            f"{shown} with pruner={type(pruner).__name__}: a pruner drops tokens through hooks, which are no part of a"
            f" graph. {without}, or set pruner=none."
        )
    if family.has_planes:
        problems.append(
            f"{shown}: the language model of {family.model_class.__name__} takes rows of the vision tower at deeper"
            f" layers through hooks, which are no part of a graph. {without}."
        )
    if attn_implementation not in (None, "sdpa", "eager"):
        problems.append(
            f"{shown} with model.attn_implementation={attn_implementation}: a prompt padded to a fixed length needs a"
            " mask of its own, which this kernel does not take. Set attn_implementation=sdpa."
        )
    if quantization is not None:
        problems.append(
            f"{shown} with model.quantization={quantization}: bitsandbytes' layers are no part of a graph. {without},"
            " or set quantization=null."
        )
    if is_sliding:
        problems.append(
            f"{shown}: the language model attends within a window (sliding_window={text.sliding_window}), and the"
            f" cache of fixed length is of layers that see everything. {without}."
        )
    raise_all(problems)


def check_spread(parts: Sequence[Part], model: PreTrainedModel) -> None:
    """Raises ConfigError for a model whose weights accelerate moves between devices, which a graph cannot."""
    if parts and has_placement_hooks(model):
        raise ConfigError(
            f"model.compile={'+'.join(parts)}: the model is spread over devices, or parts of it are parked elsewhere,"
            " and hooks move what a graph would have to hold. Put it on one device (model.device_map=cuda:0), or take"
            " model.compile out."
        )


def check_compiler(parts: Sequence[Part], device: torch.device) -> None:
    """Raises MissingPackageError where torch.compile lacks a compiler of its own on this machine."""
    if not parts:
        return
    of_cpu = ("clang++",) if sys.platform == "darwin" else ("g++",)  # the one that torch looks for
    kind, usual = ("C++", of_cpu) if device.type == "cpu" else ("C", ("gcc", "clang", "cc"))
    named = os.environ.get("CXX" if device.type == "cpu" else "CC")
    if sys.platform != "win32" and not any(map(shutil.which, [named] if named else usual)):
        raise MissingPackageError(
            f"model.compile={'+'.join(parts)}: torch.compile needs a {kind} compiler, and {named or usual[0]} is not"
            " found. Install it, or take model.compile out."
        )


def check_generation(parts: Sequence[Part], settings: Mapping[str, Any], of_model: Any) -> None:
    """Raises ConfigError for kinds of generation that the compiled loop does not do, all at once.

    Args:
        parts: from ``check_parts``.
        settings, of_model: see ``generation_values``.
    """
    value = generation_values(settings, of_model)
    problems = [f"{name}={value(name)}: must be 1" for name in _SINGLE if (value(name) or 1) != 1]
    problems += [f"{name}={value(name)}: must be left out" for name in _NOT_COMPILED if value(name)]
    if problems:
        raise ConfigError(
            f"generate({'; '.join(problems)}) with model.compile={'+'.join(parts)}. Change it, or take prefill and"
            " decode out of model.compile."
        )


@contextmanager
def many_graphs(part: Part, of: str = "") -> Iterator[None]:
    """Lets a function have as many graphs as there are shapes, where torch would stop at 8.

    Args:
        part: that the function is.
        of: what else tells what is compiled, for messages.

    Raises:
        ConfigError: more shapes than may be, or something that no graph can hold.
    """
    try:
        with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS, accumulated_recompile_limit=8 * _MAX_GRAPHS):
            yield
    except torch._dynamo.exc.FailOnRecompileLimitHit as error:
        raise ConfigError(
            f"model.compile: {part} met more than {_MAX_GRAPHS} shapes, and each is a graph of its own: of tower the"
            f" images of a pass, how each is cut, and for a text-aware method their questions' lengths. Take {part} out"
            " of model.compile."
        ) from error
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError, GuardOnDataDependentSymNode) as error:
        what = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"model.compile: {part}{of} is no single graph ({what}). Take {part} out of model.compile."
        ) from error


class CompiledEncoder:
    """``Adapter.encode`` as one graph for each method and shape of images.

    Args:
        adapter: whose images are encoded.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._run = torch.compile(adapter.encode, fullgraph=True, dynamic=False, backend=BACKEND)

    def __call__(self, visual: VisualInputs, compressor: Compressor) -> list[VisualTokens]:
        """As ``Adapter.encode``.

        Raises:
            ConfigError: a method that does what no graph can hold.
        """
        with many_graphs("tower", f" with compressor={type(compressor).__name__}"):
            tokens: list[VisualTokens] = self._run(visual, compressor)
        return tokens


@dataclass
class Reading:
    """A batch that the language model has read so far, each prompt to the last token given.

    Attributes:
        logits: ``[num_prompts, vocabulary]`` of the token that comes next; valid until the next step.
        cache: of the filled batch.
        allowed: bool ``[rows, cache length]``, which of its tokens may be attended to.
        position_ids: ``[..., rows, 1]`` of the last token.
        length: tokens in the cache, padding counted.
        num_prompts: rows that were given; the others are copies.
    """

    logits: Tensor
    cache: StaticCache
    allowed: Tensor
    position_ids: Tensor
    length: int
    num_prompts: int


class CompiledLanguageModel:
    """A language model that reads prompts, and then token after token, in graphs of fixed shapes.

    Args:
        model: Hugging Face's.
        embed_tokens: its text embedding.
        parts: ``prefill`` and ``decode``, or one of them; the other runs as it is, on the same cache.
    """

    def __init__(self, model: PreTrainedModel, embed_tokens: nn.Module, parts: Sequence[Part]) -> None:
        self._model, self._embed, self._parts = model, embed_tokens, parts
        self._prefill, self._decode = self._compiled("prefill"), self._compiled("decode")
        # The last batch's cache, since a GPU's recorded graph holds for these very addresses.
        self._spare: list[StaticCache] = []

    def _compiled(self, part: Part) -> Callable[..., Tensor]:
        if part not in self._parts:
            return self._read
        # Recorded as a CUDA graph: a step of one token is bound by the launches.
        is_recorded = part == "decode" and BACKEND == "inductor" and self._model.device.type == "cuda"
        mode = "reduce-overhead" if is_recorded else None
        compiled: Callable[..., Tensor] = torch.compile(
            self._read, fullgraph=True, dynamic=False, backend=BACKEND, mode=mode
        )
        return compiled

    def _read(self, embeds: Tensor, mask: Tensor, position_ids: Tensor, cache: StaticCache) -> Tensor:
        output = self._model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def begin(self, prepared: PreparedInputs, num_new_tokens: int) -> Reading:
        """Reads the prompts, which are padded on the left.

        Args:
            prepared: of at least one prompt.
            num_new_tokens: that may follow.
        """
        num_prompts, length = prepared.attention_mask.shape
        padded = bucket(length) if "prefill" in self._parts else length
        rows = torch.arange(filled(num_prompts), device=prepared.inputs_embeds.device).clamp(max=num_prompts - 1)
        missing = padded - length
        embeds = functional.pad(prepared.inputs_embeds[rows], (0, 0, missing, 0))
        position_ids = functional.pad(prepared.position_ids[..., rows, :], (missing, 0)).contiguous()
        cache = self._cache(len(rows), bucket(padded + num_new_tokens))
        shown = functional.pad(prepared.attention_mask[rows].bool(), (missing, 0))
        allowed = functional.pad(shown, (0, cache.layers[0].max_cache_len - padded))
        column = torch.arange(allowed.shape[1], device=allowed.device)
        own = column[:padded, None]
        # Padding attends to itself: a softmax over nothing would be NaN, and enter the cache.
        mask = (allowed[:, None, None] & (column <= own)) | (column == own)
        with many_graphs("prefill"):
            logits = self._prefill(embeds, self._as_taken(mask), position_ids, cache)
        return Reading(logits[:num_prompts], cache, allowed, position_ids[..., -1:], padded, num_prompts)

    def go_on(self, reading: Reading, ids: Tensor) -> None:
        """Reads one more token of each prompt, int64 ``[num_prompts]``; ``reading`` then tells of the next one."""
        num_rows = len(reading.allowed)
        ids = functional.pad(ids, (0, num_rows - reading.num_prompts))  # what copies read matters to nobody
        reading.allowed[:, reading.length] = True
        reading.position_ids = reading.position_ids + 1
        mask = self._as_taken(reading.allowed[:, None, None])
        with many_graphs("decode"):
            logits = self._decode(self._embed(ids[:, None]), mask, reading.position_ids, reading.cache)
        reading.logits = logits[: reading.num_prompts]
        reading.length += 1

    def end(self, reading: Reading) -> None:
        """Keeps the cache's memory for the next batch of this shape."""
        self._spare[:] = [reading.cache]

    def _as_taken(self, allowed: Tensor) -> Tensor:
        """The mask as the attention's kernel takes it."""
        if self._model.config.get_text_config()._attn_implementation != "eager":
            return allowed
        dtype = self._model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )

    def _cache(self, num_rows: int, length: int) -> StaticCache:
        """An empty cache; taken out of its place, so that no two threads have it."""
        while self._spare:
            kept = self._spare.pop()
            keys = kept.layers[0].keys
            if keys is not None and (keys.shape[0], keys.shape[2]) == (num_rows, length):
                kept.reset()
                return kept
        text, model = self._model.config.get_text_config(), self._model
        cache = StaticCache(config=text, max_cache_len=length)
        num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        cache.early_initialization(num_rows, num_heads, head_dim, model.dtype, model.device)
        return cache

    def generating(self, prepared: PreparedInputs, num_new_tokens: int, streamer: Any) -> Callable[..., Tensor]:
        """What ``generate(custom_generate=)`` takes: one sequence a prompt, greedy or drawn."""

        def run(
            _model: Any,
            input_ids: Tensor,
            *,
            logits_processor: Callable[[Tensor, Tensor], Tensor],
            stopping_criteria: Any,
            generation_config: Any,
            **_: Any,
        ) -> Tensor:
            ends = any(hasattr(criteria, "eos_token_id") for criteria in stopping_criteria)
            unfinished = torch.ones(len(input_ids), dtype=torch.int64, device=input_ids.device)
            reading = self.begin(prepared, num_new_tokens)
            while True:
                # A copy: the next step of a recorded graph writes into the same memory.
                logits = reading.logits.to(dtype=torch.float32, device=input_ids.device, copy=True)
                scores = logits_processor(input_ids, logits)
                if generation_config.do_sample:
                    new = torch.multinomial(scores.softmax(dim=-1), num_samples=1).squeeze(1)
                else:
                    new = scores.argmax(dim=-1)
                if ends:
                    new = new * unfinished + _pad_token(generation_config) * (1 - unfinished)
                input_ids = torch.cat([input_ids, new[:, None]], dim=1)
                if streamer is not None:
                    streamer.put(new.cpu())
                unfinished = unfinished & ~stopping_criteria(input_ids, None)
                if not bool(unfinished.any()):
                    break
                self.go_on(reading, new)
            self.end(reading)
            if streamer is not None:
                streamer.end()
            return input_ids

        return run


def _pad_token(generation_config: Any) -> int:
    """What follows an answer that has ended, as ``generate`` chooses it."""
    ends = generation_config.eos_token_id
    first: int = ends[0] if isinstance(ends, list) else ends
    return first if generation_config.pad_token_id is None else int(generation_config.pad_token_id)
