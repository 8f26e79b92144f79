"""Running a pruner inside an unmodified language model, for one whole ``forward`` or ``generate``.

Pre-hooks on the text model and its layers hand later layers a shorter sequence with its own mask and positions; they
are removed when the call ends, whatever ends it. Every attention kernel and key-value cache works as it is: a layer
caches what it saw, and a decoded token attends to just that. What each layer's cache holds is remembered as *stages*:
columns of the whole sequence, on the CPU, one stage for all layers from one cut to the next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import create_causal_mask

from vzip.errors import ConfigError, PromptError
from vzip.ops.uncompiled import uncompiled

from .base import Cut, Decoder, LayerInput, PositionEmbeddings, PromptState, Pruner

TEXT, PADDING = -1, -2  # in a visual_index


class PruningError(RuntimeError):
    """The language model did not run as a pruner needs it to, or a pruner broke its promise; no error of a user's."""


@dataclass(frozen=True)
class Stage:
    """What some layers hold of a batch of prompts, in the order of their cache; all on the CPU.

    Attributes:
        visual_index: int64 ``[B, W]``: -1 text, -2 padding, else the number of the image.
        column: int64 ``[B, W]``, where each token stood in the whole sequence; a new row stands where the token before
            it stood.
        shift: int64 ``[B, W]``, by how much each token's position id is below the one it came with.
    """

    visual_index: Tensor
    column: Tensor
    shift: Tensor

    @staticmethod
    def whole(visual_index: Tensor, start: int = 0) -> Stage:
        """Every token, as they stand from column ``start`` on."""
        column = torch.arange(start, start + visual_index.shape[1]).expand_as(visual_index)
        return Stage(visual_index, column, torch.zeros_like(visual_index))

    @property
    def mask(self) -> Tensor:
        """bool ``[B, W]``: not padding."""
        return self.visual_index != PADDING

    def __add__(self, other: Stage) -> Stage:
        parts = [torch.cat([mine, theirs], dim=1) for mine, theirs in zip(self.parts, other.parts, strict=True)]
        return Stage(*parts)

    def first(self, width: int) -> Stage:
        """Its first ``width`` columns."""
        return Stage(*(part[:, :width] for part in self.parts))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.visual_index, self.column, self.shift


class CacheStages:
    """What the layers of one key-value cache hold; goes with the cache from turn to turn of a dialogue.

    Attributes:
        stages: by the first layer that each is true of; empty: the cache is.
    """

    def __init__(self, num_cached: int = 0) -> None:
        """Of a cache of one prompt, of which every layer holds ``num_cached`` tokens."""
        self.stages: dict[int, Stage] = {}
        if num_cached:
            self.stages[0] = Stage.whole(torch.full((1, num_cached), TEXT))

    @property
    def is_pruned(self) -> bool:
        """Whether layers differ in what they hold."""
        return len(self.stages) > 1

    def of_layer(self, layer: int) -> Stage:
        """What a layer holds."""
        return self.stages[max(first for first in self.stages if first <= layer)]

    def crop(self, cache: Any, num_tokens: int) -> None:
        """Cuts one prompt's cache back to its first ``num_tokens`` tokens, whatever a layer holds of them.

        Also after a turn that failed half way, when some layers hold more than is remembered.
        """
        for first, stage in self.stages.items():
            self.stages[first] = stage.first(int((stage.column[0] < num_tokens).sum()))
        for index, layer in enumerate(cache.layers):
            kept = self.of_layer(index).column.shape[1] if self.is_pruned else num_tokens
            surplus = int(layer.get_seq_length()) - kept
            if surplus > 0:
                layer.crop(-surplus)


