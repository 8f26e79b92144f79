"""What a server gains: requests a second, times to the first and between later tokens, cache blocks of a request.

Two engines of vLLM run in this process, one without and one with compression, and take turns: every level of
concurrency of one, then of the other, round after round. A level is a closed loop: so many requests are in flight, and
as one ends the next is handed in, its image's preparation included. There is no HTTP, whose cost is the same for both.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from vzip.bench.measurement import Measurement
from vzip.errors import ConfigError, nearest
from vzip.installed import missing_package
from vzip.keys import SEED, Rule, check_value, key, keys_of, one_of, raise_all, show
from vzip.option_files import read_yaml
from vzip.results.files import make_folder, written_aside

STOCK, COMPRESSED = "stock", "compressed"
PERCENTILES = (50, 90, 99)
NUM_WARMUP = 4  # requests, the ones whose cache blocks are counted
_ENGINE = "engine."
_NOT_ENGINES = {"model": "model", "hf_overrides": "compressor and budget", "block_size": "block_size"}
_LEVELS = Rule(
    "whole numbers, 1 or more, with commas, each once",
    lambda v: isinstance(v, tuple) and all(isinstance(n, int) and n > 0 for n in v) and len(set(v)) == len(v) > 0,
)


@dataclass(frozen=True)
class ServingSettings:
    """One measurement; ``engine`` are further arguments of ``vllm.LLM``, for both engines."""

    concurrency: tuple[int, ...] = key(
        "requests in flight, several levels with commas", rule=_LEVELS, default=(1, 4, 16, 64)
    )
    num_requests: int = key("in each round of a level; at least twice the concurrency", at_least=1, default=40)
    num_new_tokens: int = key("tokens of each answer", at_least=2, default=8)
    repeats: int = key("rounds of each level", at_least=1, default=3)
    block_size: int = key("tokens of a cache block", at_least=1, default=32)
    stock: str = key(
        "what compression is held against: vzip's class in vLLM without compression, which prepares images as the other"
        " side does, or vLLM's own class, where it can read the checkpoint",
        rule=one_of("vzip", "vllm"),
        default="vzip",
    )
    seed: int = key("of the images and questions", rule=SEED, default=0)
    out: str = key("for serve.json and serve.png; auto: runs/bench/...", what="a directory", default="auto")
    overwrite: bool = key("whether an existing out directory may be written to", default=False)
    engine: Mapping[str, Any] = field(default_factory=dict)

    def num_requests_at(self, concurrency: int) -> int:
        """Requests in a round of a level."""
        return max(self.num_requests, 2 * concurrency)


KEYS = keys_of(ServingSettings)


def shown_defaults() -> dict[str, str]:
    """Each key's default the way a user writes it."""
    values = {name: getattr(ServingSettings(), name) for name in KEYS}
    return {n: ",".join(map(str, v)) if isinstance(v, tuple) else show(v) for n, v in values.items()}


def parse(words: Sequence[str]) -> tuple[ServingSettings, list[str]]:
    """Reads ``key=value`` words; returns the settings and the words that are not theirs (model, compressor, budget).

    Raises:
        ConfigError: with every mistake of the line.
    """
    given: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    others, problems = [], []
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            problems.append(f"{word!r} is not of the form key=value{nearest(name, KEYS)}; keys: {', '.join(KEYS)}")
        elif name.startswith(_ENGINE):
            argument = name.removeprefix(_ENGINE)
            engine[argument] = read_yaml(text)
            if argument in _NOT_ENGINES:
                problems.append(f"{name}: is what {_NOT_ENGINES[argument]} (without engine.) says; leave it out")
        elif name not in KEYS:
            others.append(word)
        elif name in given:
            problems.append(f"{name} is given twice")
        else:
            if name == "concurrency":
                value: Any = tuple(read_yaml(part) for part in text.split(","))
            else:
                value = text if isinstance(getattr(ServingSettings(), name), str) else read_yaml(text)
            given[name] = value
            problems += check_value(name, value, KEYS[name].rule)
    raise_all(problems)
    return ServingSettings(**given, engine=engine), others


class Progressed(NamedTuple):
    """A request after a step: tokens of its answer so far, and whether it has ended."""

    request: str
    num_tokens: int
    is_finished: bool


class Engine(Protocol):
    """What is measured."""

    def add(self, request: Mapping[str, Any], num_new_tokens: int) -> str:
        """Hands a request in; returns its name."""

    def step(self) -> Iterable[Progressed]:
        """Works once on whatever is in flight; only the requests that got on are told."""

    def num_blocks(self) -> list[int]:
        """Cache blocks that each request in flight holds now."""


