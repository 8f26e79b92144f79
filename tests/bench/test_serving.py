"""`python -m vzip bench serve`: the closed loop, times and blocks against an engine whose every step is known."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from vzip import cli
from vzip.bench import serving
from vzip.bench.serving import COMPRESSED, STOCK, Progressed, ServingSettings
from vzip.errors import ConfigError


class Scripted:
    """Every step takes ``step_s`` and gives each request in flight one token; a prompt takes ``prefill`` steps more."""

    def __init__(self, clock: list[float], step_s: float, prompt_tokens: int, prefill: int = 0, block_size: int = 32):
        self.clock, self.step_s, self.prompt_tokens, self.prefill = clock, step_s, prompt_tokens, prefill
        self.block_size = block_size
        self.running: dict[str, list[int]] = {}
        self.asked: list[Any] = []
        self.most_in_flight = 0

    def add(self, request: Mapping[str, Any], num_new_tokens: int) -> str:
        name = str(len(self.asked))
        self.asked.append(request["number"])
        self.running[name] = [-self.prefill, num_new_tokens]
        self.most_in_flight = max(self.most_in_flight, len(self.running))
        return name

    def step(self) -> list[Progressed]:
        self.clock[0] += self.step_s
        told = []
        for name, state in list(self.running.items()):
            state[0] += 1
            if state[0] == state[1]:
                del self.running[name]
            if state[0] > 0:
                told.append(Progressed(name, state[0], state[0] == state[1]))
        return told

    def num_blocks(self) -> list[int]:
        # The newest token is not in the cache before the next step.
        return [math.ceil((self.prompt_tokens + max(0, n - 1)) / self.block_size) for n, _ in self.running.values()]


REQUESTS = [{"number": number} for number in range(10)]


def test_a_closed_loop_keeps_so_many_in_flight_and_loses_none() -> None:
    clock = [0.0]
    engine = Scripted(clock, 0.5, 100, prefill=1)
    load = serving.run_load(engine, REQUESTS, 4, 3, lambda: clock[0])
    assert engine.asked == list(range(10)) and engine.most_in_flight == 4 and not engine.running
    # Three waves (4, 4, 2) of 1 + 3 steps each; first tokens after 2 steps, later ones a step apart.
    assert load.wall_s == 3 * 4 * 0.5 and load.requests_per_s == pytest.approx(10 / 6)
    assert load.ttft_ms == [1000.0] * 10 and load.tpot_ms == [500.0] * 10


def test_an_answer_of_another_length_is_no_measurement() -> None:
    class Short(Scripted):
        def add(self, request: Mapping[str, Any], num_new_tokens: int) -> str:
            return super().add(request, num_new_tokens - 1)

        def step(self) -> list[Progressed]:
            assert self.running, "nothing is in flight, so this would not end"
            return super().step()

    with pytest.raises(ConfigError, match=r"2 tokens instead of 3: engine\.max_model_len must have room"):
        serving.run_load(Short([0.0], 1.0, 100), REQUESTS, 4, 3)
    with pytest.raises(ConfigError, match="3 tokens instead of 4"):
        serving.count_blocks(Short([0.0], 1.0, 100), REQUESTS, 3)


def test_an_answer_that_is_told_at_its_end_alone_has_no_times() -> None:
    class Silent(Scripted):
        def step(self) -> list[Progressed]:
            return [told for told in super().step() if told.is_finished]

    with pytest.raises(RuntimeError, match="all its tokens were told at once"):
        serving.run_load(Silent([0.0], 1.0, 100), REQUESTS, 4, 3)


@pytest.mark.parametrize("prompt_tokens", [595, 600, 77, 89, 90])
def test_blocks_are_counted_where_the_last_token_is_made(prompt_tokens: int) -> None:
    engine = Scripted([0.0], 1.0, prompt_tokens)
    expected = math.ceil((prompt_tokens + 8 - 1) / 32)
    assert serving.count_blocks(engine, REQUESTS[:3], 8) == [expected] * 3


def _result() -> tuple[serving.ServingResult, dict[str, Scripted]]:
    clock = [0.0]
    engines = {STOCK: Scripted(clock, 1.0, 595), COMPRESSED: Scripted(clock, 0.25, 83)}
    settings = ServingSettings(concurrency=(1, 4), num_requests=6, num_new_tokens=8, repeats=3)
    rounds: list[None] = []
    found = serving.measure_sides(engines, REQUESTS, settings, lambda: rounds.append(None), lambda: clock[0])
    assert len(rounds) == 2 * 2 * 3
    methods = {n: serving.SideResult(levels, blocks, 1000, [7]) for n, (levels, blocks) in found.items()}
    resolved = {"compressed": "visionzip-64tok"}
    return serving.ServingResult("tiny", {}, resolved, {}, methods, []), engines


def test_both_engines_are_asked_the_same_in_turns_and_compared_level_by_level(tmp_path: Path) -> None:
    result, engines = _result()
    assert engines[STOCK].asked == engines[COMPRESSED].asked
    assert len(engines[STOCK].asked) == serving.NUM_WARMUP + 3 * (6 + 8), "twice the concurrency at least"
    ratios = result.ratios()
    assert ratios["kv_blocks"] == 19 / 3
    for level in ("1", "4"):
        assert ratios["by_concurrency"][level] == {"requests_per_s": 4.0, "ttft_p50": 4.0, "tpot_p50": 4.0}
    result.write(tmp_path / "new" / "serve.json")
    plain = json.loads((tmp_path / "new" / "serve.json").read_text())
    assert plain["methods"]["stock"]["levels"][1]["ttft_p99_ms"] == 1000 and plain["ratios"]["kv_blocks"] == 19 / 3
    assert plain["methods"]["compressed"]["kv_blocks"] == [3] * 4
    assert any("4.00x the requests a second" in line for line in serving.summary(result))
    assert "19.0 of 1000" in serving.summary(result)[-1] and "6.33x fewer" in serving.summary(result)[-1]
    assert serving.table(result).row_count == 4
    serving.write_plot(result, tmp_path / "serve.png")
    assert (tmp_path / "serve.png").stat().st_size > 10_000


def test_words_are_the_benchs_or_the_servers_and_mistakes_are_named_at_once() -> None:
    words = ["concurrency=1,8", "model=tiny", "engine.gpu_memory_utilization=0.4", "repeats=5", "budget=64tok"]
    settings, others = serving.parse(words)
    assert settings.concurrency == (1, 8) and settings.repeats == 5 and settings.block_size == 32
    assert settings.engine == {"gpu_memory_utilization": 0.4} and others == ["model=tiny", "budget=64tok"]
    assert settings.num_requests_at(64) == 128 and settings.num_requests_at(4) == 40
    with pytest.raises(ConfigError) as caught:
        serving.parse(
            ["concurrency=0,1", "num_new_tokens=1", "stock=hf", "repeats=2", "repeats=3", "fast", "engine.model=a/b"]
        )
    assert "engine.model: is what model (without engine.) says" in str(caught.value)
    for part in ("concurrency=(0, 1)", "num_new_tokens=1", "stock=hf", "repeats is given twice", "'fast' is not of"):
        assert part.replace("=(0, 1)", "") in str(caught.value)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["compressor=none", "budget=full"], "both engines would be the same"),
        (["compressor=flowcut"], "vzip embed"),
        (["concurency=1"], "is not for a server"),
        (["dry_run=true"], "a measurement has none"),
        (["model=tiny", "model=llava15_7b"], "model is given twice"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_vllm_is_looked_for(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "serve", *words]) == 2
    assert why in capsys.readouterr().err