class PrunedRun:
    """One call of the language model; made by ``pruning``.

    Attributes:
        num_forwards: forwards of the text model that were seen from beginning to end.
        visual_schedule: for each image, then for each video, the visual tokens that each layer attended to.
        cache_lengths: for each prompt the tokens that each layer held after the prompt; measured.
    """

    def __init__(self, pruner: Pruner | None, decoder: Decoder, visual_index: Tensor, held: CacheStages) -> None:
        self.pruner = pruner
        self.decoder = decoder
        self.visual_index = visual_index.cpu()
        self.held = held
        self.cuts = () if pruner is None else pruner.cuts
        self.num_layers = len(decoder.layers)
        self.num_forwards = self.num_last_layers = 0
        self.visual_schedule: list[list[int]] = []
        self.cache_lengths: list[list[int]] = []
        self._step: _Forward | None = None
        self._thread = threading.get_ident()

    def check_forwards(self, expected: int) -> None:
        """Raises PruningError unless the text model and its last layer were seen to run so often.

        A compiled model passes hooks by without a word, and would answer as if nothing had been dropped.
        """
        if (self.num_forwards, self.num_last_layers) != (expected, expected):
            raise PruningError(
                f"{self.pruner}: {expected} forwards of the language model were expected, but its hooks saw"
                f" {self.num_forwards} and its last layer's {self.num_last_layers}. Is it compiled? The result is not"
                " that of this pruner."
            )

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Has the hooks in place while the context lasts; calls from other threads are not ours."""
        first = min([*self.cuts, *(layer for layer in self.held.stages if layer > 0), self.num_layers - 1])
        model = self.decoder.text_model
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._enter_model, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(self._leave_model).remove)
            for layer in range(max(first - 1, 0), self.num_layers):
                hook = self._enter_layer(layer)
                module = self.decoder.layers[layer]
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _enter_model(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        num_past = self.held.stages[0].column.shape[1] if self.held.stages else 0
        is_prompt = self.num_forwards == 0
        index = self.visual_index[:, num_past:] if is_prompt else torch.full((len(self.visual_index), 1), TEXT)
        if index.shape != embeds.shape[:2]:
            raise PruningError(
                f"{self.pruner}: the language model got {tuple(embeds.shape[:2])} tokens where {tuple(index.shape)}"
                " were expected; what kind of generation is this?"
            )
        if is_prompt:
            held = [] if cache is None else self._lengths(cache)
            stages = self.held.stages and [self.held.of_layer(layer).column.shape[1] for layer in range(len(held))]
            if held != (stages or [0] * len(held)):
                raise PruningError(f"{self.pruner}: the cache's layers hold {held} tokens; that is not known of it")
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(num_past, num_past + index.shape[1], device=embeds.device)[None]
        positions = positions.expand(*positions.shape[:-2], *index.shape)
        past = self.held.stages or {0: Stage.whole(index[:, :0])}
        step = _Forward(self, past, Stage.whole(index, num_past), embeds, positions, is_prompt)
        self._step, kwargs = step, {**kwargs, "position_ids": positions}
        if step.cuts:
            kwargs, step.added = self.decoder.split_added(kwargs, step.cuts[0])
        return args, kwargs

    def _enter_layer(self, layer: int) -> Any:
        def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != self._thread:
                return None
            if self._step is None:
                raise PruningError(f"{self.pruner}: a layer ran outside the language model")
            if layer == self.num_layers - 1:
                self.num_last_layers += 1
            return self._step.enter(layer, args, kwargs)

        return hook

    def _leave_model(self, _module: Any, _args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        step, self._step = self._step, None
        assert step is not None
        self.held.stages = {first: stage + step.own[first] for first, stage in step.past_of_all().items()}
        self.num_forwards += 1
        if self.num_forwards == 1:
            self._measure(step)

    def _measure(self, step: _Forward) -> None:
        """Holds what layers saw against the pruner's schedule and, where there is a cache, against its lengths."""
        stages = [self.held.of_layer(layer) for layer in range(self.num_layers)]
        widths = [stage.column.shape[1] for stage in stages]
        if step.cache is not None and (lengths := self._lengths(step.cache)) != widths:
            raise PruningError(f"{self.pruner}: layers cached {lengths} tokens instead of {widths}")
        self.cache_lengths = torch.stack([stage.mask.sum(dim=1) for stage in stages], dim=1).tolist()
        shown = [step.own[max(first for first in step.own if first <= layer)] for layer in range(self.num_layers)]
        num_images = int(self.visual_index.max()) + 1 if self.visual_index.numel() else 0
        counts = [torch.bincount(own.visual_index[own.mask] + 1, minlength=num_images + 1)[1:] for own in shown]
        self.visual_schedule = torch.stack(counts, dim=1).tolist()
        if self.pruner is None:
            return
        groups = [[number] for number in range(num_images)]
        if self.pruner.pooled:
            groups = [sorted({i for i in row.tolist() if i >= 0}) for row in step.own[0].visual_index]
        for group in groups:
            measured = [
                sum(self.visual_schedule[number][layer] for number in group) for layer in range(self.num_layers)
            ]
            promised = self.pruner.schedule(measured[0], self.num_layers) if measured[0] else measured
            if promised is not None and promised != measured:
                raise PruningError(f"{self.pruner}: layers attend to {measured} visual tokens, promised {promised}")

    def _lengths(self, cache: Any) -> list[int]:
        return [int(cache.get_seq_length(layer)) for layer in range(self.num_layers)]


