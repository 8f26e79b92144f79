"""Averages over tasks, and the share of a loss that was won back: by hand, and by a plain-loop bootstrap."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from tests.records import compared, put, record, run_main, samples

from vzip.results.averages import average_retention, recovered_share
from vzip.results.paired import Paired

DRAW = random.Random(5)
TASKS = []  # scores of vanilla, before and after, for each of two tasks: 100 %, about 60 % and about 80 %
for size in (120, 90):
    vanilla = [1.0] * size
    before = [float(DRAW.random() < 0.6) for _ in range(size)]
    TASKS.append((vanilla, before, [max(score, float(DRAW.random() < 0.5)) for score in before]))


def against_vanilla(which: int) -> list[Paired]:
    return [compared(task[which], task[0], samples(task[which]), samples(task[0])) for task in TASKS]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def drawn_shares(number: int) -> tuple[list[float], list[float]]:
    """Average retention after, and the share won back, of `number` draws of questions, sorted."""
    retentions, shares = [], []
    for _ in range(number):
        befores, afters = [], []
        for vanilla, before, after in TASKS:
            chosen = [DRAW.randrange(len(vanilla)) for _ in vanilla]
            base = sum(vanilla[i] for i in chosen)
            befores.append(sum(before[i] for i in chosen) / base)
            afters.append(sum(after[i] for i in chosen) / base)
        retentions.append(mean(afters))
        shares.append((mean(afters) - mean(befores)) / (1 - mean(befores)))
    return sorted(retentions), sorted(shares)


def test_against_a_plain_loop() -> None:
    before, after = against_vanilla(1), against_vanilla(2)
    retentions, shares = drawn_shares(3000)
    average, share = average_retention(after), recovered_share(after, before)
    assert share is not None
    kept_before, kept_after = mean([mean(task[1]) for task in TASKS]), mean([mean(task[2]) for task in TASKS])
    assert average.point == pytest.approx(kept_after)
    assert share.point == pytest.approx((kept_after - kept_before) / (1 - kept_before))
    for found, values in ((average, retentions), (share, shares)):
        assert found.low is not None and found.high is not None
        width = found.high - found.low
        assert found.low < found.point < found.high
        assert found.low == pytest.approx(values[75], abs=0.1 * width)
        assert found.high == pytest.approx(values[-75], abs=0.1 * width)


def test_a_task_without_a_ratio_leaves_no_average(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def two_tasks(name: str, second: float) -> Path:
        content = record(scores=(0.4, 1.7))
        content["tasks"] = {"gqa": content["tasks"]["gqa"], "pope": record(scores=(second, 1.7))["tasks"]["gqa"]}
        return put(tmp_path, name, content, [1.0] * 20 + [0.0] * 30).path.parent

    assert run_main(two_tasks("a", 0.4), two_tasks("b", 0.0)) == 0
    assert "average" not in capsys.readouterr().out


def test_the_order_of_the_files_does_not_matter() -> None:
    def turned(which: int) -> list[Paired]:
        return [compared(task[which], task[0], samples(task[which])[::-1], samples(task[0])) for task in TASKS]

    assert recovered_share(against_vanilla(2), turned(1)) == recovered_share(against_vanilla(2), against_vanilla(1))


def test_nothing_won_back_and_all_of_it() -> None:
    before, nothing_lost = against_vanilla(1), against_vanilla(0)
    none, everything = recovered_share(before, before), recovered_share(nothing_lost, before)
    assert none is not None and (none.point, none.low, none.high) == (0, 0, 0)
    assert everything is not None and (everything.point, everything.low, everything.high) == (1, 1, 1)


def test_what_has_no_share() -> None:
    before, after, nothing_lost = (against_vanilla(which) for which in (1, 2, 0))
    assert recovered_share(before, nothing_lost) is None, "nothing was lost"
    assert recovered_share(after, before[:1]) is None, "not the same tasks"
    assert recovered_share([], []) is None
    assert recovered_share([after[0], replace(after[1], is_paired=False)], before) is None


def test_an_average_without_draws_of_every_task_has_no_interval() -> None:
    after = against_vanilla(2)
    found = average_retention([after[0], replace(after[1], resampled=None)])
    assert found.point == pytest.approx(mean([mean(task[2]) for task in TASKS])) and (found.low, found.high) == (
        None,
        None,
    )


def test_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def one_task(name: str, compressor: str, scores: list[float]) -> Path:
        content = record(compressor, (mean(scores), 1.7))
        content["tasks"] = {"gqa": content["tasks"]["gqa"]}
        return put(tmp_path, name, content, scores).path.parent

    vanilla = one_task("vanilla", "Identity", [1.0] * 50)
    before = one_task("before", "VisionZip", [1.0] * 20 + [0.0] * 30)
    after = one_task("after", "VisionZip", [1.0] * 35 + [0.0] * 15)
    assert run_main(after, before) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "averaged over the tasks, A has 50 % [3" in shown and f"({vanilla / 'run.json'})" in shown
    assert "average:" not in shown, "of one task there is no average"
    assert run_main(after, vanilla) == 0
    assert "A has" not in capsys.readouterr().out, "vanilla lost nothing"
    better = one_task("better", "VisionZip", [1.0] * 50)
    assert run_main(after, better) == 0
    assert "cannot be told: B loses nothing outside the noise" in " ".join(capsys.readouterr().out.split())
    assert run_main(before, after, "--vanilla", vanilla) == 0
    assert "A has -100 %" in " ".join(capsys.readouterr().out.split())
