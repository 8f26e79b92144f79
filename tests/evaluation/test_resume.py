"""A run that is interrupted, or whose disk is full, goes on to the result of one that is not."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.killed_run import Runs
from tqdm import tqdm

from vzip.errors import RunWriteError
from vzip.evaluation.answering import resume
from vzip.evaluation.answering.answers import SampleLog
from vzip.evaluation.answering.generation import settings_for
from vzip.evaluation.answering.processes import Processes
from vzip.evaluation.answering.questions import Question
from vzip.evaluation.answering.resume import AnswerStore
from vzip.evaluation.run import evaluate
from vzip.results.files import write_json

PARTIAL = "answers.partial.jsonl"
SETTINGS = {"model": "a", "code": "b"}


def question(doc_id: int, text: str = "what?", **generation: Any) -> Question:
    return Question(("t", doc_id, 0), settings_for("t", generation, {}), text, request=None)  # type: ignore[arg-type]


def log(answer: str) -> SampleLog:
    return SampleLog("a prompt\nof lines", answer, [7])


def filled(folder: Path, *doc_ids: int, rank: int = 0, sizes: tuple[int, ...] = (1,)) -> Path:
    """A store's file with one line a question."""
    store = AnswerStore(folder, SETTINGS, Processes(rank, 1))
    for doc_id in doc_ids:
        store.add([(question(doc_id), log(f"answer {doc_id} é"))], sizes)
    store.close()
    return store.path


def found(folder: Path, settings: dict[str, str] = SETTINGS) -> AnswerStore:
    store = AnswerStore(folder, settings, Processes())
    store.close()
    return store


class TestStore:
    def test_what_was_added_is_found_in_the_same_words_only(self, tmp_path):
        filled(tmp_path, 0, 1)
        store = found(tmp_path)
        assert store.find(question(0)) == log("answer 0 é") and store.find(question(2)) is None
        assert store.find(question(0, "another text")) is None
        assert store.find(question(0, max_new_tokens=3)) is None

    def test_a_line_cut_off_by_the_interruption_is_ignored(self, tmp_path, caplog):
        path = filled(tmp_path, 0, 1)
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        assert set(found(tmp_path).kept.answers) == {("t", 0, 0)} and not caplog.text
        filled(tmp_path, 1)
        assert path.read_bytes() == whole, "the next answer stands on a line of its own"

    @pytest.mark.parametrize(
        "damage",
        [
            lambda line: line.replace(b"answer 1", b"answer 7"),  # still JSON, but not what was written
            lambda line: line[:40] + b"\n" + line[60:],
            lambda line: b"\x00\xff\n",
            lambda line: b"\n",
        ],
    )
    def test_a_damaged_line_is_named_counted_and_asked_again(self, tmp_path, caplog, damage):
        path = filled(tmp_path, 0, 1, 2)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], damage(lines[2]), *lines[3:]]))
        caplog.set_level(logging.WARNING, "vzip")
        kept = found(tmp_path).kept
        assert set(kept.answers) == {("t", 0, 0), ("t", 2, 0)} and kept.num_damaged >= 1
        assert f"{path}: {kept.num_damaged} damaged lines (3" in caplog.text

    def test_other_settings_are_named(self, tmp_path, caplog):
        filled(tmp_path, 0)
        caplog.set_level(logging.WARNING, "vzip")
        assert not found(tmp_path, {"model": "a", "code": "c"}).kept.answers
        assert "not used, its answers are of other settings (code)" in caplog.text
        (tmp_path / PARTIAL).write_text("no head\n")
        assert not found(tmp_path).kept.answers and "its first line is damaged" in caplog.text

    def test_files_of_several_processes_become_one(self, tmp_path):
        filled(tmp_path, 0, 1)
        shutil.move(tmp_path / PARTIAL, tmp_path / "answers.partial.rank1.jsonl")
        filled_again = AnswerStore(tmp_path, SETTINGS, Processes())
        filled_again.add([(question(2), log("x")), (question(3), log("y"))], [1, 1], 5)
        filled_again.add([(question(4), log("z"))], [1], 3)
        filled_again.close()
        store = found(tmp_path)
        assert sorted(doc_id for _, doc_id, _ in store.kept.answers) == [0, 1, 2, 3, 4]
        assert [path.name for path in tmp_path.iterdir()] == [PARTIAL]
        assert store.kept.sizes == {1: 5} and store.kept.chunk_size == 3
        store.delete()
        assert not list(tmp_path.iterdir())

    def test_settings_name_what_decides_the_answers(self, vlm):
        import vzip

        config = {"eval": {"batch_size": 1, "tasks": ["a"]}, "launcher": {"num_processes": 1}, "seed": 0}
        usual = resume.settings_of(vlm, config, limit=None)
        how = {**config, "eval": {"batch_size": 9, "tasks": ["a"]}, "launcher": {"num_processes": 8}}
        assert resume.settings_of(vlm, how, limit=None) == usual
        what = {**config, "eval": {"batch_size": 1, "tasks": ["b"]}}
        changed = {
            "config": resume.settings_of(vlm, what, limit=None),
            "limit": resume.settings_of(vlm, config, limit=3),
        }
        vlm.compressor = vzip.VisionZip(vzip.TokenBudget(4, 3))
        changed["compressor"] = resume.settings_of(vlm, config, limit=None)
        vlm.compiled_parts = ("decode",)
        assert resume.settings_of(vlm, config, limit=None) != changed["compressor"], "compiled numbers are others"
        vlm.compiled_parts = ()
        # No pruner is no setting: what is digested is what it was before there were any.
        assert resume.settings_of(vlm, {**config, "pruner": {"name": "none"}}, limit=None) == changed["compressor"]
        vlm.pruner = vzip.FastV(1, 3)
        pruned = resume.settings_of(vlm, config, limit=None)
        vlm.pruner = vzip.FastV(1, 4)
        others = resume.settings_of(vlm, config, limit=None)
        assert [key for key in pruned if pruned[key] != others[key]] == ["pruner"]
        assert pruned.keys() - usual.keys() == {"pruner"}
        for name, settings in changed.items():
            assert [key for key in usual if settings[key] != usual[key]] == [name]


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond a size: the system refuses as it does on a full disk."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