class _Forward:
    """One forward of the text model.

    Attributes:
        own: the stages of the tokens computed now, by their first layer; ``PrunedRun.held`` has those before.
        added: by layer what belongs to its input, of all tokens; see ``Decoder.split_added``.
    """

    def __init__(
        self,
        run: PrunedRun,
        past: Mapping[int, Stage],
        whole: Stage,
        embeds: Tensor,
        positions: Tensor,
        is_prompt: bool,
    ) -> None:
        self.run, self.past = run, past
        self.own = {0: whole}
        self.embeds, self._ids, self.positions = embeds, positions, positions
        self.cache: Any = None
        self.cuts = run.cuts if is_prompt and bool((whole.visual_index >= 0).any()) else ()
        self.added: Mapping[int, Tensor] = {}
        self.bounds = {*self.cuts, *(first for first in past if first > 0)}
        # Of the stage that is being run: first layer (0: the model's own arguments hold), mask, position embeddings.
        self._first = 0
        self._mask: Tensor | None = None
        self._embeddings: PositionEmbeddings | None = None
        self._inputs: dict[int, tuple[Tensor, PositionEmbeddings]] = {}

    def past_of(self, layer: int) -> Stage:
        """What a layer held before."""
        return self.past[max(first for first in self.past if first <= layer)]

    def past_of_all(self) -> dict[int, Stage]:
        """What was held before, by the first layer of each stage that there is now."""
        return {first: self.past_of(first) for first in self.own}

    def enter(self, layer: int, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a layer gets instead of its arguments; None: these very ones."""
        hidden, self.cache = args[0], kwargs.get("past_key_values")
        if layer in self.added:
            hidden = hidden + self._rows_of(self.added[layer]).to(hidden)
        if layer in self.bounds:
            hidden = self._cross(layer, hidden, kwargs["position_embeddings"])
        embeddings = self._embeddings or kwargs["position_embeddings"]
        if layer + 1 in self.cuts:
            self._inputs = {layer: (hidden, embeddings)}
        if self._first == 0:
            return ((hidden, *args[1:]), kwargs) if layer in self.added else None
        # A row of position ids with gaps would be read as several packed sequences by flash attention.
        changed = {"attention_mask": self._mask, "position_ids": None, "position_embeddings": embeddings}
        return (hidden, *args[1:]), {**kwargs, **changed}

    def _rows_of(self, whole: Tensor) -> Tensor:
        """Of ``[B, L, d_text]`` of all tokens those that are left, in their places; padding has zeros."""
        own = self.own[self._first]
        place = (own.column - self.own[0].column[:, :1]).masked_fill(~own.mask, 0).to(whole.device)
        rows = whole[torch.arange(len(whole), device=whole.device)[:, None], place]
        return rows.masked_fill(~own.mask.to(whole.device)[..., None], 0)

    def _cross(self, layer: int, hidden: Tensor, stock: PositionEmbeddings) -> Tensor:
        """Into the stage that begins at this layer; returns the layer's input."""
        before, own = self._first, self.own[self._first]
        old_shift = self.past_of(before).shift[:, -1:]
        if layer in self.cuts:
            self._inputs[layer] = (hidden, self._embeddings or stock)
            cuts = [self._cut(layer, row, hidden[row]) for row in range(len(hidden))]
            if any(cut is not None for cut in cuts):
                hidden, own = self._take(cuts, hidden, own)
        new_shift = self.past_of(layer).shift[:, -1:]
        past = self.past_of(layer)
        moved = new_shift - old_shift if new_shift.numel() else torch.zeros(len(hidden), 1, dtype=torch.int64)
        if bool(moved.any()):
            own = Stage(own.visual_index, own.column, own.shift + moved)
            self.positions = self.positions - moved.to(self.positions.device)
        self.own[layer] = own
        self._first = layer
        self._embeddings = self.run.decoder.rotary(hidden, self.positions.to(hidden.device))
        mask = torch.cat([past.mask, own.mask], dim=1)
        self._mask = create_causal_mask(
            self.run.decoder.config,
            hidden,
            None if bool(mask.all()) else mask.to(hidden.device),
            self.cache,
            layer_idx=layer,
        )
        return hidden

    def _cut(self, layer: int, row: int, hidden: Tensor) -> Cut | None:
        """What the pruner makes of a prompt, its index on the CPU; None: nothing is dropped or moved."""
        own, pruner = self.own[self._first], self.run.pruner
        assert pruner is not None
        real = own.mask[row].nonzero()[:, 0]
        visual = own.visual_index[row, real]
        if not bool((visual >= 0).any()):
            return None
        first = self.own[0].mask[row].nonzero()[:, 0]
        device = hidden.device
        state = PromptState(
            layer=layer,
            decoder=self.run.decoder,
            hidden=hidden[real.to(device)],
            visual_index=visual.to(device),
            embeds=self.embeds[row, first.to(self.embeds.device)].to(device),
            embeds_visual_index=self.own[0].visual_index[row, first].to(device),
            text=(visual == TEXT).nonzero()[:, 0].to(device),
            images=[(visual == i).nonzero()[:, 0].to(device) for i in visual[visual >= 0].unique().tolist()],
            read_layer=lambda wanted: self._layer_input(layer, wanted, row, real),
        )
        cut = pruner.cut(state)
        index = cut.index.cpu()
        num_new = 0 if cut.new_rows is None else len(cut.new_rows)
        if len(index) == 0 or index[-1] != len(real) - 1 or index.min() < -num_new or index.max() >= len(real):
            raise PruningError(f"{pruner}: of {len(real)} tokens {index.tolist()} were chosen; the last must stay last")
        text_left = int((visual[index[index >= 0]] == TEXT).sum())
        if text_left != len(state.text):
            raise PruningError(
                f"{pruner}: keeps {text_left} of {len(state.text)} tokens of text; a pruner drops visual tokens alone"
            )
        if num_new and (cut.positions != "repacked" or cut.new_visual_index is None):
            raise PruningError(f"{pruner}: new rows need positions='repacked' and a new_visual_index")
        if cut.positions == "original" and torch.equal(index, torch.arange(len(real))):
            return None
        return Cut(index, cut.new_rows, cut.new_visual_index, cut.positions)

    def _layer_input(self, cut: int, wanted: int, row: int, real: Tensor) -> LayerInput:
        """What a layer gets, or got, of one prompt."""
        hidden, (cos, sin) = self._inputs[wanted]
        index = real.to(hidden.device)
        own = hidden[row : row + 1, index]
        embeddings = tuple(part.expand(*part.shape[:-3], len(hidden), -1, -1) for part in (cos, sin))
        cos, sin = (part[..., row : row + 1, :, :][..., index.to(part.device), :] for part in embeddings)
        past = self.past_of(wanted)
        earlier = past.mask[row].nonzero()[:, 0]
        if self.cache is not None and wanted < cut:  # it has run already
            columns = torch.cat([earlier, past.column.shape[1] + real])
            return LayerInput(own, (cos, sin), self._cached(wanted, row, columns))
        keys = self.run.decoder.keys(wanted, own, (cos, sin))[0]
        if len(earlier):
            keys = torch.cat([self._cached(wanted, row, earlier).to(keys.device), keys], dim=1)
        return LayerInput(own, (cos, sin), keys)

    def _cached(self, layer: int, row: int, columns: Tensor) -> Tensor:
        keys: Tensor = self.cache.layers[layer].keys[row]
        return keys[:, columns.to(keys.device)]

    def _take(self, cuts: Sequence[Cut | None], hidden: Tensor, own: Stage) -> tuple[Tensor, Stage]:
        """The rows that go on, padded anew, and what they are; ``positions`` follow them."""
        # Padding stays on the side where it is; where there is none, as for generation.
        mask = own.mask
        is_right = bool((~mask[:, -1]).any()) and bool(mask[:, 0].all())
        taken: tuple[list[Tensor], ...] = ([], [], [], [], [])
        for row, cut in enumerate(cuts):
            real = mask[row].nonzero()[:, 0]
            cut = Cut(torch.arange(len(real))) if cut is None else cut
            is_new = cut.index < 0
            old = cut.index.clamp(min=0)
            source = real[old]
            tokens = hidden[row, source.to(hidden.device)]
            index = own.visual_index[row, source]
            column = own.column[row, source].masked_fill(is_new, -1).cummax(dim=0).values.clamp(min=0)
            shift = own.shift[row, source]
            behind = torch.where(is_new, source.masked_fill(is_new, -1).cummax(dim=0).values.clamp(min=0), source)
            place = self.positions[..., row, behind.to(self.positions.device)]
            if cut.new_rows is not None and cut.new_visual_index is not None:
                chosen = -1 - cut.index[is_new]
                tokens = tokens.masked_scatter(
                    is_new.to(tokens.device)[:, None], cut.new_rows[chosen.to(tokens.device)].to(tokens)
                )
                index = index.masked_scatter(is_new, cut.new_visual_index.cpu()[chosen])
            if cut.new_rows is not None and self.added:
                raise PruningError(f"{self.run.pruner}: has new rows, to which nothing of later layers belongs")
            if cut.positions == "repacked" and self.positions.ndim == 2:
                place = self.positions[row, real[0]] + torch.arange(len(cut.index), device=place.device)
                shift = self._ids[row].cpu()[column - self.own[0].column[row, 0]] - place.cpu()
            for parts, part in zip(taken, (tokens, index, column, shift, place), strict=True):
                parts.append(part)
        rows, indexes, columns, shifts, positions = taken

        def pad(parts: list[Tensor], value: int = 0) -> Tensor:
            return pad_sequence(
                parts, batch_first=True, padding_value=value, padding_side="right" if is_right else "left"
            )

        if positions[0].ndim == 1:
            self.positions = pad(positions)
        else:
            self.positions = pad([place.movedim(0, -1) for place in positions]).movedim(-1, 0)
        return pad(rows), Stage(pad(indexes, PADDING), pad(columns), pad(shifts))


@contextmanager
def pruning(
    pruner: Pruner | None, decoder: Decoder, visual_index: Tensor, held: CacheStages | None = None
) -> Iterator[PrunedRun]:
    """Has a pruner at work while one ``forward`` or ``generate`` runs; call ``check_forwards`` after it.

    Args:
        pruner: the method; None where only an earlier turn was pruned.
        decoder: the language model.
        visual_index: int64 ``[B, T]`` of the whole prompts: -1 text, -2 padding, else the number of the image.
        held: what the key-value cache given to the call holds; brought up to date by it. None: a new cache, or none.
    """
    run = PrunedRun(pruner, decoder, visual_index, CacheStages() if held is None else held)
    # Hooks are no reason for a compiled model to compile anew: it would go on without them.
    with uncompiled(), run.hooks():
        yield run


_SINGLE = ("num_beams", "num_return_sequences")
_UNSERVED = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "custom_generate", "penalty_alpha")
_CACHES = (None, "dynamic", "static")