@dataclass
class Load:
    """One round of a level.

    Attributes:
        wall_s: from the first request handed in to the last one's end.
        ttft_ms: of each request, from being handed in to its first token.
        tpot_ms: of each request, between later tokens on average.
    """

    wall_s: float
    ttft_ms: list[float]
    tpot_ms: list[float]

    @property
    def requests_per_s(self) -> float:
        """Of the whole round."""
        return len(self.ttft_ms) / self.wall_s


def run_load(
    engine: Engine,
    requests: Sequence[Mapping[str, Any]],
    concurrency: int,
    num_new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Load:
    """Keeps ``concurrency`` requests in flight until all are answered.

    Raises:
        ConfigError: an answer of another length.
        RuntimeError: one told of at its end alone, of whose times nothing is known.
    """
    waiting = deque(requests)
    began: dict[str, float] = {}
    first: dict[str, tuple[float, int]] = {}
    ttft_ms, tpot_ms = [], []
    start = clock()
    while waiting or began:
        while waiting and len(began) < concurrency:
            now = clock()
            began[engine.add(waiting.popleft(), num_new_tokens)] = now
        for name, num_tokens, is_finished in engine.step():
            now = clock()
            if num_tokens and name not in first:
                first[name] = now, num_tokens
            if is_finished:
                if num_tokens != num_new_tokens:
                    raise _wrong_length(num_tokens, num_new_tokens)
                (first_at, num_first), added = first.pop(name), began.pop(name)
                if num_first == num_tokens:
                    raise RuntimeError(f"request {name}: all its tokens were told at once, so their times are unknown.")
                ttft_ms.append((first_at - added) * 1000)
                tpot_ms.append((now - first_at) * 1000 / (num_tokens - num_first))
    return Load(clock() - start, ttft_ms, tpot_ms)


def _wrong_length(num_tokens: int, num_new_tokens: int) -> ConfigError:
    return ConfigError(
        f"an answer ended after {num_tokens} tokens instead of {num_new_tokens}: engine.max_model_len must have room"
        " for prompt, answer and one token more. Raise it, or lower num_new_tokens."
    )


def count_blocks(engine: Engine, requests: Sequence[Mapping[str, Any]], num_new_tokens: int) -> list[int]:
    """Cache blocks that each request holds when the last token of its answer is made, one request at a time.

    It is let make one token more, since blocks are given back in the step that ends a request.

    Raises:
        ConfigError: an answer that ends before.
    """
    found = []
    for request in requests:
        engine.add(request, num_new_tokens + 1)
        most = num_tokens = 0
        while num_tokens <= num_new_tokens:
            for progressed in engine.step():
                num_tokens = progressed.num_tokens
                if progressed.is_finished and num_tokens <= num_new_tokens:
                    raise _wrong_length(num_tokens, num_new_tokens + 1)
            if num_tokens <= num_new_tokens:
                most = max([most, *engine.num_blocks()])
        found.append(most)
    return found


@dataclass(frozen=True)
class Level:
    """What was measured of an engine at one concurrency.

    Attributes:
        concurrency: requests in flight.
        num_requests: in each round.
        requests_per_s: of each round.
        ttft_ms, tpot_ms: of each request of all rounds.
    """

    concurrency: int
    num_requests: int
    requests_per_s: list[float]
    ttft_ms: list[float]
    tpot_ms: list[float]

    @property
    def median_requests_per_s(self) -> float:
        """Over the rounds."""
        return statistics.median(self.requests_per_s)

    def percentile(self, what: str, percent: float) -> float:
        """Of ``ttft_ms`` or ``tpot_ms``."""
        return float(np.percentile(getattr(self, what), percent))

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for ``json.dump``."""
        shown = {
            f"{what.removesuffix('_ms')}_p{p}_ms": self.percentile(what, p)
            for what in ("ttft_ms", "tpot_ms")
            for p in PERCENTILES
        }
        return {**asdict(self), "median_requests_per_s": self.median_requests_per_s, **shown}


@dataclass(frozen=True)
class SideResult:
    """What was measured of an engine.

    Attributes:
        levels: by concurrency, ascending as they were asked for.
        kv_blocks: that each of some requests holds at its end.
        num_kv_blocks: that the engine has.
        prompt_tokens: of those requests, visual tokens among them.
    """

    levels: list[Level]
    kv_blocks: list[int]
    num_kv_blocks: int
    prompt_tokens: list[int]

    @property
    def blocks_per_request(self) -> float:
        """On average."""
        return statistics.mean(self.kv_blocks)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for ``json.dump``."""
        return {
            "levels": [level.to_json() for level in self.levels],
            "kv_blocks": self.kv_blocks,
            "kv_blocks_per_request": self.blocks_per_request,
            "num_kv_blocks": self.num_kv_blocks,
            "prompt_tokens": self.prompt_tokens,
        }


@dataclass(frozen=True)
class ServingResult(Measurement):
    """A measurement of both engines; ``methods`` has ``stock`` and ``compressed``."""

    methods: dict[str, SideResult]

    def ratios(self) -> dict[str, Any]:
        """Compressed against stock: requests a second and median times by concurrency, and cache blocks."""
        ours, stock = self.methods[COMPRESSED], self.methods[STOCK]
        by_level = {
            str(own.concurrency): {
                "requests_per_s": own.median_requests_per_s / other.median_requests_per_s,
                "ttft_p50": other.percentile("ttft_ms", 50) / own.percentile("ttft_ms", 50),
                "tpot_p50": other.percentile("tpot_ms", 50) / own.percentile("tpot_ms", 50),
            }
            for own, other in zip(ours.levels, stock.levels, strict=True)
        }
        return {"by_concurrency": by_level, "kv_blocks": stock.blocks_per_request / ours.blocks_per_request}

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for ``json.dump``."""
        return {
            **super().to_json(),
            "methods": {name: side.to_json() for name, side in self.methods.items()},
            "ratios": self.ratios(),
            "conventions": {
                "requests_per_s": "of a round: requests over the time from the first handed in to the last one's end",
                "ttft_ms": "from a request being handed in, its image's preparation included, to its first token",
                "tpot_ms": "time between an answer's later tokens, its mean a request",
                "kv_blocks": "cache blocks that a request holds as the last token of its answer is made",
                "engines": "both in this process (vllm.LLM), in turns; no HTTP",
            },
        }


def measure_sides(
    engines: Mapping[str, Engine],
    requests: Sequence[Mapping[str, Any]],
    settings: ServingSettings,
    on_step: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, tuple[list[Level], list[int]]]:
    """Measures every level of every engine in turns; levels and cache blocks by the engine's name.

    Args:
        engines: by name.
        requests: taken in turn, from the first in each round, so that all engines are asked the same.
        settings: which levels, how many requests and rounds.
        on_step: called after each round of a level.
        clock: seconds.
    """
    few = list(requests[:NUM_WARMUP])
    blocks = {name: count_blocks(engine, few, settings.num_new_tokens) for name, engine in engines.items()}
    rounds: dict[tuple[str, int], list[Load]] = {}
    for number in range(settings.repeats):
        for concurrency in settings.concurrency:
            count = settings.num_requests_at(concurrency)
            chosen = [requests[at % len(requests)] for at in range(count)]
            # Who begins changes from round to round: a machine that grows slower is then no one's loss.
            names = list(engines) if number % 2 == 0 else list(engines)[::-1]
            for name in names:
                load = run_load(engines[name], chosen, concurrency, settings.num_new_tokens, clock)
                rounds.setdefault((name, concurrency), []).append(load)
                on_step()
    found: dict[str, tuple[list[Level], list[int]]] = {}
    for name in engines:
        levels = [
            Level(
                concurrency,
                settings.num_requests_at(concurrency),
                [load.requests_per_s for load in loads],
                [ms for load in loads for ms in load.ttft_ms],
                [ms for load in loads for ms in load.tpot_ms],
            )
            for (of, concurrency), loads in rounds.items()
            if of == name
        ]
        found[name] = levels, blocks[name]
    return found


class VllmEngine:
    """An engine of vLLM in this process.

    Args:
        model: directory or hub id.
        arguments: further ones of ``vllm.LLM``.

    Cached prefixes and prepared images are switched off: requests that repeat would be answered from them.
    """

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        from vllm import LLM

        usual = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0, "disable_log_stats": True}
        self.llm = LLM(model, **{**usual, **arguments})
        self._num_added = 0

    def add(self, request: Mapping[str, Any], num_new_tokens: int) -> str:
        """Hands a request in, as ``vllm.LLM.generate`` takes it; its answer goes on where it would end."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False)
        self._num_added += 1
        name = str(self._num_added)
        # Past LLM's own methods, which have requests told of at their end alone.
        self.llm.llm_engine.add_request(name, dict(request), params)
        return name

    def step(self) -> list[Progressed]:
        """One step of the engine: a batch of whatever is in flight."""
        done = self.llm.llm_engine.step()
        return [Progressed(each.request_id, len(each.outputs[0].token_ids), each.finished) for each in done]

    def num_blocks(self) -> list[int]:
        """Cache blocks that each request in flight holds now."""
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        manager = scheduler.kv_cache_manager
        return [sum(map(len, manager.get_block_ids(request.request_id))) for request in scheduler.running]

    @property
    def num_kv_blocks(self) -> int:
        """Cache blocks of the engine."""
        return int(self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)

    def prompt_tokens(self, requests: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens that each request's prompt takes in the engine."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        done = self.llm.generate([dict(request) for request in requests], params, use_tqdm=False)
        return [len(each.prompt_token_ids) for each in done]


def table(result: ServingResult) -> Any:
    """A row for each level and engine."""
    from rich.table import Table

    shown = Table("in flight", "", title="median of the rounds; p50/p90/p99 over all requests", title_justify="left")
    for name in ("requests/s", "first token, ms", "later ones, ms"):
        shown.add_column(name, justify="right")
    ours, stock = result.methods[COMPRESSED], result.methods[STOCK]
    for pair in zip(stock.levels, ours.levels, strict=True):
        for name, level in zip((STOCK, COMPRESSED), pair, strict=True):
            times = [[level.percentile(what, p) for p in PERCENTILES] for what in ("ttft_ms", "tpot_ms")]
            words = ["/".join(f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" for ms in of) for of in times]
            shown.add_row(str(level.concurrency), name, f"{level.median_requests_per_s:.2f}", *words)
    return shown


def summary(result: ServingResult) -> list[str]:
    """The ratios, a line each."""
    ratios = result.ratios()
    lines = [
        f"{level} in flight: {of['requests_per_s']:.2f}x the requests a second, first token {of['ttft_p50']:.2f}x as"
        f" fast, later ones {of['tpot_p50']:.2f}x (medians)"
        for level, of in ratios["by_concurrency"].items()
    ]
    sides = [(name, result.methods[name]) for name in (STOCK, COMPRESSED)]
    blocks = ", ".join(f"{name} {side.blocks_per_request:.1f} of {side.num_kv_blocks}" for name, side in sides)
    return [*lines, f"cache blocks a request: {blocks}: {ratios['kv_blocks']:.2f}x fewer"]


def write_plot(result: ServingResult, path: Path) -> None:
    """Draws requests a second and times to the first token against concurrency.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("the plot", "matplotlib", error) from error
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    rate, first = figure.subplots(1, 2)
    for name, color in ((STOCK, "0.45"), (COMPRESSED, "C0")):
        levels = sorted(result.methods[name].levels, key=lambda level: level.concurrency)
        at = [level.concurrency for level in levels]
        medians = [level.median_requests_per_s for level in levels]
        spread = [
            [median - min(level.requests_per_s) for level, median in zip(levels, medians, strict=True)],
            [max(level.requests_per_s) - median for level, median in zip(levels, medians, strict=True)],
        ]
        rate.errorbar(at, medians, yerr=spread, marker="o", capsize=3, color=color, label=name)
        for percent, style in ((50, "-"), (99, ":")):
            times = [level.percentile("ttft_ms", percent) for level in levels]
            first.plot(at, times, style, marker="o", color=color, label=f"{name}, p{percent}")
    ticks = sorted(level.concurrency for level in result.methods[STOCK].levels)
    for axes, label in ((rate, "requests a second (bars: slowest and fastest round)"), (first, "first token, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("requests in flight")
        axes.set_ylabel(label, fontsize="small")
        axes.grid(color="0.9")
        axes.legend(fontsize="small")
    rate.set_ylim(bottom=0)
    first.set_yscale("log")  # with many in flight the first token waits a hundred times as long
    first.yaxis.set_major_formatter("{x:g}")
    blocks = {name: side.blocks_per_request for name, side in result.methods.items()}
    figure.suptitle(
        f"{result.model}, {result.resolved['compressed']}: {blocks[STOCK]:.0f} cache blocks a request without,"
        f" {blocks[COMPRESSED]:.0f} with compression",
        fontsize="small",
    )
    make_folder(path.parent)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=150)