class TestFullDisk:
    def test_answers_that_fitted_are_kept(self, tmp_path):
        size = filled(tmp_path, 0, 1).stat().st_size
        store = AnswerStore(tmp_path, SETTINGS, Processes())
        with full_disk(size + 30), pytest.raises(RunWriteError, match=r"answers.partial.jsonl: cannot be written \("):
            store.add([(question(2), log("x"))], [1])
        store.close()
        assert (tmp_path / PARTIAL).stat().st_size == size + 30  # a piece of the line is there
        assert set(found(tmp_path).kept.answers) == {("t", 0, 0), ("t", 1, 0)}

    def test_a_record_is_whole_or_not_there(self, tmp_path):
        with full_disk(30), pytest.raises(RunWriteError, match=r"run.json: cannot be written"):
            write_json(tmp_path / "run.json", {"much": "x" * 100})
        assert not list(tmp_path.iterdir())

    def test_met_by_lmms_evals_log(self, vlm, include_path, tmp_path):
        (tmp_path / "lmms_eval.log").symlink_to("/dev/full")
        with pytest.raises(RunWriteError, match=f"{tmp_path}: cannot be written .No space left on device"):
            start(vlm, include_path, tmp_path)
        assert not (tmp_path / "run.json").exists() and (tmp_path / PARTIAL).exists()
        # A bar that could not be drawn has kept tqdm's lock, which threads of the next run would wait for.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(takes_and_gives_back, tqdm.get_lock()).result()

    def test_a_run_goes_on_when_there_is_room(self, vlm, include_path, tmp_path, whole, monkeypatch):
        from vzip.evaluation import run

        def fails(*args: Any) -> None:
            raise RunWriteError("run.json: cannot be written (No space left on device).")

        with monkeypatch.context() as patch, pytest.raises(RunWriteError):
            patch.setattr(run, "write_json", fails)
            start(vlm, include_path, tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()
        record = start(vlm, include_path, tmp_path / "run")
        assert record["num_resumed_answers"] == 8
        assert_same_result(tmp_path / "run", whole)


def takes_and_gives_back(lock: Any) -> bool:
    taken = lock.acquire(timeout=1)
    if taken:
        lock.release()
    return taken


def start(vlm: Any, include_path: Path, run_dir: Path, **kwargs: Any) -> dict[str, Any]:
    settings = {"tasks": ["own_exact", "own_drawn"], "batch_size": 3, "progress": False} | kwargs
    return evaluate(vlm, include_path=include_path, run_dir=run_dir, **settings)


def assert_same_result(run_dir: Path, whole: Path) -> None:
    assert (run_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    ours, theirs = (json.loads((folder / "run.json").read_text()) for folder in (run_dir, whole))
    for key in ("tasks", "visual_tokens", "batch_sizes", "data", "left_out"):
        assert ours[key] == theirs[key], key


@pytest.fixture(scope="module")
def include_path(include_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With own_drawn, which draws at random while it asks and while it scores, as MMMU's scorer does."""
    include_path = Path(shutil.copytree(include_path, tmp_path_factory.mktemp("drawn") / "tasks"))
    (include_path / "drawing.py").write_text(
        "import random\n\n\n"
        "def visual(doc):\n    random.random()\n    return [doc['image'].convert('RGB')]\n\n\n"
        "def score(doc, results):\n    return {'drawn': random.random()}\n"
    )
    text = (include_path / "own_exact.yaml").read_text().split("metric_list")[0]
    text = text.replace("own_exact", "own_drawn").replace("utils.visual", "drawing.visual")
    text += "process_results: !function drawing.score\n"
    text += "metric_list:\n  - {metric: drawn, aggregation: mean, higher_is_better: true}\n"
    (include_path / "own_drawn.yaml").write_text(text)
    return include_path


@pytest.fixture(scope="module")
def whole(model: Any, processor: Any, include_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing interrupts."""
    import vzip

    run_dir = tmp_path_factory.mktemp("whole") / "run"
    start(vzip.CompressedVlm(model, vzip.VisionZip(vzip.TokenBudget(5, 2)), processor), include_path, run_dir)
    return run_dir


class TestInterrupted:
    def test_from_what_a_kill_leaves(self, vlm, include_path, tmp_path, whole, monkeypatch):
        """The files as they are on disk after each batch, and with half a line more, are a killed process's."""
        seen = 0
        add = AnswerStore.add

        def copying(self: AnswerStore, *args: Any) -> None:
            nonlocal seen
            add(self, *args)
            seen += 1
            shutil.copytree(tmp_path / "run", tmp_path / f"killed{seen}")

        with monkeypatch.context() as patch:
            patch.setattr(AnswerStore, "add", copying)
            start(vlm, include_path, tmp_path / "run")
        assert seen == 3
        lines = (tmp_path / "killed2" / PARTIAL).read_bytes()
        (tmp_path / "killed1" / PARTIAL).write_bytes(lines[:-20])
        for number, resumed in ((1, 3), (2, 6)):
            record = start(vlm, include_path, tmp_path / f"killed{number}")
            assert record["num_resumed_answers"] == resumed
            assert_same_result(tmp_path / f"killed{number}", whole)

    def test_batches_once_halved_stay_halved(self, vlm, include_path, tmp_path, monkeypatch):
        import torch

        generate, room = vlm.generate, {"most": 2, "left": 3}

        def limited(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if len(input_ids) > room["most"]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            if room["left"] == 0:
                raise KeyboardInterrupt
            room["left"] -= 1
            return generate(input_ids, **kwargs)

        monkeypatch.setattr(vlm, "generate", limited)
        with pytest.raises(KeyboardInterrupt):
            start(vlm, include_path, tmp_path / "run")
        room |= {"most": 99, "left": 99}
        record = start(vlm, include_path, tmp_path / "run")
        assert record["num_resumed_answers"] == 3 and record["batch_sizes"] == {"2": 3, "1": 2}

    @pytest.mark.slow
    def test_killed(self, model, processor, include_path, tmp_path):
        run_alone = Runs(tmp_path, model, processor, include_path)
        run_alone("whole")
        done = run_alone("killed", "0", "2", check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert not (tmp_path / "killed" / "run.json").exists()
        run_alone("killed")
        assert json.loads((tmp_path / "killed" / "run.json").read_text())["num_resumed_answers"] == 6
        assert_same_result(tmp_path / "killed", tmp_path / "whole")