def generation_values(settings: Mapping[str, Any], of_model: Any) -> Callable[[str], Any]:
    """Name -> the value with which ``generate`` would run, None where there is none.

    Args:
        settings: its arguments.
        of_model: the model's generation config, which holds where they say nothing.
    """
    chosen = settings.get("generation_config") or of_model
    return lambda name: settings[name] if settings.get(name) is not None else getattr(chosen, name, None)


def refuse_generation(settings: Mapping[str, Any], of_model: Any) -> None:
    """Raises ConfigError for kinds of generation that a pruner cannot serve, all at once; see ``generation_values``."""
    value = generation_values(settings, of_model)
    problems = [f"{name}={value(name)}: must be 1" for name in _SINGLE if (value(name) or 1) != 1]
    given = {name: value(name) for name in _UNSERVED if value(name) is not None}
    shown = {name: it if isinstance(it, int | str) else type(it).__name__ for name, it in given.items()}
    problems += [f"{name}={it}: must be left out" for name, it in shown.items()]
    if value("cache_implementation") not in _CACHES:
        problems.append(f"cache_implementation={value('cache_implementation')}: must be dynamic or static")
    if problems:
        raise ConfigError(
            f"generate({'; '.join(problems)}) while tokens are dropped inside the language model (vlm.pruner). Change"
            " it, or set vlm.pruner=None (pruner=none)."
        )


def refuse_training(is_training: bool, labels: Tensor | None) -> None:
    """Raises PromptError for a loss or a training under a pruner."""
    if labels is not None or is_training:
        what = "labels, which speak of every token" if labels is not None else "a model in training mode"
        raise PromptError(
            f"forward got {what}, while tokens are dropped inside the language model (vlm.pruner): set"
            f" vlm.pruner=None{', or leave labels out' if labels is not None else ', or call vlm.eval()'}."
        )
