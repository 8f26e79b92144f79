"""Several processes share the questions and give one process's numbers."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.evaluation.killed_run import Runs

import vzip
from vzip.errors import ConfigError
from vzip.evaluation.answering.processes import Processes, as_one_process, own_device
from vzip.evaluation.lmms_eval.model import ShareAnsweredError, VzipLmms


class Threads(Processes):
    """Processes of a run as threads of this one: what one gives, the first gets."""

    def __init__(self, rank: int, given: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(given))
        object.__setattr__(self, "_given", given)
        object.__setattr__(self, "_barrier", barrier)

    def gather(self, value: Any) -> list[Any] | None:
        self._given[self.rank] = copy.deepcopy(value)
        self._barrier.wait(60)
        return list(self._given) if self.is_first else None


def in_threads(count: int, work: Callable[[Threads], Any]) -> list[Any]:
    """``work`` as each of ``count`` processes, all at once; what each returns."""
    given: list[Any] = [None] * count
    barrier, returned = threading.Barrier(count), [None] * count

    def run(rank: int) -> None:
        try:
            returned[rank] = work(Threads(rank, given, barrier))
        except ShareAnsweredError as error:
            returned[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return returned


def request(number: int, **generation: Any) -> Any:
    """lmms-eval's request for a question of text alone."""
    text = f"what is {'very ' * (number % 4)}number {number}?"
    message = {"role": "user", "content": [{"type": "text", "text": text}]}
    return SimpleNamespace(args=(text, lambda doc: [message], generation, number, "own", "test"))


def test_answers_of_all_processes_in_the_order_of_the_questions(vlm):
    requests = [request(number, max_new_tokens=5 + number % 2) for number in range(11)]

    def answer(among: Processes) -> tuple[list[str], VzipLmms]:
        wrapper = vzip.CompressedVlm(vlm.model, vlm.compressor, vlm.processor)
        lm = VzipLmms(wrapper, batch_size=2, progress=False, num_workers=0, processes=among)
        lm.task_dict = {"own": {"test": list(range(11))}}
        return lm.generate_until(requests), lm

    alone, lm = answer(Processes())
    assert len(set(alone)) > 3, "answers alike: the test could not fail"
    for count in (2, 3, 8):  # of eight one has nothing to do
        first, *others = in_threads(count, answer)
        assert first[0] == alone
        assert all(isinstance(other, ShareAnsweredError) for other in others)
        assert (first[1].samples, first[1].batch_sizes) == (lm.samples, lm.batch_sizes)


def test_share_leaves_out_nothing():
    items = list(range(10))
    shares = [Processes(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items and [len(share) for share in shares] == [4, 3, 3]


def test_lmms_eval_sees_one_process_meanwhile(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ZeroDivisionError), as_one_process():
        assert "WORLD_SIZE" not in os.environ and "RANK" not in os.environ
        raise ZeroDivisionError
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("4", "2")


def test_each_process_has_its_own_gpu(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert own_device("auto") == "auto" and own_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("auto") == {"": 3} and own_device("cuda") == {"": 3} and own_device("cpu") == "cpu"
    assert chosen == [3, 3]
    with pytest.raises(ConfigError, match=r"model.device_map=cuda:1: several processes .* Set it to auto"):
        own_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"


@pytest.mark.slow
def test_two_processes_equal_one_and_go_on_when_killed(model, processor, include_path, tmp_path):
    run_alone = Runs(tmp_path, model, processor, include_path)
    run_alone("one")
    run_alone("two", processes=2)
    assert run_alone("killed", "1", "1", processes=2, check=False).returncode != 0
    left = sorted(path.name for path in (tmp_path / "killed").glob("answers*"))
    assert left == ["answers.partial.jsonl", "answers.partial.rank1.jsonl"]
    run_alone("killed", processes=3)  # on another number of processes
    assert not list((tmp_path / "killed").glob("answers*"))

    samples = {name: (tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two", "killed")}
    assert samples["one"] == samples["two"] == samples["killed"]
    one, two, killed = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two", "killed"))
    for key in ("tasks", "visual_tokens", "batch_sizes", "data"):
        assert one[key] == two[key] == killed[key], key
    assert [record["num_processes"] for record in (one, two, killed)] == [1, 2, 3]
    assert one["num_resumed_answers"] == two["num_resumed_answers"] == 0 < killed["num_resumed_answers"]
